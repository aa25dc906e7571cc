"""A page with pictures of a dataset and their objects, to look at before training."""

import base64
import html
import os
from collections import Counter
from typing import Any

import cv2
import numpy as np

from ..data.dataset_mapper import read_image
from ..data.formats import Coco
from ..prediction.drawing import class_color, draw_objects
from ..utils.files import atomic_write

_NUM_PICTURES = 16
_STYLE = """body { font: 15px sans-serif; margin: 2em auto; max-width: 1000px; }
td, th { padding: 2px 12px; text-align: right } td:first-child { text-align: left }
figure { display: inline-block; margin: 6px; vertical-align: top } figcaption { font-size: 12px }"""


def write_preview(path: str, splits: dict[str, Coco], roots: list[str], notes: list[str]) -> None:
    """
    Write an HTML page, which needs no other file.

    Args:
        path: the file to write.
        splits: the COCO dict of each split, with the same categories.
        roots: the image directory of each split.
        notes: what was repaired and left out.
    """
    names = {c["id"]: c["name"] for coco in splits.values() for c in coco["categories"]}
    parts = [f"<!doctype html><meta charset=utf-8><title>Dataset</title><style>{_STYLE}</style>"]
    parts += ["<h1>Dataset</h1>", _table(splits, names)]
    parts += [f"<p>{html.escape(note)}</p>" for note in notes]
    for (split, coco), root in zip(splits.items(), roots):
        parts.append(f"<h2>{split}</h2>")
        of_image: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in coco["images"]}
        for annotation in coco["annotations"]:
            of_image[annotation["image_id"]].append(annotation)
        # Spread over the dataset, with objects first.
        images = sorted(coco["images"], key=lambda image: not of_image[image["id"]])
        number = min(_NUM_PICTURES // len(splits), len(images))
        for index in np.linspace(0, len(images) - 1, number).round().astype(int):
            image = images[index]
            parts.append(_figure(root, image, of_image[image["id"]], names))
    with atomic_write(path) as f:
        f.write("\n".join(parts))


def _table(splits: dict[str, Coco], names: dict[int, str]) -> str:
    cocos = list(splits.values())
    counts = [Counter(a["category_id"] for a in coco["annotations"]) for coco in cocos]
    images = [[[i["width"], i["height"]] for i in coco["images"]] for coco in cocos]
    boxes = [[a["bbox"][2:] for a in coco["annotations"]] for coco in cocos]
    rows: list[list[Any]] = [
        ["", *splits],
        ["images", *map(len, images)],
        *([name, *(count[id] for count in counts)] for id, name in names.items()),
        ["median size of images", *map(_median, images)],
        ["median size of objects", *map(_median, boxes)],
    ]
    cells = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _median(sizes: list[list[float]]) -> str:
    width, height = np.median(sizes, axis=0)
    return f"{width:.0f} x {height:.0f}"


def _figure(
    root: str, image: dict[str, Any], objects: list[dict[str, Any]], names: dict[int, str]
) -> str:
    picture = read_image(os.path.join(root, image["file_name"]), "RGB")
    ids = list(names)
    drawn = draw_objects(
        picture,
        objects,
        [names[o["category_id"]] + (" (crowd)" if o["iscrowd"] else "") for o in objects],
        [class_color(ids.index(o["category_id"])) for o in objects],
        masks=all("segmentation" in o for o in objects),
    )
    _, jpeg = cv2.imencode(".jpg", drawn[:, :, ::-1])
    caption = f"{image['file_name']}, {image['width']} x {image['height']}, {len(objects)} objects"
    source = base64.b64encode(jpeg.tobytes()).decode()
    return (
        f'<figure><img src="data:image/jpeg;base64,{source}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
