"""Formats that are recognized, but cannot be read: what to export instead."""

import re

from ...utils.errors import UserError
from .tree import Tree

_TEXTS = {
    "KITTI labels": r"\w+ -?[\d.]+ -?\d -?[\d.]+( -?[\d.]+){11,12}",
    "DOTA labels with rotated boxes": r"(imagesource:.*|gsd:.*|(-?[\d.]+ ){8}[\w-]+ \d)",
}
_SUFFIXES = {
    "TFRecord files": (".tfrecord", ".record", ".tfrecords"),
    "Parquet files": (".parquet",),
    "CSV files": (".csv",),
    "archives": (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar"),
}


def explain(tree: Tree) -> None:
    """Raise :class:`UserError` if there is a format that is known but not read."""
    what = file = ""
    for name, suffixes in _SUFFIXES.items():
        if found := tree.with_suffix(*suffixes):
            what, file = name, found[0]
    for file_, content in tree.jsons.items():
        first = content[0] if isinstance(content, list) and content else content
        keys = first.keys() if isinstance(first, dict) else set()
        if {"data", "annotations"} <= keys or {"data", "predictions"} <= keys:
            what, file = "Label Studio's own JSON", file_
        elif {"objects", "size"} <= keys:
            what, file = "Supervisely's own JSON", file_
        elif "segments_info" in str(first)[:2000]:
            what, file = "COCO's panoptic annotations", file_
    for text in tree.with_suffix(".txt"):
        line = tree.head(text).decode("latin-1").partition("\n")[0].strip()
        for name, pattern in _TEXTS.items():
            if re.fullmatch(pattern, line):
                what, file = name, text
    if what:
        raise UserError(
            f"--data {tree.root} holds {what} ({file}), which cannot be read: "
            f"{'unpack them' if what == 'archives' else 'export them as COCO, YOLO or Pascal VOC'}."
        )
