"""Datasets of one's own, in COCO format."""

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from ..utils.errors import UserError


def register_coco_datasets(datasets: list[list[str]]) -> None:
    """
    Register datasets for use in ``DATASETS.TRAIN`` and ``DATASETS.TEST``. Reads no file.

    Args:
        datasets: (name, annotation file, image directory) of each.

    Raises:
        UserError: if a name is already taken by another dataset.
    """
    for name, json_file, image_root in datasets:
        if name not in DatasetCatalog:
            register_coco_instances(name, {}, json_file, image_root)
        metadata = MetadataCatalog.get(name)
        if (metadata.get("json_file"), metadata.get("image_root")) != (json_file, image_root):
            raise UserError(
                f"--dataset {name}: a dataset of this name exists, choose another name."
            )
