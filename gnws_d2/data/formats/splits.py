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
    if left := [label for label in labels if not label.split]:
        logging.getLogger(__name__).warning(
            f"{len(left)} pictures are in none of the dataset's lists of {', '.join(listed)}, and "
            f"are left out: the first is {left[0].path}."
        )
    return [label for label in labels if label.split]


def _read_lists(tree: Tree) -> dict[str, set[str]]:
    """Return the pictures of each split, with val before train, or nothing without lists."""
    for entries in _find_lists(tree):
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


def _find_lists(tree: Tree) -> Iterator[list[tuple[str, str, list[str]]]]:
    """Return the entries of each kind of list: name of a split, entry, and where it may be."""
    file, content = find_data_file(tree)
    base, entries = os.path.dirname(file), []
    path = os.path.join(base, str(content.get("path") or ""))
    for name in _SPLITS:
        value = content.get(name) or []
        for entry in value if isinstance(value, list) else [value]:
            if not isinstance(entry, str):
                raise UserError(f"{tree.path(file)}: {name} is {value!r}, not a path.")
            entries.append((name, entry, [path, base]))
    yield entries
    texts = tree.with_suffix(".txt")
    yield [(stem(f), f, []) for f in texts if "imagesets" in f.lower().split("/")[:-2]]
    darknet = []
    for file in tree.with_suffix("obj.data"):
        for line in read_text(tree.path(file)).splitlines():
            name, _, entry = (part.strip() for part in line.partition("="))
            darknet.append((name, entry, [os.path.dirname(file)]))
    yield darknet
    yield [(stem(f), f, []) for f in texts if "/" not in f]
