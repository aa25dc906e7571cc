"""The faults of a dataset in COCO format, before a training and for ``tools/check_dataset.py``."""

import json
import logging
import math
import os
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from detectron2.data.detection_utils import SizeMismatchError, check_image_size
from detectron2.utils.file_io import PathManager
from PIL import Image
from tqdm import tqdm

from ..utils.errors import UserError
from .dataset_mapper import read_image

_ITEMS = {"categories": "category", "images": "image", "annotations": "annotation"}

# Values from a file, in one line of a message, whatever they are.
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 200


class Fault(NamedTuple):
    """What is wrong with one item of an annotation file."""

    level: str  # "error" stops all work, "evaluation" that alone; a "note" is no fault
    kind: str  # the same for all that have it
    item: str  # "category", "image" or "annotation"
    id: Any  # None if it has none that can be used
    message: str  # a sentence, without the name of the file


def check_coco_json(
    json_file: str,
    image_root: str,
    *,
    masks: bool = False,
    evaluation: bool = False,
    skip_bad_images: bool = False,
) -> list[str]:
    """
    Check an annotation file, and that its images exist, without opening an image. What Detectron2
    clips or leaves out is a warning.

    Args:
        json_file, image_root: see :func:`register_coco_instances`.
        masks: whether every annotation needs a segmentation.
        evaluation: whether a model is evaluated on it.
        skip_bad_images: whether an image that is missing is a warning, too.

    Returns:
        The names of its classes, in the order of their ids, as Detectron2 numbers them.

    Raises:
        UserError: for the first fault. It names the file and the id of the annotation or image.
    """
    coco = read_coco_json(json_file)
    fatal = ("error", "evaluation") if evaluation else ("error",)
    firsts: dict[str, Fault] = {}
    numbers: Counter[str] = Counter()
    for fault in find_faults(coco, image_root, masks=masks):
        skipped = skip_bad_images and fault.kind == "missing image"
        if fault.level in fatal and not skipped:
            raise UserError(f"{json_file}: {fault.message}")
        if fault.level == "warning" or skipped:
            firsts.setdefault(fault.kind, fault)
            numbers[fault.kind] += 1
    for kind, first in firsts.items():
        logging.getLogger(__name__).warning(
            f"{json_file}: {numbers[kind]} x {kind}; the first: {first.message}"
        )
    names = {category["id"]: category["name"] for category in coco["categories"]}
    return [names[i] for i in sorted(names)]


def check_dataset(json_file: str, image_root: str, *, open_images: bool = True) -> list[Fault]:
    """
    Find every fault of a dataset, with progress bars. Where some annotations have a segmentation,
    all need one.

    Args:
        json_file, image_root: see :func:`register_coco_instances`.
        open_images: also read every image as in training, on all cores.

    Raises:
        UserError: if the file cannot be read, or is in another format.
    """
    coco = read_coco_json(json_file)
    masks = any(isinstance(a, dict) and a.get("segmentation") for a in coco["annotations"])
    faults = list(find_faults(coco, image_root, masks=masks, progress=True))
    if open_images:
        unusable = {f.id for f in faults if f.item == "image" and f.level == "error"}
        images = [
            {**image, "file_name": os.path.join(image_root, image["file_name"])}
            for image in coco["images"]
            if isinstance(image, dict) and _is_id(image.get("id")) and image["id"] not in unusable
        ]
        # Threads are enough: OpenCV and Pillow let go of the interpreter while they decode.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = pool.map(_find_fault_of_file, images)
            bar = tqdm(found, "Opening images", len(images))
            faults += [fault for fault in bar if fault is not None]
    return faults


def read_categories(json_file: str) -> dict[Any, str]:
    """
    Returns:
        The names of the classes of an annotation file by their ids, in the order of the ids, as
        Detectron2 numbers them.

    Raises:
        UserError: if the file cannot be read, is in another format, or for a faulty category.
    """
    categories = read_coco_json(json_file)["categories"]
    alone = {"categories": categories, "images": [], "annotations": []}
    for fault in find_faults(alone, "", masks=False):
        raise UserError(f"{json_file}: {fault.message}")
    return {c["id"]: c["name"] for c in sorted(categories, key=lambda c: c["id"])}


