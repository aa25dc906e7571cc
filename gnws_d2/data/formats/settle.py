"""Check the objects of a dataset: repair them, leave them out, or refuse it."""

import contextlib
import logging
import math
import os
import re
from collections import Counter, defaultdict
from typing import Any

from PIL import Image

from ...utils.errors import UserError
from ..dataset_mapper import BadImageError, read_image
from ..rules import refuse_corners, to_number, to_numbers
from .label import IGNORED, Label, Object, corners_of
from .settle_object import settle_object, turn_object
from .tree import map_files

Coco = dict[str, Any]
_MAX_FAULTS = 0.1  # share of the objects that may be left out
_MAX_CROWDS = 0.5  # share of the objects that are crowds, above which they are objects
_EXIF_ORIENTATION = 0x0112
_MANY = 50_000_000  # pixels of a picture, whose number is checked further
_NUMBERED = re.compile(r"[-_ ]\d+$")


class Notes:
    """Count what was repaired or left out, with the first of each kind."""

    def __init__(self) -> None:
        self.repairs: dict[str, list[str]] = defaultdict(list)
        self.left_out: dict[str, list[str]] = defaultdict(list)

    def lines(self) -> list[str]:
        """One sentence for each kind."""
        return [
            f"{verb} {len(own)} x {kind}. The first: {own[0]}"
            for verb, kinds in (("Repaired", self.repairs), ("Left out", self.left_out))
            for kind, own in kinds.items()
        ]


def settle(
    labels: list[Label],
    classes: dict[str, int],
    notes: Notes,
    *,
    masks: bool | None = None,
    skip_bad_images: bool = False,
    keep_going: bool = False,
) -> dict[str, Coco]:
    """
    Turn the labels of a dataset into COCO dicts whose objects can all be used.

    Args:
        labels: with picture and split.
        classes: the number of each class, where the data has one.
        notes: what has been left out so far. What is repaired or left out here is added.
        masks: whether objects have masks (default: whether most have one).
        skip_bad_images: leave out pictures that cannot be read.
        keep_going: leave out more than a tenth of the objects.

    Returns:
        The COCO dict of each split. All have the same categories, those with objects.

    Raises:
        UserError: if a picture cannot be read, or too many objects cannot be used.
    """
    labels = _open_pictures(labels, notes, skip_bad_images)
    for label in labels:
        for object in label.objects:
            if not object.fault:
                settle_object(object, *label.size)
    objects = [object for label in labels for object in label.objects]
    usable = [o for o in objects if not o.fault]
    sizes = [label.size for label in labels for o in label.objects if not o.fault]
    refuse_corners([o.box for o in usable], sizes, usable[0].where if usable else "")
    _settle_crowds(objects)
    if masks is None:
        counted = [o for o in usable if not o.crowd] or usable
        with_masks = sum(o.segmentation is not None for o in counted)
        masks = bool(counted) and 2 * with_masks >= len(counted)
    for object in usable:
        if masks and object.segmentation is None and object.rectangle:
            object.segmentation = [corners_of(object.box)]
        elif masks and object.segmentation is None:
            object.fault = "it has a box without an outline, unlike most objects"
        elif not masks:
            object.segmentation = None
    faults = [object for object in objects if object.fault]
    for object in faults:
        kind = object.fault.partition(":")[0]
        notes.left_out[f"object: {kind}"].append(f"{object.where}: {object.fault}.")
    if len(faults) > _MAX_FAULTS * len(objects) and not keep_going:
        raise UserError(
            f"{faults[0].where}: {faults[0].fault}. {len(faults)} of {len(objects)} objects cannot "
            "be used; --keep-going leaves them out."
        )
    for object in objects:
        for repair in object.repairs:
            notes.repairs[repair].append(object.where)
    return _to_coco(labels, classes)


def describe(coco: Coco) -> str:
    """Return the numbers of images and objects, in words."""
    annotations = coco["annotations"]
    crowds = sum(bool(a["iscrowd"]) for a in annotations)
    empty = len(coco["images"]) - len({a["image_id"] for a in annotations})
    text = f"{len(coco['images'])} images, {len(annotations) - crowds} objects"
    text += f", {crowds} crowds" if crowds else ""
    return text + (f", {empty} images without objects" if empty else "")


