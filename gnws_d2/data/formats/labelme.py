"""labelme: a JSON file for each image, with its shapes."""

import base64
import os
from collections import defaultdict
from typing import Any

import cv2
import numpy as np

from ...utils.errors import UserError
from .dataset import Coco, Dataset, encode_mask, read_json, split_of


def find(root: str, files: list[str]) -> list[str]:
    """Return the label files of this format among the files below `root`."""
    contents = ((f, read_json(root, f)) for f in files if f.lower().endswith(".json"))
    return [f for f, c in contents if isinstance(c, dict) and {"shapes", "imagePath"} <= c.keys()]


def read(root: str, files: list[str], own: list[str]) -> dict[str, Coco]:
    """See :func:`.read_dataset`; `own` are the files that :func:`find` returns."""
    dataset = Dataset(root)
    for file in own:
        path, content = os.path.join(root, file), read_json(root, file)
        name = str(content["imagePath"]).replace("\\", "/")
        picture = os.path.normpath(os.path.join(os.path.dirname(file), name))
        if picture not in files:
            raise UserError(f"{path} has no image: {picture} is not in {root}.")
        split = split_of(os.path.dirname(file))
        image = dataset.add_image(picture, split)
        groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for number, shape in enumerate(content["shapes"]):
            group = shape.get("group_id")  # the parts of one object
            groups[shape["label"], number if group is None else f"group {group}"].append(shape)
        for (label, _), shapes in groups.items():
            try:
                fields = _labelme_fields(shapes, image)
            except (KeyError, ValueError, TypeError) as e:
                raise UserError(f"{path}: a shape of {label!r} cannot be used: {e}.") from e
            dataset.add_object(split, image, str(label), **fields)
    return dataset.finish()


def _labelme_fields(shapes: list[dict[str, Any]], image: dict[str, Any]) -> dict[str, Any]:
    if len(shapes) == 1 and shapes[0]["shape_type"] == "rectangle":
        corners = np.array(shapes[0]["points"], float)
        return {"bbox": [*corners.min(0).tolist(), *np.ptp(corners, 0).tolist()]}
    if all(shape["shape_type"] == "mask" for shape in shapes):
        full = np.zeros((image["height"], image["width"]), np.uint8)
        for shape in shapes:
            png = np.frombuffer(base64.b64decode(shape["mask"]), np.uint8)
            mask: Any = cv2.imdecode(png, cv2.IMREAD_GRAYSCALE)
            x, y = (int(v) for v in shape["points"][0])
            full[y : y + mask.shape[0], x : x + mask.shape[1]] |= mask != 0
        return {"segmentation": encode_mask(full)}
    return {"segmentation": [_labelme_polygon(shape).ravel().tolist() for shape in shapes]}


def _labelme_polygon(shape: dict[str, Any]) -> np.ndarray:
    points = np.array(shape["points"], float)
    if shape["shape_type"] == "polygon":
        return points
    if shape["shape_type"] == "rectangle":
        (x1, y1), (x2, y2) = points
        return np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
    if shape["shape_type"] == "circle":
        angles = np.linspace(0, 2 * np.pi, 32, endpoint=False)
        radius = np.linalg.norm(points[1] - points[0])
        return points[0] + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    raise ValueError(f"{shape['shape_type']} is not a region (polygon, rectangle, circle or mask)")