def read_coco_json(json_file: str) -> dict[str, Any]:
    """
    Returns:
        The content of the file, with lists under "images", "categories" and "annotations".

    Raises:
        UserError: if it cannot be read, or is in another format.
    """
    try:
        with PathManager.open(json_file) as f:
            coco = json.load(f)
    except OSError as e:
        raise UserError(f"Cannot read the annotation file {json_file}: {e.strerror or e}.") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"The annotation file {json_file} is not valid JSON: {e}.") from e
    if isinstance(coco, dict):
        coco.setdefault("annotations", [])  # as in files for testing
    for key in _ITEMS:
        if not isinstance(coco, dict) or not isinstance(coco.get(key), list):
            raise UserError(
                f"{json_file} is not in COCO's instances format: it has no list {key!r}."
            )
        if not coco[key] and key != "annotations":
            raise UserError(f"{json_file} has nothing in {key!r}.")
    return coco


def find_faults(
    coco: dict[str, Any], image_root: str, *, masks: bool, progress: bool = False
) -> Iterator[Fault]:
    """
    Find the faults that show without opening an image.

    Args:
        coco: of :func:`read_coco_json`.
        image_root: the directory that no image may be out of. Symbolic links in it are followed.
        masks: whether every annotation needs a segmentation.
        progress: whether to show progress bars.
    """
    for key, item in _ITEMS.items():
        yield from _find_id_faults(coco[key], key, item)
    categories, images, annotations = (
        [x for x in coco[key] if isinstance(x, dict)] for key in _ITEMS
    )
    for category in categories:
        if not isinstance(category.get("name"), str):
            yield _fault("category", category, "error", "no name", "has no 'name'.")
    class_ids = {category["id"] for category in categories if _is_id(category.get("id"))}

    sizes: dict[Any, tuple[int, int] | None] = {}
    for image in tqdm(images, "Images", disable=not progress):
        for found in _find_image_faults(image, image_root):
            yield _fault("image", image, *found)
        if _is_id(image.get("id")):
            sizes[image["id"]] = _size(image)

    annotated = set()
    for annotation in tqdm(annotations, "Annotations", disable=not progress):
        for found in _find_annotation_faults(annotation, sizes, class_ids, masks):
            yield _fault("annotation", annotation, *found)
        if _is_id(annotation.get("image_id")):
            annotated.add(annotation["image_id"])
    for image in images:
        if _is_id(image.get("id")) and image["id"] not in annotated:
            yield _fault(
                "image", image, "note", "image without annotations",
                "has no annotations: it is not trained on.",
            )  # fmt: skip


def _fault(item: str, content: dict[str, Any], level: str, kind: str, what: str) -> Fault:
    given = content.get("id")
    return Fault(
        level, kind, item, given if _is_id(given) else None, f"{item} id {_repr.repr(given)} {what}"
    )


def _find_id_faults(items: list[Any], key: str, item: str) -> Iterator[Fault]:
    seen = set()
    for i, content in enumerate(items):
        if not isinstance(content, dict):
            message = f"{key}[{i}] is {_repr.repr(content)}, which is no {item}."
            yield Fault("error", "no object", item, None, message)
        elif not _is_id(content.get("id")):
            message = f"{key}[{i}] has the id {_repr.repr(content.get('id'))}: give it a number."
            yield Fault("error", "no id", item, None, message)
        elif content["id"] in seen:
            yield _fault(item, content, "error", f"duplicate {item} id", "is there twice.")
        else:
            seen.add(content["id"])
    if any(isinstance(i, str) for i in seen) and not all(isinstance(i, str) for i in seen):
        message = f"'{key}' has ids that are numbers and ids that are strings: use one of them."
        yield Fault("error", "ids of two types", item, None, message)


_Found = tuple[str, str, str]  # level, kind, and the message after the id


