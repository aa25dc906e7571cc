"""Check the objects of a dataset: repair them, leave them out, or refuse it."""

import contextlib
import logging
import math
import os
import re
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from ...utils.errors import UserError
from .. import check
from ..dataset_mapper import BadImageError, read_image
from .label import IGNORED, Label, Object, box_of, corners_of, encode_mask
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
    sized = [(object, label.size) for label in labels for object in label.objects]
    for object, size in sized:
        if not object.fault:
            _settle_object(object, *size)
    objects, usable = [o for o, _ in sized], [o for o, _ in sized if not o.fault]
    sizes = [size for object, size in sized if not object.fault]
    check.refuse_corners([o.box for o in usable], sizes, usable[0].where if usable else "")
    _settle_crowds(objects)
    if masks is None:
        counted = [o for o in usable if not o.crowd] or usable
        with_masks = sum(o.segmentation is not None for o in counted)
        masks = bool(counted) and 2 * with_masks >= len(counted)
    for object in usable:
        if not masks:
            object.segmentation = None
        elif object.segmentation is None and object.rectangle:
            object.segmentation = [corners_of(object.box)]
        elif object.segmentation is None:
            object.fault = "it has a box without an outline, unlike most objects"
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
    kept = [label for label in labels if not label.picture]
    for label in kept:
        label.size = (0, 0)  # all its objects have a fault
    opened = map_files(_open, "Opening pictures", [label.path for label in with_picture])
    for label, found in zip(with_picture, opened):
        if isinstance(found, str):
            if not skip_bad_images:
                raise UserError(f"{found} INPUT.ON_BAD_IMAGE skip leaves such pictures out.")
            notes.left_out["picture that cannot be read"].append(found)
            continue
        width, height, orientation = found
        given = check.to_numbers(label.size) or [0, 0]
        turned = given == [height, width] != [width, height] and orientation > 4
        for object in label.objects:
            if turned:
                _turn_object(object, *found)
            elif min(given) > 0 and given != [width, height]:
                object.fault = object.fault or (
                    f"its label has another size than its picture: {given[0]:.0f}x{given[1]:.0f}, "
                    f"and {label.path} has {width}x{height}"
                )
        if label.size and min(given) <= 0:
            notes.repairs["size of a picture, which is read from its file"].append(label.path)
        label.size = (width, height)
        kept.append(label)
    return kept


def _open(path: str) -> tuple[int, int, int] | str:
    """Return width, height and EXIF orientation, or why it cannot be decoded."""
    try:
        with contextlib.suppress(Exception), Image.open(path) as header, open(path, "rb") as f:
            # Decoding takes ten times as long. It fails for what has no end.
            f.seek(-2, os.SEEK_END)
            is_whole = header.format == "JPEG" and f.read() == b"\xff\xd9"
            if is_whole and math.prod(header.size) < _MANY:
                turn = header.getexif().get(_EXIF_ORIENTATION, 1)
                width, height = header.size[:: -1 if turn > 4 else 1]
                return width, height, turn
        height, width = read_image(path, "BGR").shape[:2]
        with Image.open(path) as header:
            return width, height, header.getexif().get(_EXIF_ORIENTATION, 1)
    except BadImageError as e:
        return str(e)


