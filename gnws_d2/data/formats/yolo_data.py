"""A YOLO dataset's ``data.yaml``: names of classes, keypoints, splits. Or the files before it."""

import os
from typing import Any

from ...utils.errors import UserError
from ..check import to_number
from . import unreadable
from .tree import Tree, read_text

NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels", "predefined_classes.txt")


def find_data_file(tree: Tree) -> tuple[str, dict[str, Any]]:
    """Return the YAML file with names of classes and its content, or "" and an empty dict."""
    return next(((f, c) for f, c in tree.yamls.items() if c.get("names") is not None), ("", {}))


def read_classes(tree: Tree) -> dict[str, int]:
    """
    Return the number of each class, from 1, by its name. Raise :class:`UserError` if there are no
    names, or different ones in two files.
    """
    found = {
        file: _read_names(content, tree.path(file))
        for file, content in tree.yamls.items()
        if content.get("names") is not None
    }
    files = [f for f in tree.files if os.path.basename(f).lower() in NAME_FILES]
    for file in () if found else files or tree.with_suffix(".names"):
        lines = read_text(tree.path(file)).strip().splitlines()
        found[file] = {line.strip(): i for i, line in enumerate(lines, 1) if line.strip()}
    if not found:
        unreadable.explain(tree)
        raise UserError(
            f"--data {tree.root} has YOLO labels, but no names of their classes: add a data.yaml "
            "with 'names: [first, second]', or a classes.txt with a name in each line."
        )
    first = next(iter(found))
    for file, names in found.items():
        if names != found[first]:
            both = f"{tree.path(first)} and {tree.path(file)}"
            raise UserError(f"{both} have different names of classes: remove one of them.")
    return found[first]


def _read_names(content: dict[str, Any], path: str) -> dict[str, int]:
    names = content["names"]
    if isinstance(names, dict) and not any(to_number(key) is not None for key in names):
        if not all(type(v) is int for v in names.values()) or len({*names.values()}) < len(names):
            raise UserError(f"{path}: 'names' does not have a number of its own for each class.")
        names = {number: name for name, number in names.items()}
    if isinstance(names, (str, bool)):
        names = [names]
    if not isinstance(names, (dict, list)) or not names:
        raise UserError(f"{path}: 'names' is {names!r}, not a list of the names of classes.")
    found: dict[str, int] = {}
    for key, name in names.items() if isinstance(names, dict) else enumerate(names):
        number = to_number(key)
        if isinstance(name, bool):  # which YAML makes of yes and no
            name = "yes" if name else "no"
        if number is None or number % 1 or not isinstance(name, (str, int, float)):
            raise UserError(f"{path}: {key!r}: {name!r} in 'names' is not the name of a class.")
        if str(name) in found:
            raise UserError(f"{path}: two classes in 'names' are called {name!r}.")
        found[str(name)] = int(number) + 1
    count = content.get("nc", len(found))
    if to_number(count) != len(found):
        raise UserError(f"{path}: nc is {count!r}, but 'names' has {len(found)} classes.")
    return found
