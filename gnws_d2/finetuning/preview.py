"""A page with pictures of a dataset and their objects, to look at before training."""

import base64
import html
import itertools
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
from detectron2.config import CfgNode

from ..data import OpenCVDatasetMapper, register_coco_datasets
from ..data.dataset_mapper import read_image
from ..data.formats import Coco
from ..data.train_loader import build_train_loader
from ..prediction.drawing import class_color, draw_objects
from ..utils.files import atomic_write

_NUM_PICTURES = 16
_STYLE = """body { font: 15px sans-serif; margin: 2em auto; max-width: 1000px; }
td, th { padding: 2px 12px; text-align: right } td:first-child { text-align: left }
figure { display: inline-block; margin: 6px; vertical-align: top } figcaption { font-size: 12px }"""


def write_preview(
    path: str, splits: dict[str, Coco], roots: list[str], notes: list[str], cfg: CfgNode
) -> None:
    """
    Write an HTML page, which needs no other file. If training augments images by more than a flip,
    the page also shows what it trains on.

    Args:
        path: the file to write.
        splits: the COCO dict of each split, with the same categories.
        roots: the image directory of each split.
        notes: what was repaired and left out.
        cfg: config of the training.
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
            picture = read_image(os.path.join(root, image["file_name"]), "RGB")
            parts.append(_figure(picture, image["file_name"], of_image[image["id"]], names))
    if cfg.INPUT.AUGMENTATION != "none" or cfg.INPUT.COPY_PASTE or cfg.INPUT.ANY_ORIENTATION:
        parts += ["<h2>As in training</h2>", *_augmented(cfg, names)]
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


def _augmented(cfg: CfgNode, names: dict[int, str]) -> Iterator[str]:
    """Yield figures of the first images that the train loader yields, with seed 0."""
    cfg = cfg.clone()
    cfg.merge_from_list(["SEED", 0, "DATALOADER.NUM_WORKERS", 0])
    register_coco_datasets(cfg.DATASETS.COCO)
    loader = build_train_loader(cfg, OpenCVDatasetMapper(cfg, True))
    ids = sorted(names)  # as Detectron2 numbers the classes
    for record in itertools.islice(itertools.chain.from_iterable(loader), _NUM_PICTURES):
        picture, instances = record["image"].permute(1, 2, 0).numpy(), record["instances"]
        boxes = instances.gt_boxes.tensor.numpy()
        boxes[:, 2:] -= boxes[:, :2]
        classes = instances.gt_classes.tolist()
        objects = [{"bbox": b, "category_id": ids[c], "iscrowd": 0} for b, c in zip(boxes, classes)]
        for own, mask in zip(objects, instances.gt_masks if instances.has("gt_masks") else ()):
            if not isinstance(mask, list):  # of polygons
                mask = mask_util.encode(np.asfortranarray(mask, np.uint8))
            own["segmentation"] = mask
        rgb = picture if cfg.INPUT.FORMAT == "RGB" else picture[:, :, ::-1]
        yield _figure(rgb, os.path.basename(record["file_name"]), objects, names)


def _figure(
    picture: np.ndarray, name: str, objects: list[dict[str, Any]], names: dict[int, str]
) -> str:
    ids = list(names)
    drawn = draw_objects(
        picture,
        objects,
        [names[o["category_id"]] + (" (crowd)" if o["iscrowd"] else "") for o in objects],
        [class_color(ids.index(o["category_id"])) for o in objects],
        masks=all("segmentation" in o for o in objects),
    )
    _, jpeg = cv2.imencode(".jpg", drawn[:, :, ::-1])
    height, width = picture.shape[:2]
    caption = f"{name}, {width} x {height}, {len(objects)} objects"
    source = base64.b64encode(jpeg.tobytes()).decode()
    return (
        f'<figure><img src="data:image/jpeg;base64,{source}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