def _turn_object(object: Object, width: int, height: int, orientation: int) -> None:
    """Turn an object that was drawn on the stored picture as EXIF turns the picture."""
    flip_x, flip_y = orientation in (6, 7), orientation in (7, 8)

    def turn(points: list[float]) -> list[float]:
        y, x = np.reshape(points[: len(points) // 2 * 2], (-1, 2)).T
        turned = [width - x if flip_x else x, height - y if flip_y else y]
        return np.stack(turned, axis=1).ravel().tolist()

    if (box := check.to_numbers(object.box)) and len(box) == 4:
        x, y, w, h = box
        object.box = box_of(*turn([x, y, x + w, y + h]))
    if isinstance(object.segmentation, list):
        object.segmentation = [turn(check.to_numbers(p) or []) for p in object.segmentation]
    elif object.segmentation and not check.find_rle_fault(object.segmentation, height, width):
        mask = mask_util.decode(check.to_rle(object.segmentation, width, height)).T
        object.segmentation = encode_mask(mask[:: -1 if flip_y else 1, :: -1 if flip_x else 1])
    object.repairs += ("object of a picture with EXIF orientation, which is turned, too",)


def _settle_object(object: Object, width: int, height: int) -> None:
    """Make the coordinates of an object pixels and numbers, or say why it cannot be used."""
    given = object.box
    box = check.to_numbers(given)
    object.box = box if box and len(box) == 4 else None
    if object.relative:
        scale = np.array([width, height] * 2, float)
        object.box = object.box and (object.box * scale).tolist()
        object.segmentation = object.segmentation and [
            (np.reshape(p, (-1, 2)) * scale[:2]).ravel().tolist() for p in object.segmentation
        ]
    outline = _settle_segmentation(object, width, height)
    if outline is None:
        unusable = "outline that cannot be used, in place of which the box is"
        object.repairs += (unusable,) * bool(object.segmentation)
        object.segmentation = None
    elif not object.box or np.abs(np.subtract(object.box, outline)).max() > max(
        2, 0.1 * max(outline[2:])
    ):
        object.repairs += ("box, which is computed from the outline",) * (given is not None)
        object.box = outline
    if object.box is not None:
        object.fault = check.find_box_fault(object.box, width, height)
    elif given is None:
        object.fault = "it has neither an outline nor a box"
    else:
        object.fault = f"its box is not four numbers: {given!r}"
    if not object.fault and isinstance(given, (list, tuple)) and str in map(type, given):
        object.repairs += ("number that was a string",)
    if (check.to_number(object.area) or 0) <= 0:
        object.area = None
        if object.segmentation and not object.fault:
            object.area = float(mask_util.area(check.to_rle(object.segmentation, height, width)))


def _settle_segmentation(object: Object, width: int, height: int) -> list[float] | None:
    """Keep polygons and RLE that can be used, and return their box."""
    given = object.segmentation
    has_size = object.encoded and given["size"] == [height, width]
    if isinstance(given, dict) and (has_size or not check.find_rle_fault(given, width, height)):
        rle = check.to_rle(given, height, width)
        if not mask_util.area(rle):
            return None
        if isinstance(rle["counts"], bytes):
            rle["counts"] = rle["counts"].decode()
        object.segmentation, object.area = rle, float(mask_util.area(rle))
        return mask_util.toBbox(rle).tolist()
    if not isinstance(given, list):
        return None
    if given and not isinstance(given[0], (list, tuple)):
        given = [given]
        object.repairs += ("polygon without the list around it",)
    usable = [p for polygon in given if (p := check.to_numbers(polygon)) and check.is_polygon(p)]
    if not usable:
        return None
    if len(usable) < len(given):
        object.repairs += ("outline with a part that cannot be used",)
    points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in usable])
    corner, size = points.min(axis=0), np.ptp(points, axis=0)
    if not size.all():
        return None
    object.segmentation = usable
    return [*corner.tolist(), *size.tolist()]


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
    bases = Counter(_NUMBERED.sub("", name) for name in ids if _NUMBERED.search(name))
    for base in (base for base, number in bases.items() if number > 1):
        logging.getLogger(__name__).warning(
            f"{bases[base]} classes are called {base} and a number: if they are objects of one "
            "class, give them one name."
        )
    categories = [{"id": ids[name], "name": name} for name in sorted(ids, key=lambda n: ids[n])]
    splits: dict[str, Coco] = {}
    for label in (label for label in labels if label.picture):
        empty: Coco = {"images": [], "annotations": [], "categories": categories}
        coco = splits.setdefault(label.split, empty)
        number = len(coco["images"]) + 1
        size = dict(zip(("width", "height"), label.size))
        coco["images"].append({"id": number, "file_name": label.picture, **size})
        own = [o for o in label.objects if not o.fault]
        for object, name in ((o, n) for o in own for n in (ids if o.name == IGNORED else [o.name])):
            annotation = {
                "id": len(coco["annotations"]) + 1, "image_id": number,
                "category_id": ids[name], "bbox": object.box, "iscrowd": int(object.crowd),
                "area": check.to_number(object.area) or object.box[2] * object.box[3],
            }  # fmt: skip
            if object.segmentation is not None:
                annotation["segmentation"] = object.segmentation
            coco["annotations"].append(annotation)
    return splits
