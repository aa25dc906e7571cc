"""VGG Image Annotator 2: one JSON file, a project or its regions, for many pictures."""

import logging
from collections.abc import Iterator
from typing import Any

from ...utils.errors import UserError
from .label import Label, Object, ellipse, to_numbers
from .tree import Tree

_ONE_CLASS = "object"


def find(tree: Tree) -> list[str]:
    """Return the label files of this format."""
    return [f for f, content in tree.jsons.items() if _items(content)]


def _items(content: Any) -> list[dict[str, Any]]:
    """Return the pictures of a file, or an empty list if it has another format."""
    if isinstance(content, dict):
        items = content.get("_via_img_metadata", content)
        items = list(items.values()) if isinstance(items, dict) else []
        if items and all(
            isinstance(i, dict) and {"filename", "regions"} <= i.keys() for i in items
        ):
            return items
    return []


def parse(tree: Tree, file: str) -> Iterator[Label]:
    """Read the labels of a file."""
    items = _items(tree.jsons[file])
    every = [region for item in items for region in _regions(item)]
    key = _class_attribute(every)
    for index, item in enumerate(items, 1):
        name = item["filename"]
        if not isinstance(name, str) or not name:
            raise UserError(f"{tree.path(file)}: picture {index} has no name.")
        label = Label(file, name)
        for number, region in enumerate(_regions(item), 1):
            where = f"{tree.path(file)}, {name}, region {number}"
            object = Object(where, _ONE_CLASS if key is None else _value(region, key))
            try:
                _read_shape(object, _dict(region.get("shape_attributes")))
            except KeyError as e:
                object.fault = f"its shape cannot be used: it has no {e.args[0]}"
            except (TypeError, ValueError) as e:
                object.fault = f"its shape cannot be used: {e}"
            if not object.name:
                object.fault = object.fault or f"it has no {key}, which others have"
            label.objects.append(object)
        yield label


def _regions(item: dict[str, Any]) -> list[dict[str, Any]]:
    regions = item["regions"]
    regions = list(regions.values()) if isinstance(regions, dict) else regions
    return [_dict(region) for region in regions] if isinstance(regions, list) else []


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _value(region: dict[str, Any], key: str) -> str:
    value = _dict(region.get("region_attributes")).get(key)
    if isinstance(value, dict):  # a checkbox
        value = next((name for name, checked in value.items() if checked), "")
    return str(value if value is not None else "").strip()


def _class_attribute(regions: list[dict[str, Any]]) -> str | None:
    """
    Return the attribute with the fewest values of those that all regions have, or else the one that
    most regions have.
    """
    keys = dict.fromkeys(k for r in regions for k in _dict(r.get("region_attributes")))
    values = {key: [v for r in regions if (v := _value(r, key))] for key in keys}
    most = {key: own for key, own in values.items() if 2 * len(own) > len(regions)}
    found = min(most, key=lambda key: (-len(most[key]), len(set(most[key]))), default=None)
    if found and sum(len(own) == len(regions) for own in most.values()) > 1:
        logging.getLogger(__name__).warning(
            f"The regions have the attributes {', '.join(most)}: the values of {found} are taken "
            "for the classes."
        )
    return found


def _read_shape(object: Object, shape: dict[str, Any]) -> None:
    kind = shape.get("name")
    if kind in ("polygon", "polyline"):
        x, y = to_numbers(shape["all_points_x"]), to_numbers(shape["all_points_y"])
        if not x or not y or len(x) != len(y) or kind == "polyline":
            raise ValueError("it is not a polygon")
        object.segmentation = [[v for point in zip(x, y) for v in point]]
    elif kind == "rect":
        object.box = to_numbers([shape[key] for key in ("x", "y", "width", "height")])
        object.rectangle = True
    elif kind in ("circle", "ellipse"):
        keys = ("cx", "cy", "r", "r") if kind == "circle" else ("cx", "cy", "rx", "ry")
        values = to_numbers([shape[key] for key in keys])
        if values is None:
            raise ValueError("it has values that are not numbers")
        object.segmentation = [
            ellipse(values[:2], values[2], values[3], float(shape.get("theta") or 0))
        ]
    else:
        raise ValueError(f"{kind!r} is not a region")
