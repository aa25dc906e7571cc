"""Set apart images for validation."""

import itertools
import random
from typing import Any

from ..data.formats import Coco


def split_dataset(coco: Coco, fraction: float = 0.2, seed: int = 0) -> dict[str, Coco]:
    """
    Split a dataset into "train" and "val" by image, at random, with each class on both sides if it
    has two images. Raise ValueError for a single image.

    Args:
        fraction: the share of the images in "val"; at least one is in each.
        seed: of the choice.
    """
    ids = [image["id"] for image in coco["images"]]
    if len(ids) < 2:
        raise ValueError("one image cannot be split")
    random.Random(seed).shuffle(ids)
    number = min(len(ids) - 1, max(1, round(fraction * len(ids))))
    classes_of: dict[Any, set[Any]] = {id: set() for id in ids}
    for annotation in coco["annotations"]:
        classes_of.get(annotation["image_id"], set()).add(annotation["category_id"])
    images_of: dict[Any, list[Any]] = {a["category_id"]: [] for a in coco["annotations"]}
    for id in ids:
        for category in classes_of[id]:
            images_of[category].append(id)
    in_train = {category: len(images) for category, images in images_of.items()}
    val: set[Any] = set()

    def is_free(id: Any) -> bool:
        """Whether each class of an image has another one for training."""
        return id not in val and all(in_train[category] > 1 for category in classes_of[id])

    def move(id: Any) -> None:
        val.add(id)
        for category in classes_of[id]:
            in_train[category] -= 1

    # The rarest class first, which has the fewest images to choose from.
    for category, images in sorted(images_of.items(), key=lambda item: len(item[1])):
        if in_train[category] == len(images) and len(val) < len(ids) - 1:
            for id in itertools.islice(filter(is_free, images), 1):
                move(id)
    for id in ids:
        if len(val) < number and is_free(id):
            move(id)
    return {"train": _select(coco, set(ids) - val), "val": _select(coco, val)}


def _select(coco: Coco, ids: set[Any]) -> Coco:
    return {
        **coco,
        "images": [image for image in coco["images"] if image["id"] in ids],
        "annotations": [a for a in coco["annotations"] if a["image_id"] in ids],
    }
