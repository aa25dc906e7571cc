"""The splits that the files of a dataset list. They count more than the names of directories."""

import logging
import os
from typing import Any

from ...utils.errors import UserError
from .label import Label
from .tree import Tree, read_text, split_of
from .yolo_data import find_data_file

_NAMES = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}


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
    found: dict[str, set[str]] = {}
    for split, entries in _find_entries(tree).items():
        sets = [(entry, tree.find_listed(entry, bases)) for entry, bases in entries]
        if missing := [entry for entry, pictures in sets if not pictures]:
            logging.getLogger(__name__).warning(
                f"--data {tree.root}: {missing[0]}, listed as the split {split}, has no pictures."
            )
        if pictures := set().union(*(pictures or () for _, pictures in sets)):
            found[split] = pictures
    if found.get("val") == found.get("train"):
        found.pop("val", None)
    if not found.get("train"):
        return {}
    for split in ("test", "val"):
        if both := found["train"] & found.get(split, set()):
            logging.getLogger(__name__).warning(
                f"--data {tree.root}: {len(both)} pictures are listed in both train and {split}: "
                "they are not trained on."
            )
    return {split: found[split] for split in ("val", "test", "train") if split in found}


def _find_entries(tree: Tree) -> dict[str, list[tuple[str, list[str]]]]:
    """Return the entries of each split, and where they may be, of the first that has a train."""
    for entries in (_of_yaml(tree), _of_image_sets(tree), _of_darknet(tree), _of_root(tree)):
        found = {
            s: {p for e in own for p in tree.find_listed(*e) or ()} for s, own in entries.items()
        }
        if found.get("train") and found["train"] != found.get("val"):
            return entries
    return {}


def _of_yaml(tree: Tree) -> dict[str, list[tuple[str, list[str]]]]:
    file, content = find_data_file(tree)
    base = os.path.dirname(file)
    bases = [os.path.join(base, str(content.get("path") or "")), base]
    entries: dict[str, list[Any]] = {}
    for split, keys in _NAMES.items():
        for key in keys:
            value = content.get(key) or []
            for entry in value if isinstance(value, list) else [value]:
                if not isinstance(entry, str):
                    raise UserError(f"{tree.path(file)}: {key} is {value!r}, not a path.")
                entries.setdefault(split, []).append((entry, bases))
    return entries


def _of_image_sets(tree: Tree) -> dict[str, list[tuple[str, list[str]]]]:
    sets = [f for f in tree.with_suffix(".txt") if "imagesets" in f.lower().split("/")[:-2]]
    return _by_name(sets)


def _of_darknet(tree: Tree) -> dict[str, list[tuple[str, list[str]]]]:
    entries: dict[str, list[tuple[str, list[str]]]] = {}
    for file in tree.with_suffix("obj.data"):
        for line in read_text(tree.path(file)).splitlines():
            key, _, value = (part.strip() for part in line.partition("="))
            for split, names in _NAMES.items():
                if key.lower() in names:
                    entries.setdefault(split, []).append((value, [os.path.dirname(file)]))
    return entries


def _of_root(tree: Tree) -> dict[str, list[tuple[str, list[str]]]]:
    return _by_name([f for f in tree.with_suffix(".txt") if "/" not in f])


def _by_name(files: list[str]) -> dict[str, list[tuple[str, list[str]]]]:
    entries: dict[str, list[tuple[str, list[str]]]] = {}
    for file in files:
        name = os.path.splitext(os.path.basename(file))[0].lower()
        for split, names in _NAMES.items():
            if name in names:
                entries.setdefault(split, []).append((file, []))
    return entries
