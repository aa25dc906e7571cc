"""Register, check and load datasets in COCO format."""

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pycocotools.mask as mask_util
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..utils.errors import UserError
from ..utils.process import no_garbage_collection, release_freed_memory
from .check import boxes_are_corners, find_issues, read_coco_json

_KEYS = ("iscrowd", "bbox", "keypoints", "category_id")  # that Detectron2 takes as they are


def read_categories(json_file: str) -> dict[Any, str]:
    """
    Read the class names of an annotation file by category id, in Detectron2's order.

    Raises:
        UserError: for a faulty category; see :func:`read_coco_json`, too.
    """
    coco = {"images": [], "annotations": [], "categories": read_coco_json(json_file)["categories"]}
    for issue in find_issues(coco, "", masks=False):
        raise UserError(f"{json_file}: {issue.message}")
    return _classes(coco)


def _classes(coco: dict[str, Any]) -> dict[Any, str]:
    return {c["id"]: c["name"] for c in sorted(coco["categories"], key=lambda c: c["id"])}


@no_garbage_collection()
def check_coco_json(
    json_file: str,
    image_root: str,
    *,
    masks: bool = False,
    evaluation: bool = False,
    skip_bad_images: bool = False,
    object_limits: Mapping[str, int] = {},
    coco: dict[str, Any] | None = None,
) -> list[str]:
    """
    Check an annotation file, and that its images exist, without opening them. Log a warning for
    what Detectron2 clips or leaves out.

    Args:
        json_file, image_root: see :func:`register_coco_instances`.
        masks: whether every annotation needs a segmentation.
        evaluation: whether a model is evaluated on the dataset.
        skip_bad_images: whether a missing image is only a warning.
        object_limits: by config key, the number of objects in an image that the model can find.
            More of them are a warning.
        coco: what :func:`read_coco_json` returned for the file, if it has been read.

    Returns:
        The class names in the order of their ids, as Detectron2 numbers them.

    Raises:
        UserError: for the first error, with the file and the id of the annotation or image.
    """
    coco = coco or read_coco_json(json_file)
    issues = list(find_issues(coco, image_root, masks=masks))
    if issues and boxes_are_corners(coco):
        raise UserError(
            f"{json_file}: the boxes seem to be x1, y1, x2, y2, as none would be over the edge of "
            "its image: convert them to COCO's x, y, width, height, as which many are."
        )
    warnings = defaultdict(list)
    for issue in issues:
        skipped = skip_bad_images and issue.kind == "missing image"
        if issue.level == "warning" or skipped:
            warnings[issue.kind].append(issue.message)
        elif issue.level == "error" or evaluation:
            raise UserError(f"{json_file}: {issue.message}")
    counts = Counter(annotation["image_id"] for annotation in coco["annotations"])
    most = max(counts.values(), default=0)
    if low := [key for key, limit in object_limits.items() if limit < most]:
        message = f"one of {most} objects; raise {', '.join(low)}."
        warnings["image with more objects than the model can find"].append(message)
    for kind, messages in warnings.items():
        logging.getLogger(__name__).warning(
            f"{json_file}: {len(messages)} x {kind}; the first: {messages[0]}"
        )
    return list(_classes(coco).values())


class CocoDataset:
    """What :class:`DatasetCatalog` calls to load a dataset of :func:`register_coco_datasets`."""

    def __init__(self, name: str, json_file: str, image_root: str):
        self.name, self.json_file, self.image_root = name, json_file, image_root
        # What a check has read of the file in this process, until it is loaded.
        self.coco: dict[str, Any] | None = None

    def __call__(self) -> list[dict[str, Any]]:
        coco, self.coco = self.coco, None
        return load_coco_json(self.json_file, self.image_root, self.name, coco)


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
            DatasetCatalog.register(name, CocoDataset(name, json_file, image_root))
            MetadataCatalog.get(name).set(
                json_file=json_file, image_root=image_root, evaluator_type="coco"
            )
        metadata = MetadataCatalog.get(name)
        if (metadata.get("json_file"), metadata.get("image_root")) != (json_file, image_root):
            raise UserError(
                f"--dataset {name}: a dataset of this name exists, choose another name."
            )


