import copy
import gc
import random
import time

import pytest

from gnws_d2.finetuning.split import split_dataset


def make_coco(classes_of_images, names=("a", "b", "c")):
    images = [{"id": i} for i in range(len(classes_of_images))]
    annotations = [
        {"image_id": i, "category_id": c} for i, cs in enumerate(classes_of_images) for c in cs
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}


def classes(coco):
    return {a["category_id"] for a in coco["annotations"]}


@pytest.mark.parametrize("seed", range(20))
def test_each_class_is_on_both_sides_if_it_has_two_images(seed):
    coco = make_coco([[0]] * 20 + [[1], [1, 0], [2]])
    splits = split_dataset(coco, seed=seed)
    ids = {name: {i["id"] for i in s["images"]} for name, s in splits.items()}
    assert ids["train"] | ids["val"] == set(range(23)) and not ids["train"] & ids["val"]
    assert len(ids["val"]) == 5  # a fifth
    assert {0, 1} <= classes(splits["train"]) and {0, 1} <= classes(splits["val"])
    assert 2 in classes(splits["train"])  # its only image is for training
    for split in splits.values():
        kept = {i["id"] for i in split["images"]}
        assert {a["image_id"] for a in split["annotations"]} <= kept


def test_split_is_the_same_for_the_same_seed():
    coco = make_coco([[0]] * 50)
    assert split_dataset(coco) == split_dataset(copy.deepcopy(coco))
    assert split_dataset(coco) != split_dataset(coco, seed=1)


def test_smallest_splits():
    assert [len(s["images"]) for s in split_dataset(make_coco([[0], [0]])).values()] == [1, 1]
    with pytest.raises(ValueError, match="one image"):
        split_dataset(make_coco([[0]]))


def test_time_is_linear_in_the_number_of_images():
    gc.disable()  # the time of which depends on all objects of the process

    def seconds(n):
        rng = random.Random(0)
        coco = make_coco([{rng.randrange(80), 0} for _ in range(n)], names=map(str, range(80)))
        start = time.process_time()
        split_dataset(coco)
        return time.process_time() - start

    try:
        small, large = (min(seconds(n) for _ in range(3)) for n in (16_000, 64_000))
    finally:
        gc.enable()
    assert large < 10 * small  # 16 times if it were quadratic
