"""Register COCO datasets, and check that a config fits them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..utils.errors import UserError
from ..utils.process import release_freed_memory
from .check import check_coco_json, read_categories
from .coco_json import load_coco_json


def register_coco_datasets(datasets: Sequence[Sequence[str]]) -> None:
    """
    Register datasets in COCO format, for ``DATASETS.TRAIN`` and ``DATASETS.TEST``. Reads no file.

    Args:
        datasets: a (name, annotation file, image directory) for each.

    Raises:
        UserError: if a name is already taken by another dataset.
    """
    for name, json_file, image_root in datasets:
        if name not in DatasetCatalog:
            load = partial(load_coco_json, json_file, image_root, name)
            DatasetCatalog.register(name, load)
            MetadataCatalog.get(name).set(
                json_file=json_file, image_root=image_root, evaluator_type="coco"
            )
        metadata = MetadataCatalog.get(name)
        if (metadata.get("json_file"), metadata.get("image_root")) != (json_file, image_root):
            raise UserError(
                f"--dataset {name}: a dataset of this name exists, choose another name."
            )


def check_datasets(cfg: CfgNode, keys: tuple[str, ...], *, keep: bool = False) -> None:
    """
    Check that the datasets of a config exist and have the classes that the model predicts.

    Args:
        keys: "TRAIN", "TEST" or both.
        keep: keep the datasets of the first key in memory, for this process to load.

    Raises:
        UserError: for the first mistake.
    """
    if "TRAIN" in keys and not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name a dataset to train on.")
    classes: dict[str, list[str]] = {}
    for key in keys:
        for name in cfg.DATASETS[key]:
            if name in classes:
                continue
            classes[name] = _check_dataset(cfg, key, name, keep and key == keys[0])
            first, expected = next(iter(classes.items()))
            if classes[name] != expected:
                raise UserError(
                    f"The classes of the datasets {first} ({_join(expected)}) and {name} "
                    f"({_join(classes[name])}) differ: a model is trained and tested on the same "
                    "classes."
                )
            check_num_classes(cfg, name, classes[name])
    release_freed_memory()


def check_num_classes(cfg: CfgNode, dataset: str, classes: list[str]) -> None:
    """Raise :class:`UserError` if the model has another number of classes than the dataset."""
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if len(classes) != num_classes:
        raise UserError(
            f"MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}, but the dataset {dataset} has "
            f"{len(classes)} classes ({_join(classes)}): set MODEL.ROI_HEADS.NUM_CLASSES "
            f"{len(classes)}."
        )


def dataset_classes(name: str) -> dict[Any, str]:
    """Return the class names of a registered dataset by category id, in Detectron2's order."""
    metadata = MetadataCatalog.get(name)
    names = metadata.get("thing_classes")
    if names is None and metadata.get("json_file"):  # not loaded yet
        return read_categories(metadata.json_file)
    ids = metadata.get("thing_dataset_id_to_contiguous_id") or range(len(names or []))
    return dict(zip(ids, names or []))


def class_metadata(name: str, classes: dict[Any, str]) -> Metadata:
    """
    Return the metadata of the dataset `name`, with `classes` filled in, or new metadata if it has
    others.
    """
    metadata = MetadataCatalog.get(name)
    names = list(classes.values())
    if metadata.get("thing_classes", names) != names:
        metadata = Metadata(name=name)
    metadata.thing_classes = names
    if metadata.get("thing_dataset_id_to_contiguous_id") is None:
        metadata.thing_dataset_id_to_contiguous_id = {id: i for i, id in enumerate(classes)}
    return metadata


def check_registered(key: str, dataset: str) -> None:
    """Raise :class:`UserError` if ``DATASETS.{key}`` names a dataset that is not registered."""
    if dataset not in DatasetCatalog:
        raise UserError(
            f"DATASETS.{key} names {dataset}, which is not registered: add "
            f"--dataset {dataset} ANNOTATIONS.json IMAGE_ROOT."
        )


def _check_dataset(cfg: CfgNode, key: str, name: str, keep: bool) -> list[str]:
    """Check the files of a dataset and return its class names."""
    check_registered(key, name)
    metadata = MetadataCatalog.get(name)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    for what, path in (("annotation file", json_file), ("image directory", image_root)):
        if path is not None and not PathManager.exists(path):
            raise UserError(
                f"The {what} of the dataset {name} does not exist: {path}. (Datasets that come "
                "with Detectron2 are looked for in $DETECTRON2_DATASETS.)"
            )
    # Only built-in datasets know their classes before their file is read; they need no check.
    if metadata.get("thing_classes") is not None:
        return metadata.thing_classes
    evaluation = name in cfg.DATASETS.TEST
    return check_coco_json(
        json_file,
        image_root,
        masks=cfg.MODEL.MASK_ON,
        evaluation=evaluation,
        object_limits=_object_limits(cfg),
        keep=keep,
        skip_bad_images=cfg.INPUT.ON_BAD_IMAGE == "skip" and not evaluation,
    )


def _object_limits(cfg: CfgNode) -> dict[str, int]:
    """Return by config key how many objects in an image a model can find."""
    limits = {"TEST.DETECTIONS_PER_IMAGE": cfg.TEST.DETECTIONS_PER_IMAGE}
    for key in ("POST_NMS_TOPK_TRAIN", "POST_NMS_TOPK_TEST"):
        limits[f"MODEL.RPN.{key}"] = cfg.MODEL.RPN[key] // 2  # others are background
    return limits


def _join(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