@no_garbage_collection()
def load_coco_json(
    json_file: str, image_root: str, dataset_name: str, coco: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """
    Detectron2's :func:`load_coco_json`, in less time and memory: it builds no index.

    Args:
        json_file, image_root, dataset_name: see Detectron2's.
        coco: what :func:`read_coco_json` returned for the file, if it has been read. It is emptied.

    Raises:
        UserError: see :func:`read_coco_json`.
    """
    coco = coco or read_coco_json(json_file)
    class_of = {id: i for i, id in enumerate(_classes(coco))}
    _set_classes(dataset_name, _classes(coco))
    of_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    annotations = coco.pop("annotations")[::-1]
    while annotations:
        annotation = annotations.pop()  # and free it
        record = {key: annotation[key] for key in _KEYS if key in annotation}
        if segmentation := annotation.get("segmentation"):
            if isinstance(segmentation, list):
                segmentation = [p for p in segmentation if len(p) >= 6 and len(p) % 2 == 0]
                if not segmentation:
                    continue
            elif isinstance(segmentation["counts"], list):
                segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
            record["segmentation"] = segmentation
        if keypoints := record.pop("keypoints", None):
            # From pixels to the coordinates of their centers, but for the visibility.
            record["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(keypoints)]
        record["bbox_mode"] = BoxMode.XYWH_ABS
        record["category_id"] = class_of[record["category_id"]]
        of_image[annotation["image_id"]].append(record)
    return [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": of_image[image["id"]],
        }
        for image in sorted(coco["images"], key=lambda image: image["id"])
    ]


def _set_classes(name: str, classes: dict[Any, str]) -> None:
    # Not by Metadata.set, which refuses another value: the file may have changed in between.
    vars(MetadataCatalog.get(name)).update(
        thing_classes=list(classes.values()),
        thing_dataset_id_to_contiguous_id={id: i for i, id in enumerate(classes)},
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
            own = _check_dataset(cfg, key, name, keep and key == keys[0])
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
    Return the metadata of the dataset `name` if it has these classes, or else new metadata with
    them: a model need not have the classes of the dataset of that name in this process.
    """
    known = MetadataCatalog.get(name)
    names, ids = list(classes.values()), {id: i for i, id in enumerate(classes)}
    if known.get("thing_classes") == names and known.get("thing_dataset_id_to_contiguous_id"):
        return known
    return Metadata(name=name, thing_classes=names, thing_dataset_id_to_contiguous_id=ids)


def check_registered(key: str, dataset: str) -> None:
    """Raise :class:`UserError` if ``DATASETS.{key}`` names a dataset that is not registered."""
    if dataset not in DatasetCatalog:
        raise UserError(
            f"DATASETS.{key} names {dataset}, which is not registered: add "
            f"--dataset {dataset} ANNOTATIONS.json IMAGE_ROOT."
        )


def _check_dataset(cfg: CfgNode, key: str, name: str, keep: bool) -> list[str] | None:
    """Check the files of a dataset, and return its class names if they are known."""
    check_registered(key, name)
    metadata, dataset = MetadataCatalog.get(name), DatasetCatalog[name]
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    for what, path in (("annotation file", json_file), ("image directory", image_root)):
        if path is not None and not PathManager.exists(path):
            raise UserError(
                f"The {what} of the dataset {name} does not exist: {path}. (Datasets that come "
                "with Detectron2 are looked for in $DETECTRON2_DATASETS.)"
            )
    is_ours = isinstance(dataset, CocoDataset)
    # Others have no file, or know their classes before it is read, such as Detectron2's own: they
    # need no check.
    if json_file is None or (metadata.get("thing_classes") is not None and not is_ours):
        return metadata.get("thing_classes")
    evaluation = name in cfg.DATASETS.TEST
    coco = read_coco_json(json_file)
    classes = check_coco_json(
        json_file,
        image_root,
        masks=cfg.MODEL.MASK_ON,
        evaluation=evaluation,
        object_limits=_object_limits(cfg),
        skip_bad_images=cfg.INPUT.ON_BAD_IMAGE == "skip" and not evaluation,
        coco=coco,
    )
    if is_ours:
        _set_classes(name, _classes(coco))
        dataset.coco = coco if keep else None
    return classes


def _object_limits(cfg: CfgNode) -> dict[str, int]:
    """Return by config key how many objects in an image a model can find."""
    limits = {"TEST.DETECTIONS_PER_IMAGE": cfg.TEST.DETECTIONS_PER_IMAGE}
    for key in ("POST_NMS_TOPK_TRAIN", "POST_NMS_TOPK_TEST"):
        limits[f"MODEL.RPN.{key}"] = cfg.MODEL.RPN[key] // 2  # others are background
    return limits


def _join(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
