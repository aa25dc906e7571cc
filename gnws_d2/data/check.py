"""Read a dataset in COCO format, and find its issues."""

import contextlib
import itertools
import json
import math
import os
import reprlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import orjson
import pycocotools.mask as mask_util
from detectron2.data.detection_utils import SizeMismatchError, check_image_size
from detectron2.utils.file_io import PathManager
from PIL import Image
from tqdm import tqdm

from ..utils.errors import UserError
from ..utils.process import no_garbage_collection, num_usable_cores
from .dataset_mapper import BadImageError, read_image

_ITEMS = {"categories": "category", "images": "image", "annotations": "annotation"}

_NUMBERS = {int, float}
_Found = tuple[str, str, str]  # level, kind, and the message after the id

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


def read_coco_json(json_file: str) -> dict[str, Any]:
    """
    Read an annotation file, with lists of dicts in "images", "categories" and "annotations".

    Raises:
        UserError: if it cannot be read or has another format.
    """
    try:
        with PathManager.open(json_file, "rb") as f:
            text = f.read()
        with no_garbage_collection():
            try:
                content = orjson.loads(text)
            except ValueError:  # Python's reader takes NaN, and its errors tell more
                content = json.loads(text)
    except OSError as e:
        raise UserError(f"Cannot read the annotation file {json_file}: {e.strerror or e}.") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"The annotation file {json_file} is not valid JSON: {e}.") from e
    # Sets for testing have no annotations.
    coco = {"annotations": [], **content} if isinstance(content, dict) else {}
    for key in _ITEMS:
        items = coco.get(key)
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise UserError(f"{json_file} is not in COCO's instances format: no list {key!r}.")
        if not items and key != "annotations":
            raise UserError(f"{json_file} has nothing in {key!r}.")
    return coco


def find_issues(coco: dict[str, Any], image_root: str, *, masks: bool) -> Iterator[Issue]:
    """
    Find the issues that show without opening an image.

    Args:
        coco: what :func:`read_coco_json` returns.
        image_root: directory of the images. Symbolic links in it are followed.
        masks: whether every annotation needs a segmentation.
    """
    for key, item in _ITEMS.items():
        yield from _find_id_issues(coco[key], item)
    for category in coco["categories"]:
        name = category.get("name")
        # Detectron2 prints the names, and a terminal obeys control characters.
        if not isinstance(name, str) or not name.isprintable():
            what = f"has the name {_short(name)}, which is not printable text."
            yield _issue("category", category, "error", "category name", what)
    is_file = _list_files(image_root)
    for image in coco["images"]:
        for found in _find_image_issues(image, image_root, is_file):
            yield _issue("image", image, *found)
    sizes = _sizes(coco)
    class_ids = {_key(category.get("id")) for category in coco["categories"]}
    for annotation in coco["annotations"]:
        for found in _find_annotation_issues(annotation, sizes, class_ids, masks):
            yield _issue("annotation", annotation, *found)


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
        bad = {str(issue.id) for issue in issues if (issue.item, issue.level) == ("image", "error")}
        images = [
            {**image, "file_name": os.path.join(image_root, image["file_name"])}
            for image in coco["images"]
            if str(image.get("id")) not in bad
        ]
        # OpenCV and Pillow release the GIL while they decode.
        with ThreadPoolExecutor(num_usable_cores()) as pool:
            found = tqdm(pool.map(_find_file_issues, images), "Opening images", len(images))
            issues += itertools.chain(*found)
    return issues


def boxes_are_corners(coco: dict[str, Any]) -> bool:
    """Return whether many boxes fit into their images as x1, y1, x2, y2, but not as COCO's."""
    sizes = _sizes(coco)
    num_over = num_boxes = 0
    for annotation in coco["annotations"]:
        box, size = annotation.get("bbox"), sizes.get(_key(annotation.get("image_id")))
        if size is None or not _are_numbers(box) or len(box) != 4:
            continue
        if box[0] > box[2] or box[1] > box[3] or box[2] > size[0] + 1 or box[3] > size[1] + 1:
            return False
        num_boxes += 1
        num_over += box[0] + box[2] > size[0] + 1 or box[1] + box[3] > size[1] + 1
    return num_over > 0.2 * num_boxes


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
        seen.add(_key(given))


def _find_image_issues(
    image: dict[str, Any], image_root: str, is_file: Callable[[str], bool]
) -> Iterator[_Found]:
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        yield "error", "no file name", f"has the file name {_short(name)}."
    elif os.path.isabs(name) or "://" in name or (".." in name and _is_above(name)):
        what = f"has the file name {_short(name)}, which is not in the image directory."
        yield "error", "path out of the image directory", what
    elif not is_file(name):
        path = os.path.join(image_root, name)
        what = f"has a file that does not exist or is not a regular file: {_short(path)}."
        yield "error", "missing image", what
    if _size(image) is None:
        what = f"has the size {_short(image.get('width'))} x {_short(image.get('height'))}, which "
        what += "is not in pixels, or larger than PIL.Image.MAX_IMAGE_PIXELS."
        yield "error", "image size", what


def _is_above(name: str) -> bool:
    return os.path.normpath(name).split(os.sep)[0] == ".."


def _list_files(image_root: str) -> Callable[[str], bool]:
    """Return a function of a name: whether it is a file in `image_root`."""
    # Each directory is listed once: one request for each file takes minutes on network disks.
    listed: dict[str, set[str]] = {}

    def is_file(name: str) -> bool:
        directory, base = os.path.split(name)
        if directory not in listed:
            path, listed[directory] = os.path.join(image_root, directory), set()
            with contextlib.suppress(OSError, ValueError), os.scandir(path) as entries:
                listed[directory] = {entry.name for entry in entries if entry.is_file()}
        return base in listed[directory] or PathManager.isfile(os.path.join(image_root, name))

    return is_file


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
    if _key(category_id) not in class_ids:
        what = f"has category id {_short(category_id)}, which is not in 'categories'."
        yield "error", "unknown category", what
    if annotation.get("ignore", 0) != 0:
        yield "error", "'ignore'", "has 'ignore', which Detectron2 does not support: remove it."
    if "iscrowd" not in annotation or not _are_numbers((annotation.get("area"),)):
        what = "has no 'iscrowd' or no 'area', which COCO's evaluation needs."
        yield "evaluation", "no 'iscrowd' or 'area'", what
    if _key(image_id) not in sizes:
        what = f"is of image id {_short(image_id)}, which is not in 'images'."
        yield "error", "annotation without image", what
    size = sizes.get(_key(image_id))
    if size is None:
        return  # an error of the image, too

    width, height = size
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


def _sizes(coco: dict[str, Any]) -> dict[Any, tuple[Any, Any] | None]:
    return {_key(image.get("id")): _size(image) for image in coco["images"]}


def _size(image: dict[str, Any]) -> tuple[Any, Any] | None:
    """Return the width and height of an image if it can have them."""
    size: Any = image.get("width"), image.get("height")
    w, h = size
    whole = _are_numbers(size) and min(size) >= 1 and w % 1 == h % 1 == 0
    return size if whole and w * h <= (Image.MAX_IMAGE_PIXELS or math.inf) else None


def _key(id: Any) -> Any:
    """Return an id, or None for a list or dict, which cannot be looked up."""
    return id if id.__hash__ else None


def _are_numbers(values: Any) -> bool:
    """Return True for finite ints or floats (not bools) in a list or tuple."""
    if not isinstance(values, (list, tuple)) or not _NUMBERS.issuperset(map(type, values)):
        return False
    try:
        return all(map(math.isfinite, values))
    except OverflowError:  # an int that is larger than any float
        return False
