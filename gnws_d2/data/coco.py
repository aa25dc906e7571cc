"""Register datasets in COCO format, and check the datasets of a config."""

import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import pycocotools.mask as mask_util
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..utils.errors import UserError
from ..utils.process import no_garbage_collection
from .check import find_issues, is_polygon, read_coco_json, refuse_corners

_KEYS = ("iscrowd", "bbox", "keypoints", "category_id")  # that Detectron2 takes as they are


@no_garbage_collection()
def check_coco_json(
    json_file: str,
    image_root: str,
    *,
    masks: bool = False,
    evaluation: bool = False,
    skip_bad_images: bool = False,
) -> dict[Any, str]:
    """
    Check an annotation file, and that its images exist, without opening them. Log a warning for
    what Detectron2 clips or leaves out.

    Args:
        json_file, image_root: see :func:`register_coco_instances`.
        masks: whether every annotation needs a segmentation.
        evaluation: whether a model is evaluated on the dataset.
        skip_bad_images: whether a missing image is only a warning.

    Returns:
        The class names by category id, in the order of the ids, as Detectron2 numbers them.

    Raises:
        UserError: for the first error, with the file and the id of the annotation or image.
    """
    coco = read_coco_json(json_file)
    warnings = defaultdict(list)
    for issue in find_issues(coco, image_root, masks=masks):
        if issue.level == "warning" or (skip_bad_images and issue.key == "file"):
            warnings[issue.key].append(issue.message)
        elif issue.level == "error" or evaluation:
            raise UserError(f"{json_file}: {issue.message}")
    if "bbox" in warnings:
        sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
        of_box = [sizes[a["image_id"]] for a in coco["annotations"]]
        refuse_corners([a["bbox"] for a in coco["annotations"]], of_box, json_file)
    for key, messages in warnings.items():
        logging.getLogger(__name__).warning(
            f"{json_file}: {len(messages)} warning(s) about {key!r}; the first: {messages[0]}"
        )
    return _classes(coco)


def read_categories(json_file: str) -> dict[Any, str]:
    """
    Read the class names of an annotation file by category id, in Detectron2's order. Raise
    :class:`UserError` for a faulty category; see :func:`read_coco_json`, too.
    """
    coco = {**read_coco_json(json_file), "images": [], "annotations": []}
    for issue in find_issues(coco, "", masks=False):
        raise UserError(f"{json_file}: {issue.message}")
    return _classes(coco)


def _classes(coco: dict[str, Any]) -> dict[Any, str]:
    return {c["id"]: c["name"] for c in sorted(coco["categories"], key=lambda c: c["id"])}


def class_fields(classes: dict[Any, str]) -> dict[str, Any]:
    """Return the fields of a dataset's metadata for class names by category id."""
    return {
        "thing_classes": list(classes.values()),
        "thing_dataset_id_to_contiguous_id": {id: i for i, id in enumerate(classes)},
    }


@no_garbage_collection()
def load_coco_json(json_file: str, image_root: str, dataset_name: str) -> list[dict[str, Any]]:
    """
    Detectron2's :func:`load_coco_json`, in less time and memory: it builds no index. Raise
    :class:`UserError` as :func:`read_coco_json` does.
    """
    coco = read_coco_json(json_file)
    fields = class_fields(_classes(coco))
    # Not by Metadata.set, which refuses another value: the file may have changed in between.
    vars(MetadataCatalog.get(dataset_name)).update(fields)
    class_of = fields["thing_dataset_id_to_contiguous_id"]
    of_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    annotations = coco.pop("annotations")[::-1]
    while annotations:
        annotation = annotations.pop()  # and free it
        record = {key: annotation[key] for key in _KEYS if key in annotation}
        if segmentation := annotation.get("segmentation"):
            if isinstance(segmentation, list):
                segmentation = [p for p in segmentation if is_polygon(p)]
                if not segmentation:
                    continue
            elif isinstance(segmentation["counts"], list):
                segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
            record["segmentation"] = segmentation
        if keypoints := record.pop("keypoints", None):
            # From pixels to the coordinates of their centers, but for the visibility.
            record["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(keypoints)]
        record |= {"bbox_mode": BoxMode.XYWH_ABS, "category_id": class_of[record["category_id"]]}
        of_image[annotation["image_id"]].append(record)
    return [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"], "width": image["width"],
            "image_id": image["id"], "annotations": of_image[image["id"]],
        }
        for image in sorted(coco["images"], key=lambda image: image["id"])
    ]  # fmt: skip


