import numpy as np
import pytest
from builders import coco

from gnws_d2 import model_zoo
from gnws_d2.finetuning.recipe import anchor_coverage, derive_recipe, has_masks

ZOO = "mask_rcnn_R50_gnws_2x"


def make_coco(num_images, size, box, num_objects=1, masks=True):
    """Pictures with `num_objects` boxes of a width and height each."""
    names = [str(i) for i in range(num_images)]
    objects = [(name, "x", [0, 0, *box]) for name in names for _ in range(num_objects)]
    return coco(dict.fromkeys(names, size), objects, ["x"], masks)


def choose(coco, model=ZOO, epochs=20, images_at_once=2, num_processes=1):
    return derive_recipe(model_zoo.get_config(model), coco, epochs, images_at_once, num_processes)


def derive(*args, **options):
    return {choice.key: choice.value for choice in choose(*args, **options)}


def test_large_data_gets_the_recipe_by_accumulation():
    keys = derive(make_coco(5000, (1600, 1200), (200, 200)), epochs=24)
    assert keys["INPUT.MIN_SIZE_TEST"] == 800 and keys["INPUT.MIN_SIZE_TRAIN"] == (800,)
    assert keys["INPUT.MAX_SIZE_TEST"] == 1067
    assert (keys["SOLVER.IMS_PER_BATCH"], keys["SOLVER.ACCUMULATE_STEPS"]) == (16, 8)
    assert keys["SOLVER.BASE_LR"] == 0.02
    assert keys["SOLVER.MAX_ITER"] == 24 * 5000 / 16
    assert keys["SOLVER.STEPS"] == (5000, 6875)  # epochs 16 and 22, as in the recipe
    assert keys["TEST.EVAL_PERIOD"] == keys["SOLVER.CHECKPOINT_PERIOD"] == 313
    assert "MODEL.ANCHOR_GENERATOR.SIZES" not in keys
    assert not [key for key in keys if "TOPK" in key or "DETECTIONS" in key]


def test_small_data_gets_small_batches_and_a_learning_rate_in_proportion():
    keys = derive(make_coco(60, (800, 600), (90, 90)), epochs=20, images_at_once=1)
    assert (keys["SOLVER.IMS_PER_BATCH"], keys["SOLVER.ACCUMULATE_STEPS"]) == (2, 2)
    assert keys["SOLVER.BASE_LR"] == 0.02 * 2 / 16
    assert keys["SOLVER.MAX_ITER"] == 600 and keys["SOLVER.WARMUP_ITERS"] == 60


@pytest.mark.parametrize("num_processes", [1, 3, 4, 8])
@pytest.mark.parametrize("images_at_once", [1, 2, 3])
def test_batch_divides_among_processes_and_steps(num_processes, images_at_once):
    for n in (3, 100, 5000):
        coco = make_coco(n, (64, 64), (40, 40))
        keys = derive(coco, num_processes=num_processes, images_at_once=images_at_once)
        batch, steps = keys["SOLVER.IMS_PER_BATCH"], keys["SOLVER.ACCUMULATE_STEPS"]
        assert batch % (num_processes * steps) == 0
        assert batch // num_processes // steps <= images_at_once


@pytest.mark.parametrize("epochs, each", [(1, 1), (30, 1), (60, 2), (61, 3)])
def test_evaluations_are_each_epoch_or_thirty_in_all(epochs, each):
    keys = derive(make_coco(100, (64, 64), (40, 40)), epochs=epochs)
    epoch = -(-100 // keys["SOLVER.IMS_PER_BATCH"])
    assert keys["TEST.EVAL_PERIOD"] == keys["SOLVER.CHECKPOINT_PERIOD"] == each * epoch


@pytest.mark.parametrize(
    "model, size, box, edge",
    [
        (ZOO, (400, 300), 90, 300),
        (ZOO, (400, 300), 20, 330),  # to 22
        (ZOO, (400, 300), 4, 600),  # twice
        (ZOO, (900, 700), 4, 800),
        ("quick_start", (800, 600), 300, 128),  # its own
        ("quick_start", (800, 600), 80, 165),
        ("quick_start", (90, 80), 40, 80),
    ],
)
def test_small_pictures_are_enlarged_only_for_small_objects(model, size, box, edge):
    assert derive(make_coco(9, size, (box, box)), model)["INPUT.MIN_SIZE_TEST"] == edge


def test_coverage_of_anchors_is_that_of_the_formula():
    sizes, ratios = [[32], [64]], [[0.5, 1.0, 2.0]]
    same = [[32, 32], [32 * 2**0.5, 32 / 2**0.5], [64, 64]]
    assert anchor_coverage(np.array(same), sizes, ratios) == 1
    # A square of a half of the area is covered just so, a smaller one is not; nor is a long one.
    boxes = np.array([[22.7, 22.7], [22.5, 22.5], [200, 4], [32, 32]])
    assert anchor_coverage(boxes, sizes, ratios) == 0.5
    assert anchor_coverage(np.zeros((0, 2)), sizes, ratios) == 1


def test_anchors_come_from_the_boxes_where_those_of_the_config_do_not_cover_them():
    coco = make_coco(50, (800, 800), (30, 300))
    before = model_zoo.get_config(ZOO).MODEL.ANCHOR_GENERATOR
    choices = choose(coco, epochs=1)
    (choice,) = [c for c in choices if c.key == "MODEL.ANCHOR_GENERATOR.SIZES"]
    assert choice.reason == "k-means: they cover 100% of the boxes, the anchors of the config 0%"
    keys = {c.key: c.value for c in choices}
    sizes, ratios = choice.value, keys["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"]
    assert len(sizes) == len(before.SIZES) and len(ratios[0]) == 3
    assert sizes[0][0] == pytest.approx((30 * 300) ** 0.5, abs=0.1) and ratios[0][0] == 10


def test_limits_follow_the_objects_in_an_image():
    keys = derive(make_coco(9, (800, 800), (40, 40), num_objects=120), "quick_start")
    assert keys["TEST.DETECTIONS_PER_IMAGE"] == 240
    assert keys["MODEL.RPN.POST_NMS_TOPK_TRAIN"] == keys["MODEL.RPN.POST_NMS_TOPK_TEST"] == 1200
    assert keys["MODEL.RPN.PRE_NMS_TOPK_TEST"] == 1200


def test_masks_are_predicted_if_all_objects_have_one():
    coco = make_coco(3, (64, 64), (40, 40))
    assert derive(coco)["MODEL.MASK_ON"] is True
    assert derive(coco, "faster_rcnn_R50_gnws_1x")["MODEL.MASK_ON"] is False
    coco["annotations"].append({**coco["annotations"][0], "segmentation": [], "iscrowd": 1})
    assert has_masks(coco)
    coco["annotations"][0].pop("segmentation")
    assert derive(coco)["MODEL.MASK_ON"] is False
