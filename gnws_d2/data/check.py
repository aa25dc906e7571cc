"""Checks of a dataset in COCO format, before training and for ``tools/check_dataset.py``."""

import itertools
import logging
import math
import os
import reprlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pycocotools.mask as mask_util
from detectron2.data.detection_utils import SizeMismatchError, check_image_size
from detectron2.utils.file_io import PathManager
from PIL import Image
from tqdm import tqdm

from ..utils.errors import UserError
from ..utils.process import num_usable_cores
from .coco_json import COCO_ITEMS, read_coco_json
from .dataset_mapper import BadImageError, read_image
from .screening import screen_annotations, screen_images

# Shorten values from a file to fit in a message.
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 200
_short = _repr.repr


class Issue(NamedTuple):
    """A problem with one item of an annotation file."""

    level: str  # "error", "evaluation" (an error in evaluation only) or "warning"
    kind: str  # the same words for all issues of a kind
    item: str  # "category", "image" or "annotation"
    id: Any  # of the item, None if it has none
    message: str  # a sentence, without the name of the file


def check_coco_json(
    json_file: str,
    image_root: str,
    *,
    masks: bool = False,
    evaluation: bool = False,
    skip_bad_images: bool = False,
    object_limits: Mapping[str, int] = {},
    keep: bool = False,
) -> list[str]:
    """
    Check an annotation file, and that its images exist, without opening them. Log a warning for
    what Detectron2 clips or leaves out.

    Args:
        json_file, image_root: see :func:`register_coco_instances`.
        masks: whether every annotation needs a segmentation.
        evaluation: whether a model is evaluated on the dataset.
        skip_bad_images: whether a missing image is only a warning.
        object_limits: by config key, the number of objects in an image that the model can find.
            More of them are a warning.
        keep: see :func:`read_coco_json`.

    Returns:
        The class names in the order of their ids, as Detectron2 numbers them.

    Raises:
        UserError: for the first error, with the file and the id of the annotation or image.
    """
    coco = read_coco_json(json_file, keep=keep)
    if _boxes_are_corners(coco):
        raise UserError(
            f"{json_file}: the boxes seem to be x1, y1, x2, y2, as none would be over the edge of "
            "its image: convert them to COCO's x, y, width, height, as which many are."
        )
    warnings = defaultdict(list)
    for issue in find_issues(coco, image_root, masks=masks):
        skipped = skip_bad_images and issue.kind == "missing image"
        if issue.level == "warning" or skipped:
            warnings[issue.kind].append(issue.message)
        elif issue.level == "error" or evaluation:
            raise UserError(f"{json_file}: {issue.message}")
    counts = Counter(annotation["image_id"] for annotation in coco["annotations"])
    most = max(counts.values(), default=0)
    if low := [key for key, limit in object_limits.items() if limit < most]:
        message = f"one of {most} objects; raise {', '.join(low)}."
        warnings["image with more objects than the model can find"].append(message)
    for kind, messages in warnings.items():
        logging.getLogger(__name__).warning(
            f"{json_file}: {len(messages)} x {kind}; the first: {messages[0]}"
        )
    return [c["name"] for c in sorted(coco["categories"], key=lambda c: c["id"])]


def check_dataset(json_file: str, image_root: str, *, open_images: bool = True) -> list[Issue]:
    """
    Find all issues of a dataset, with progress bars. If any annotation has a segmentation, all
    need one. With `open_images` also read every image as in training, on all cores.

    Raises:
        UserError: see :func:`read_coco_json`.
    """
    coco = read_coco_json(json_file)
    masks = any(annotation.get("segmentation") for annotation in coco["annotations"])
    issues = list(find_issues(coco, image_root, masks=masks))
    if open_images:
        unusable = {issue.id for issue in issues if (issue.item, issue.level) == ("image", "error")}
        images = [
            {**image, "file_name": os.path.join(image_root, image["file_name"])}
            for image in coco["images"]
            if image.get("id") not in unusable
        ]
        # OpenCV and Pillow release the GIL while they decode.
        with ThreadPoolExecutor(num_usable_cores()) as pool:
            found = tqdm(pool.map(_find_file_issues, images), "Opening images", len(images))
            issues += itertools.chain(*found)
    return issues


def read_categories(json_file: str) -> dict[Any, str]:
    """
    Read the class names of an annotation file by category id, in Detectron2's order.

    Raises:
        UserError: for a faulty category; see :func:`read_coco_json`, too.
    """
    coco = {"images": [], "annotations": [], "categories": read_coco_json(json_file)["categories"]}
    for issue in find_issues(coco, "", masks=False):
        raise UserError(f"{json_file}: {issue.message}")
    return {c["id"]: c["name"] for c in sorted(coco["categories"], key=lambda c: c["id"])}


