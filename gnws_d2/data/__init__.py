from .coco import check_coco_json, check_datasets, register_coco_datasets
from .dataset_mapper import OpenCVDatasetMapper, read_image
from .shapes import register_shapes

__all__ = [
    "OpenCVDatasetMapper",
    "check_coco_json",
    "check_datasets",
    "read_image",
    "register_coco_datasets",
]

register_shapes()
