"""The splits that the files of a dataset list. They count more than the names of directories."""

import logging
import os
from collections import defaultdict
from collections.abc import Iterator

from ...utils.errors import UserError
from .label import Label
from .tree import Tree, read_text, split_of, stem
from .yolo_data import find_data_file

_SPLITS = {"train": "train", "val": "val", "valid": "val", "test": "test"}  # by name

_Entries = Iterator[tuple[str, str, list[str]]]  # name of a split, entry, and where it may be


def assign_splits(tree: Tree, labels: list[Label]) -> list[Label]:
    """
    Set the split of each label that has none from its file, by the lists of the dataset or the
    directories of the pictures. Return the labels without those that the lists leave out.
    """
    listed = _read_lists(tree)
    for label in labels:
        if label.split == "all" and label.picture is not None:
            found = [split for split, pictures in listed.items() if label.picture in pictures]
            label.split = found[0] if found else "" if listed else split_of(label.picture)
    left = [label.picture for label in labels if not label.split]
    if left:
        logging.getLogger(__name__).warning(
            f"{len(left)} pictures are in none of the dataset's lists of {', '.join(listed)}, and "
            f"are left out: the first is {tree.path(left[0] or '')}."
        )
    return [label for label in labels if label.split]


def _read_lists(tree: Tree) -> dict[str, set[str]]:
    """Return the pictures of each split, with val before train, or nothing without lists."""
    for entries in (_of_yaml(tree), _of_image_sets(tree), _of_darknet(tree), _of_root(tree)):
        found: dict[str, set[str]] = defaultdict(set)
        empty = []
        for name, entry, bases in entries:
            if split := _SPLITS.get(name.lower()):
                pictures = tree.find_listed(entry, bases)
                found[split] |= pictures or set()
                empty += [] if pictures else [(entry, split)]
        if found["train"] and found["train"] != found["val"]:
            break
    else:
        return {}
    for entry, split in empty:
        logging.getLogger(__name__).warning(
            f"--data {tree.root}: {entry}, listed as the split {split}, has no pictures."
        )
    for split in ("test", "val"):
        if both := found["train"] & found[split]:
            logging.getLogger(__name__).warning(
                f"--data {tree.root}: {len(both)} pictures are listed in both train and {split}: "
                "they are not trained on."
            )
    return {split: found[split] for split in ("val", "test", "train") if found[split]}


def _of_yaml(tree: Tree) -> _Entries:
    file, content = find_data_file(tree)
    base = os.path.dirname(file)
    for name in _SPLITS:
        value = content.get(name) or []
        for entry in value if isinstance(value, list) else [value]:
            if not isinstance(entry, str):
                raise UserError(f"{tree.path(file)}: {name} is {value!r}, not a path.")
            yield name, entry, [os.path.join(base, str(content.get("path") or "")), base]


def _of_image_sets(tree: Tree) -> _Entries:
    for file in tree.with_suffix(".txt"):
        if "imagesets" in file.lower().split("/")[:-2]:
            yield stem(file), file, []


def _of_darknet(tree: Tree) -> _Entries:
    for file in tree.with_suffix("obj.data"):
        for line in read_text(tree.path(file)).splitlines():
            name, _, entry = (part.strip() for part in line.partition("="))
            yield name, entry, [os.path.dirname(file)]


def _of_root(tree: Tree) -> _Entries:
    return ((stem(file), file, []) for file in tree.with_suffix(".txt") if "/" not in file)