def find_issues(coco: dict[str, Any], image_root: str, *, masks: bool) -> Iterator[Issue]:
    """
    Find the issues that show without opening an image.

    Args:
        coco: what :func:`read_coco_json` returns.
        image_root: directory of the images. Symbolic links in it are followed.
        masks: whether every annotation needs a segmentation.
    """
    for key, item in COCO_ITEMS.items():
        yield from _find_id_issues(coco[key], item)
    for category in coco["categories"]:
        name = category.get("name")
        # Detectron2 prints the names, and a terminal obeys control characters.
        if not isinstance(name, str) or not name.isprintable():
            what = f"has the name {_short(name)}, which is not printable text."
            yield _issue("category", category, "error", "category name", what)
    images, of_images = coco["images"], [_size(image) for image in coco["images"]]
    sizes = dict(zip((image.get("id") for image in images), of_images))
    for image in images if None in of_images else screen_images(images, image_root):
        for found in _find_image_issues(image, image_root):
            yield _issue("image", image, *found)
    class_ids = {category.get("id") for category in coco["categories"]}
    for annotation in screen_annotations(coco["annotations"], sizes, class_ids, masks):
        for found in _find_annotation_issues(annotation, sizes, class_ids, masks):
            yield _issue("annotation", annotation, *found)


_Found = tuple[str, str, str]  # level, kind, and the message after the id


def _issue(item: str, content: dict[str, Any], level: str, kind: str, what: str) -> Issue:
    message = f"{item} id {_short(content.get('id'))} {what}"
    return Issue(level, kind, item, content.get("id"), message)


def _find_id_issues(contents: list[dict[str, Any]], item: str) -> Iterator[Issue]:
    ids = [content.get("id") for content in contents]
    if {int}.issuperset(map(type, ids)) and len(set(ids)) == len(ids):
        return
    seen: set[Any] = set()
    type_ = str if contents and isinstance(contents[0].get("id"), str) else (int, float)
    for content in contents:
        given = content.get("id")
        if not isinstance(given, type_):
            what = "is not a number (or all of them strings)."
            yield _issue(item, content, "error", "no id", what)
        elif given in seen:
            yield _issue(item, content, "error", f"duplicate {item} id", "is there twice.")
        seen.add(given)


def _find_image_issues(image: dict[str, Any], image_root: str) -> Iterator[_Found]:
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        yield "error", "no file name", f"has the file name {_short(name)}."
    elif os.path.isabs(name) or "://" in name or os.path.normpath(name).split(os.sep)[0] == "..":
        what = f"has the file name {_short(name)}, which is not in the image directory."
        yield "error", "path out of the image directory", what
    elif not PathManager.isfile(path := os.path.join(image_root, name)):
        what = f"has a file that does not exist or is not a regular file: {_short(path)}."
        yield "error", "missing image", what
    if _size(image) is None:
        what = f"has the size {_short(image.get('width'))} x {_short(image.get('height'))}, which "
        what += "is not in pixels, or larger than PIL.Image.MAX_IMAGE_PIXELS."
        yield "error", "image size", what


def _find_file_issues(image: dict[str, Any]) -> list[Issue]:
    try:
        check_image_size(image, read_image(image["file_name"], "BGR"))
        return []
    except (BadImageError, SizeMismatchError) as e:
        kind = "unreadable image" if isinstance(e, BadImageError) else "another image size"
        return [_issue("image", image, "error", kind, f"cannot be used: {e}")]


def _find_annotation_issues(
    annotation: dict[str, Any], sizes: dict[Any, Any], class_ids: set[Any], masks: bool
) -> Iterator[_Found]:
    image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
    if category_id not in class_ids:
        what = f"has category id {_short(category_id)}, which is not in 'categories'."
        yield "error", "unknown category", what
    if annotation.get("ignore", 0) != 0:
        yield "error", "'ignore'", "has 'ignore', which Detectron2 does not support: remove it."
    if "iscrowd" not in annotation or not _are_numbers([annotation.get("area")]):
        what = "has no 'iscrowd' or no 'area', which COCO's evaluation needs."
        yield "evaluation", "no 'iscrowd' or 'area'", what
    if image_id not in sizes:
        what = f"is of image id {_short(image_id)}, which is not in 'images'."
        yield "error", "annotation without image", what
    if sizes.get(image_id) is None:
        return  # an error of the image, too

    size = width, height = sizes[image_id]
    bbox: Any = annotation.get("bbox")
    segmentation = annotation.get("segmentation")
    if not _are_numbers(bbox) or len(bbox) != 4:
        yield "error", "box", f"has the box {_short(bbox)}, which is not four finite numbers."
    else:
        for level, kind, how in _find_box_issues(bbox, *size):
            what = f"has the box {bbox} (x, y, width, height), which {how} its image id "
            yield level, kind, what + f"{_short(image_id)} of {width}x{height}."
    if segmentation and isinstance(segmentation, list):
        for polygon in segmentation:
            yield from _find_polygon_issues(polygon, masks, *size)
    elif segmentation and isinstance(segmentation, dict):
        yield from _find_rle_issues(segmentation, *size)
    elif segmentation or masks:
        what = f"has the segmentation {_short(segmentation)}: give polygons or RLE, or set "
        yield "error", "no segmentation", what + "MODEL.MASK_ON False to train boxes only."