def _find_image_faults(image: dict[str, Any], image_root: str) -> Iterator[_Found]:
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        yield "error", "no file name", f"has the file name {_repr.repr(name)}."
    elif os.path.isabs(name) or "://" in name or os.path.normpath(name).split(os.sep)[0] == "..":
        yield (
            "error",
            "path out of the image directory",
            f"has the file name {_repr.repr(name)}, which is not in the image directory.",
        )
    elif not PathManager.isfile(path := os.path.join(image_root, name)):
        yield "error", "missing image", f"has a file that does not exist: {_repr.repr(path)}."
    size = _size(image)
    if size is None:
        given = f"{_repr.repr(image.get('width'))} x {_repr.repr(image.get('height'))}"
        yield "error", "image size", f"has the size {given}, which is not in pixels."
    elif size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or math.inf):
        yield (
            "error",
            "image size",
            f"has {size[0]} x {size[1]} pixels, more than the {Image.MAX_IMAGE_PIXELS} of "
            "PIL.Image.MAX_IMAGE_PIXELS: tile it, or raise the limit.",
        )


def _find_fault_of_file(image: dict[str, Any]) -> Fault | None:
    try:
        check_image_size(image, read_image(image["file_name"], "BGR"))
    except UserError as e:
        return _fault("image", image, "error", "unreadable image", f"cannot be used: {e}")
    except SizeMismatchError:
        return _fault(
            "image", image, "error", "another image size",
            f"is not of {image['width']} x {image['height']} pixels, as the annotation file says: "
            f"{image['file_name']}.",
        )  # fmt: skip
    return None


def _find_annotation_faults(
    annotation: dict[str, Any],
    sizes: dict[Any, tuple[int, int] | None],
    class_ids: set[Any],
    masks: bool,
) -> Iterator[_Found]:
    image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
    if not _is_id(image_id) or image_id not in sizes:
        what = f"is of image id {_repr.repr(image_id)}, which is not in 'images'."
        yield "error", "annotation without image", what
        size = None
    else:
        size = sizes[image_id]
    if not _is_id(category_id) or category_id not in class_ids:
        what = f"has category id {_repr.repr(category_id)}, which is not in 'categories'."
        yield "error", "unknown category", what
    if annotation.get("ignore", 0) != 0:
        yield "error", "'ignore'", "has 'ignore', which Detectron2 does not know: remove it."
    if annotation.get("iscrowd", 0) not in (0, 1):
        given = _repr.repr(annotation["iscrowd"])
        yield "error", "'iscrowd'", f"has the 'iscrowd' {given}, which is not 0 or 1."
    if "iscrowd" not in annotation or not _are_numbers([annotation.get("area")]):
        what = "has no 'iscrowd' or no 'area', which COCO's evaluation needs."
        yield "evaluation", "no 'iscrowd' or 'area'", what
    keypoints = annotation.get("keypoints")
    if keypoints and not (_are_numbers(keypoints) and len(keypoints) % 3 == 0):
        yield "error", "'keypoints'", "has 'keypoints' that are not x, y and visibility in turns."

    if "bbox" not in annotation:
        yield "error", "no box", "has no 'bbox'."
    else:
        yield from _find_box_faults(annotation["bbox"], image_id, size)
    segmentation = annotation.get("segmentation")
    if not segmentation:
        if masks:
            what = "has no 'segmentation', which masks are learned from (set MODEL.MASK_ON False)."
            yield "error", "no segmentation", what
    elif isinstance(segmentation, list):
        yield from _find_polygon_faults(segmentation, size, masks)
    elif isinstance(segmentation, dict):
        yield from _find_rle_faults(segmentation, size)
    else:
        what = f"has the segmentation {_repr.repr(segmentation)}: give polygons or RLE."
        yield "error", "segmentation", what


def _find_box_faults(bbox: Any, image_id: Any, size: tuple[int, int] | None) -> Iterator[_Found]:
    if not _are_numbers(bbox) or len(bbox) != 4:
        what = f"has the box {_repr.repr(bbox)}, which is not four finite numbers."
        yield "error", "box", what
        return
    if size is None:
        return
    x, y, w, h = bbox
    width, height = size
    x1, x2, y1, y2 = min(x, x + w), max(x, x + w), min(y, y + h), max(y, y + h)
    # Far away is out of what tensors and pycocotools can hold, too.
    if x1 < -width or y1 < -height or x2 > 2 * width or y2 > 2 * height:
        kind, how = "box outside its image", "is outside or far over the edge of"
    elif w <= 0 or h <= 0:
        kind, how = "box with no area", "has no area and is not trained on, in"
    elif x >= width or y >= height or x2 <= 0 or y2 <= 0:
        kind, how = "box outside its image", "is outside"
    elif x < -1 or y < -1 or x2 > width + 1 or y2 > height + 1:
        kind, how = "box over the edge of its image", "is clipped, as it reaches over the edge of"
    else:
        return
    what = f"has the box {bbox} (x, y, width, height), which {how} its image id "
    what += f"{_repr.repr(image_id)} of {width}x{height}."
    yield "error" if kind == "box outside its image" else "warning", kind, what