def register_coco_datasets(datasets: Sequence[Sequence[str]]) -> None:
    """
    Register datasets in COCO format, a (name, annotation file, image directory) for each, for
    ``DATASETS.TRAIN`` and ``DATASETS.TEST``. Reads no file. Raise :class:`UserError` if a name is
    already taken by another dataset.
    """
    for name, json_file, image_root in datasets:
        if name not in DatasetCatalog:
            DatasetCatalog.register(name, partial(load_coco_json, json_file, image_root, name))
            MetadataCatalog.get(name).set(
                json_file=json_file, image_root=image_root, evaluator_type="coco"
            )
        metadata = MetadataCatalog.get(name)
        if (metadata.get("json_file"), metadata.get("image_root")) != (json_file, image_root):
            raise UserError(
                f"--dataset {name}: a dataset of this name exists, choose another name."
            )
        for key in class_fields({}):  # the file may have changed since it was read
            vars(metadata).pop(key, None)


def check_datasets(cfg: CfgNode, keys: Sequence[str]) -> None:
    """
    Check that the datasets of `keys`, "TRAIN", "TEST" or both, exist and have the classes that the
    model predicts. Raise :class:`UserError` for the first mistake.
    """
    if "TRAIN" in keys and not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name a dataset to train on.")
    classes: dict[str, list[str]] = {}
    for key, name in [(k, name) for k in keys for name in cfg.DATASETS[k]]:
        _check_dataset(cfg, key, name)
        own = MetadataCatalog.get(name).get("thing_classes")
        if own is None:  # known when it is loaded
            continue
        classes[name] = own
        first, expected = next(iter(classes.items()))
        if own != expected:
            raise UserError(
                f"The classes of the datasets {first} ({_join(expected)}) and {name} "
                f"({_join(own)}) differ: a model is trained and tested on the same classes."
            )
        check_num_classes(cfg, name, own)


def check_num_classes(cfg: CfgNode, dataset: str, classes: list[str]) -> None:
    """Raise :class:`UserError` if the model has another number of classes than the dataset."""
    number = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if len(classes) != number:
        raise UserError(
            f"MODEL.ROI_HEADS.NUM_CLASSES is {number}, but the dataset {dataset} has "
            f"{len(classes)} classes ({_join(classes)}): set MODEL.ROI_HEADS.NUM_CLASSES "
            f"{len(classes)}."
        )


def check_registered(key: str, dataset: str) -> None:
    """Raise :class:`UserError` if ``DATASETS.{key}`` names a dataset that is not registered."""
    if dataset not in DatasetCatalog:
        raise UserError(
            f"DATASETS.{key} names {dataset}, which is not registered: add "
            f"--dataset {dataset} ANNOTATIONS.json IMAGE_ROOT."
        )


def dataset_classes(name: str) -> dict[Any, str]:
    """Return the class names of a registered dataset by category id, in Detectron2's order."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None and metadata.get("json_file"):  # not loaded yet
        return read_categories(metadata.json_file)
    names = metadata.get("thing_classes") or []
    return dict(zip(metadata.get("thing_dataset_id_to_contiguous_id") or range(len(names)), names))


def class_metadata(name: str, classes: dict[Any, str]) -> Metadata:
    """
    Return the metadata of the dataset `name` if it has these classes, or else new metadata with
    them: a model need not have the classes of the dataset of that name in this process.
    """
    known, fields = MetadataCatalog.get(name), class_fields(classes)
    is_same = all(known.get(key) == value for key, value in fields.items())
    return known if is_same else Metadata(name=name, **fields)


def _check_dataset(cfg: CfgNode, key: str, name: str) -> None:
    check_registered(key, name)
    metadata = MetadataCatalog.get(name)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    for what, path in (("annotation file", json_file), ("image directory", image_root)):
        if path is not None and not PathManager.exists(path):
            raise UserError(
                f"The {what} of the dataset {name} does not exist: {path}. (Detectron2 looks for "
                "its built-in datasets in $DETECTRON2_DATASETS.)"
            )
    # Datasets that know their classes before they are read, such as Detectron2's own, or that have
    # been checked, need no check.
    if json_file is not None and metadata.get("thing_classes") is None:
        evaluation = name in cfg.DATASETS.TEST
        skip = cfg.INPUT.ON_BAD_IMAGE == "skip" and not evaluation
        options = {"masks": cfg.MODEL.MASK_ON, "evaluation": evaluation, "skip_bad_images": skip}
        metadata.set(**class_fields(check_coco_json(json_file, image_root, **options)))


def _join(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
