"""Prepare the splits of a dataset: the same classes in both, and a validation split."""

import itertools
import logging
import random
from collections import Counter
from typing import Any

Coco = dict[str, Any]


def unify_classes(splits: dict[str, Coco]) -> None:
    """
    Give the same classes, by name, the same ids in all splits, and leave out those without objects,
    such as Roboflow's parent class. In place; the ids of the first split stay.
    """
    used: Counter[Any] = Counter()
    for coco in splits.values():
        names = {c.get("id"): c.get("name") for c in coco["categories"]}
        used.update(names.get(a.get("category_id")) for a in coco["annotations"])
    ids: dict[str, Any] = {}
    for coco in splits.values():
        for category in coco["categories"]:
            name = category.get("name")
            if used[name]:
                new = category.get("id") if category.get("id") not in ids.values() else None
                ids.setdefault(name, max(ids.values(), default=0) + 1 if new is None else new)
            elif name not in ids:
                logging.getLogger(__name__).info(f"The class {name} has no objects: left out.")
    for coco in splits.values():
        names = {c.get("id"): c.get("name") for c in coco["categories"]}
        for annotation in coco["annotations"]:
            name = names.get(annotation.get("category_id"))
            if name in ids:
                annotation["category_id"] = ids[name]
        coco["categories"] = [{"id": id, "name": name} for name, id in ids.items()]


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