def _find_box_issues(bbox: list[float], width: int, height: int) -> Iterator[_Found]:
    x, y, w, h = bbox
    x2, y2 = x + w, y + h
    if w <= 0 or h <= 0:
        yield "warning", "box with no area", "has no area and is not trained on, in"
    elif not (-width <= x < width and 0 < x2 <= 2 * width) or not (
        -height <= y < height and 0 < y2 <= 2 * height
    ):
        yield "error", "box outside its image", "is outside or far over the edge of"
    elif x < -1 or y < -1 or x2 > width + 1 or y2 > height + 1:
        yield "warning", "box over the edge of its image", "is clipped to"


def _find_polygon_issues(polygon: Any, masks: bool, width: int, height: int) -> Iterator[_Found]:
    longer = max(width, height)
    if not _are_numbers(polygon):
        what = f"has the polygon {_short(polygon)}, which is not a list of finite numbers."
        yield "error", "polygon", what
    elif len(polygon) < 6 or len(polygon) % 2:
        # Detectron2 leaves it out, but pycocotools takes it for a box in evaluation.
        what = f"has the polygon {_short(polygon)}, which has fewer than three points."
        yield "evaluation" if masks else "warning", "polygon without three points", what
    elif min(polygon) < -longer or max(polygon) > 2 * longer:
        what = f"has a polygon far over the edge of its image of {width}x{height}."
        yield "error", "polygon outside its image", what


def _find_rle_issues(rle: dict[str, Any], width: int, height: int) -> Iterator[_Found]:
    given, counts = rle.get("size"), rle.get("counts")
    if given != [height, width]:
        what = f"has RLE of the size {_short(given)} (height, width), but its image "
        yield "error", "RLE of another size", f"{what}[{height}, {width}]."
        return
    try:
        # pycocotools would read past the end of a string that stops within a number.
        if not counts or (isinstance(counts, str) and ord(counts[-1]) - 48 & 32):
            raise ValueError("it is not complete")
        if isinstance(counts, list):
            rle = mask_util.frPyObjects(rle, height, width)
        mask_util.decode(rle)
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        yield "error", "broken RLE", f"has RLE {_short(counts)} that cannot be decoded: {e}."


def _boxes_are_corners(coco: dict[str, Any]) -> bool:
    """Return whether many boxes fit into their images as x1, y1, x2, y2, but not as COCO's."""
    sizes = {image.get("id"): _size(image) for image in coco["images"]}
    num_over = num_boxes = 0
    for annotation in coco["annotations"]:
        box, size = annotation.get("bbox"), sizes.get(annotation.get("image_id"))
        if size is None or not _are_numbers(box) or len(box) != 4:
            continue
        if box[0] > box[2] or box[1] > box[3] or box[2] > size[0] + 1 or box[3] > size[1] + 1:
            return False
        num_boxes += 1
        num_over += box[0] + box[2] > size[0] + 1 or box[1] + box[3] > size[1] + 1
    return num_over > 0.2 * num_boxes


def _size(image: dict[str, Any]) -> tuple[Any, Any] | None:
    """Return the width and height of an image if it can have them."""
    w, h = image.get("width", 0), image.get("height", 0)
    whole = _are_numbers([w, h]) and min(w, h) >= 1 and w % 1 == h % 1 == 0
    return (w, h) if whole and w * h <= (Image.MAX_IMAGE_PIXELS or math.inf) else None


def _are_numbers(values: Any) -> bool:
    """Return True for a list of finite ints or floats (not bools)."""
    return (
        isinstance(values, list)
        and {int, float}.issuperset(map(type, values))
        and all(map(math.isfinite, values))
    )
