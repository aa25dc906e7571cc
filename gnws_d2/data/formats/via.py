"""VGG Image Annotator 2: one JSON file, a project or its regions, for many pictures."""

import logging
from collections.abc import Iterator
from typing import Any

from ..check import to_numbers
from .label import Label, Object, check_name, ellipse
from .tree import Tree

_VALUES = {
    "polygon": ("all_points_x", "all_points_y"),
    "rect": ("x", "y", "width", "height"),
    "circle": ("cx", "cy", "r", "r"),
    "ellipse": ("cx", "cy", "rx", "ry"),
}


def find(tree: Tree) -> list[str]:
    """Return the label files of this format."""
    return [f for f, content in tree.jsons.items() if _items(content)]


def _items(content: Any) -> list[dict[str, Any]]:
    """Return the pictures of a file, or an empty list if it has another format."""
    items = [*_dict(_dict(content).get("_via_img_metadata", content)).values()]
    return items if all({"filename", "regions"} <= _dict(item).keys() for item in items) else []


def parse(tree: Tree, file: str) -> Iterator[Label]:
    """Read the labels of a file."""
    items = _items(tree.jsons[file])
    key = _class_attribute([own for item in items for _, own in _regions(item)])
    for index, item in enumerate(items, 1):
        label = Label(file, check_name(item["filename"], f"{tree.path(file)}: picture {index}"))
        for number, (shape, attributes) in enumerate(_regions(item), 1):
            where = f"{tree.path(file)}, {label.named}, region {number}"
            object = Object(where, "object" if key is None else _value(attributes, key))
            label.add(object, _read_shape, shape, what=f"{key}, which others have")
        yield label


def _regions(item: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the shape and the attributes of each region."""
    given = item["regions"]
    for region in map(_dict, given if isinstance(given, list) else _dict(given).values()):
        yield _dict(region.get("shape_attributes")), _dict(region.get("region_attributes"))


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _value(attributes: dict[str, Any], key: str) -> str:
    value = attributes.get(key)
    if isinstance(value, dict):  # a checkbox
        value = next((name for name, checked in value.items() if checked), None)
    return "" if value is None else str(value).strip()


def _class_attribute(every: list[dict[str, Any]]) -> str | None:
    """Return the attribute with the fewest values of those that the most, over half, have."""
    keys = dict.fromkeys(key for attributes in every for key in attributes)
    values = {key: [v for own in every if (v := _value(own, key))] for key in keys}
    most = {key: own for key, own in values.items() if 2 * len(own) > len(every)}
    found = min(most, key=lambda key: (-len(most[key]), len(set(most[key]))), default=None)
    if found and sum(len(own) == len(every) for own in most.values()) > 1:
        logging.getLogger(__name__).warning(
            f"The regions have the attributes {', '.join(most)}: the values of {found} are taken "
            "for the classes."
        )
    return found


def _read_shape(object: Object, shape: dict[str, Any]) -> None:
    kind = shape.get("name")
    keys = _VALUES.get(str(kind))
    if keys is None:
        raise ValueError(f"{kind!r} is not a region")
    if kind == "polygon":
        x, y = (to_numbers(shape.get(key)) or [] for key in keys)
        if not x or len(x) != len(y):
            raise ValueError("it is not a polygon")
        object.segmentation = [[v for point in zip(x, y) for v in point]]
    elif (values := to_numbers([shape.get(key) for key in keys])) is None:
        raise ValueError(f"its {', '.join(keys)} are not all numbers")
    elif kind == "rect":
        object.box, object.rectangle = values, True
    else:
        object.segmentation = [ellipse(*values, angle=float(shape.get("theta") or 0))]