def _find_polygon_faults(
    polygons: list[Any], size: tuple[int, int] | None, masks: bool
) -> Iterator[_Found]:
    for polygon in polygons:
        if not _are_numbers(polygon):
            what = f"has the polygon {_repr.repr(polygon)}, which is not a list of finite numbers."
            yield "error", "polygon", what
        elif len(polygon) < 6 or len(polygon) % 2:
            # Detectron2 leaves it out, while pycocotools, in evaluation, takes it for a box.
            what = f"has the polygon {_repr.repr(polygon)}, which has not three points or more."
            yield "evaluation" if masks else "warning", "polygon without three points", what
        elif size and not (-max(size) <= min(polygon) <= max(polygon) <= 2 * max(size)):
            what = "has a polygon far over the edge of its image of {}x{}.".format(*size)
            yield "error", "polygon outside its image", what


def _find_rle_faults(rle: dict[str, Any], size: tuple[int, int] | None) -> Iterator[_Found]:
    if size is None:
        return
    width, height = size
    given, counts = rle.get("size"), rle.get("counts")
    if given != [height, width]:
        what = f"has RLE of the size {_repr.repr(given)} (height, width), but its image [{height}, "
        yield "error", "RLE of another size", f"{what}{width}]."
        return
    try:
        total = sum(_rle_counts(counts))
    except ValueError as e:
        yield "error", "broken RLE", f"has RLE {_repr.repr(counts)}, {e}."
        return
    if total != height * width:
        what = f"has RLE that counts {total} pixels, not {height} x {width}."
        yield "error", "broken RLE", what


def _rle_counts(counts: Any) -> Iterable[int]:
    """
    The lengths of the runs, which pycocotools checks in part: of some strings that are not whole it
    makes masks of whatever was in the memory.
    """
    if isinstance(counts, list):
        if not {int}.issuperset(map(type, counts)) or min(counts, default=0) < 0:
            raise ValueError("which is not the lengths of its runs")
        return counts
    if not isinstance(counts, str) or not counts.isascii():
        raise ValueError("which is not the lengths of its runs or their string")
    # Numbers of 5 bits a character, the lowest first, with a bit that says whether it goes on. From
    # the fourth on they are differences to the one before the last. See rleFrString of pycocotools.
    chars = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(chars & 32 == 0)
    if not len(ends) or chars.min() < 0 or chars.max() > 63 or ends[-1] != len(chars) - 1:
        raise ValueError("which is not whole")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends + 1 - starts
    if lengths.max() > 7:
        raise ValueError("which has runs that no image has")
    shifts = 5 * (np.arange(len(chars)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((chars & 31) << shifts, starts)
    runs[chars[ends] & 16 != 0] -= 1 << 5 * lengths[chars[ends] & 16 != 0]
    for first in (1, 2):
        runs[first::2] = runs[first::2].cumsum()
    if runs.min() < 0:
        raise ValueError("which has a run of negative length")
    return runs.tolist()


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    """Width and height, if they can be that."""
    sides: list[Any] = [image.get("width"), image.get("height")]
    if not _are_numbers(sides) or any(side < 1 or side != int(side) for side in sides):
        return None
    return int(sides[0]), int(sides[1])


def _is_id(value: Any) -> bool:
    return type(value) in (int, str) or (type(value) is float and math.isfinite(value))


def _are_numbers(values: Any) -> bool:
    """Whether it is a list of finite numbers, of which bool is none."""
    try:
        return (
            isinstance(values, list)
            and {int, float}.issuperset(map(type, values))
            and all(map(math.isfinite, values))
        )
    except OverflowError:  # of an int beyond all floats
        return False