def _open_pictures(labels: list[Label], notes: Notes, skip_bad_images: bool) -> list[Label]:
    """Set the sizes of pictures as they are decoded. Return the labels of those that can be."""
    with_picture = [label for label in labels if label.picture]
    paths = [label.path for label in with_picture]
    kept = [label for label in labels if not label.picture]
    for label in kept:
        label.size = (0, 0)  # all its objects have a fault
    for label, path, found in zip(with_picture, paths, map_files(_open, "Opening pictures", paths)):
        if isinstance(found, str):
            if not skip_bad_images:
                raise UserError(f"{found} INPUT.ON_BAD_IMAGE skip leaves such pictures out.")
            notes.left_out["picture that cannot be read"].append(found)
            continue
        given = to_numbers(label.size)
        turned = given == [*found[1::-1]] and found[2] > 4 and found[0] != found[1]
        for object in label.objects:
            if turned:
                turn_object(object, found)
            elif given and min(given) > 0 and given != [*found[:2]]:
                object.fault = object.fault or (
                    f"its label has another size than its picture: {given[0]:.0f}x{given[1]:.0f}, "
                    f"and {path} has {found[0]}x{found[1]}"
                )
        if label.size and not (given and min(given) > 0):
            notes.repairs["size of a picture, which is read from its file"].append(path)
        label.size = found[:2]
        kept.append(label)
    return kept


def _open(path: str) -> tuple[int, int, int] | str:
    """Return width, height and EXIF orientation, or why it cannot be decoded."""
    try:
        with contextlib.suppress(Exception), Image.open(path) as header:
            # Decoding takes ten times as long. It fails for what has no end.
            if header.format == "JPEG" and _is_whole(path) and math.prod(header.size) < _MANY:
                turn = header.getexif().get(_EXIF_ORIENTATION, 1)
                width, height = header.size[:: -1 if turn > 4 else 1]
                return width, height, turn
        height, width = read_image(path, "BGR").shape[:2]
        with Image.open(path) as header:
            return width, height, header.getexif().get(_EXIF_ORIENTATION, 1)
    except BadImageError as e:
        return str(e)


def _is_whole(path: str) -> bool:
    with open(path, "rb") as f:
        f.seek(-2, os.SEEK_END)
        return f.read() == b"\xff\xd9"


def _settle_crowds(objects: list[Object]) -> None:
    """Take crowds for objects if they are most of the dataset, or all of a class."""
    of_class: dict[str, list[Object]] = defaultdict(list)
    for object in (o for o in objects if o.name != IGNORED):
        of_class[object.name].append(object)
    crowds = sum(object.crowd for object in objects)
    for name, own in of_class.items():
        number = sum(object.crowd for object in own)
        if number and (number == len(own) or crowds > _MAX_CROWDS * len(objects)):
            for object in own:
                object.crowd = False
            logging.getLogger(__name__).warning(
                f"{number} of {len(own)} objects of the class {name} are marked as crowds "
                "(iscrowd, difficult), which training leaves out: they are taken for objects."
            )


def _to_coco(labels: list[Label], classes: dict[str, int]) -> dict[str, Coco]:
    usable = [o for label in labels for o in label.objects if not o.fault]
    count = Counter(o.name for o in usable if o.name != IGNORED)
    ids = {name: number for name, number in classes.items() if count[name]}
    for name in classes:
        if not count[name]:
            logging.getLogger(__name__).info(f"The class {name} has no objects: left out.")
    for name in count:
        ids.setdefault(name, max(ids.values(), default=0) + 1)
    numbered = sorted((number, name) for name, number in ids.items())
    bases = Counter(_NUMBERED.sub("", name) for name in ids if _NUMBERED.search(name))
    for base in (base for base, number in bases.items() if number > 1):
        logging.getLogger(__name__).warning(
            f"{bases[base]} classes are called {base} and a number: if they are objects of one "
            "class, give them one name."
        )
    categories = [{"id": number, "name": name} for number, name in numbered]
    splits: dict[str, Coco] = {}
    for label in labels:
        if label.picture is None:
            continue
        empty: Coco = {"images": [], "annotations": [], "categories": categories}
        coco = splits.setdefault(label.split, empty)
        number = len(coco["images"]) + 1
        width, height = label.size
        coco["images"].append(
            {"id": number, "file_name": label.picture, "width": width, "height": height}
        )
        own = [o for o in label.objects if not o.fault]
        for object, name in ((o, n) for o in own for n in (ids if o.name == IGNORED else [o.name])):
            annotation = {
                "id": len(coco["annotations"]) + 1, "image_id": number,
                "category_id": ids[name], "bbox": object.box, "iscrowd": int(object.crowd),
                "area": to_number(object.area) or object.box[2] * object.box[3],
            }  # fmt: skip
            if object.segmentation is not None:
                annotation["segmentation"] = object.segmentation
            coco["annotations"].append(annotation)
    return splits
