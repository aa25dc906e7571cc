"""Read datasets of common formats as COCO. The content of a directory tells the format."""

import math
import os
import re
from typing import Any

from ...utils.errors import UserError
from . import coco, labelme, masks, voc, yolo
from .dataset import Coco, complete_coco

__all__ = ["complete_coco", "read_dataset"]

_FORMATS: dict[str, Any] = {
    "COCO": coco,
    "YOLO": yolo,
    "Pascal VOC": voc,
    "labelme": labelme,
    "masks": masks,
}
_EXPECTED = (
    "COCO JSON (Roboflow, CVAT, FiftyOne), YOLO labels with a data.yaml, Pascal VOC XML, labelme "
    "JSON, or a directory 'images' beside a directory 'masks'"
)


def read_dataset(root: str) -> dict[str, Coco]:
    """
    Read the dataset in a directory.

    Returns:
        The content of a COCO file for each of "train" and "val", or for "all" if the dataset is
        not split. ``file_name`` is relative to `root`, and masks are polygons or RLE. Names of
        classes may differ in their ids between the splits.

    Raises:
        UserError: if the format is unknown or ambiguous, or names the file that cannot be used.
    """
    if not os.path.isdir(root):
        raise UserError(f"--data {root}: there is no such directory.")
    files = [
        os.path.relpath(os.path.join(directory, name), root)
        for directory, directories, names in os.walk(root, followlinks=True)
        for name in names
        if not name.startswith(".")
    ]
    files.sort(key=_natural)
    found = {name: own for name, format in _FORMATS.items() if (own := format.find(root, files))}
    if "COCO" in found or "YOLO" in found:  # beside which others may lie as leftovers of a tool
        found.pop("masks", None)
    if not found:
        kinds = sorted({os.path.splitext(file)[1] or file for file in files})
        what = f"{len(files)} files ({', '.join(kinds[:8])})" if files else "no files"
        raise UserError(f"--data {root} holds {what}, and none of {_EXPECTED}.")
    if len(found) > 1:
        what = " and ".join(f"{name} ({own[0]})" for name, own in found.items())
        raise UserError(f"--data {root} holds {what}: leave one of them, or use --train and --val.")
    ((name, own),) = found.items()
    return _join_splits(root, _FORMATS[name].read(root, files, own))


def _join_splits(root: str, splits: dict[str, Coco]) -> dict[str, Coco]:
    if "train" not in splits:
        if set(splits) != {"all"}:
            raise UserError(
                f"--data {root} has the splits {', '.join(splits)}: one of them has to be train, "
                "or none is named."
            )
        return splits
    if "all" in splits:
        raise UserError(
            f"--data {root}: {splits['all']['images'][0]['file_name']} is in no split, but others "
            "are in train: put all into splits, or none."
        )
    val = splits.get("val") or splits.get("test")
    return {"train": splits["train"], "val": val} if val else {"all": splits["train"]}


def _natural(name: str) -> list[Any]:
    """Sort 2 before 10."""
    return [(int(t), "") if t.isdigit() else (math.inf, t) for t in re.split(r"(\d+)", name)]
