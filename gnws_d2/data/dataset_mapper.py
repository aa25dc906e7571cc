"""Detectron2's dataset mapper with images decoded and resized by OpenCV, as in MMDetection."""

import copy
import io
import math
import os
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

from ..config import check_choice
from ..utils.errors import UserError
from .augmentation import build_augmentation

# Suffixes of the files in a directory that are read as images.
IMAGE_SUFFIXES = tuple(
    ".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()
)
_IMAGE_ENDS = (b"\xff\xd9", b"IEND\xaeB`\x82")  # of complete JPEG and PNG files


class BadImageError(UserError, ValueError):
    """Raised for an image that cannot be used; see ``INPUT.ON_BAD_IMAGE``."""


def read_image(file_name: str, format: str) -> np.ndarray:
    """
    Decode an image file as `cv2.imread` does, and apply its EXIF orientation. Return (H, W, 3),
    uint8, in the `format` "BGR" or "RGB".

    Raises:
        BadImageError: if the file is missing or not a regular file; see :func:`decode_image`, too.
    """
    try:
        # A pipe would block, and a device may have no end.
        if os.path.exists(file_name) and not os.path.isfile(file_name):
            raise OSError("it is not a regular file")
        with PathManager.open(file_name, "rb") as f:
            data = f.read()
    except OSError as e:
        raise BadImageError(f"Cannot read the image {file_name}: {e.strerror or e}.") from e
    return decode_image(data, file_name, format)


def decode_image(data: bytes, name: str, format: str) -> np.ndarray:
    """
    Decode the contents of an image file, which messages call `name`: see :func:`read_image`.

    Raises:
        BadImageError: if the image is damaged, not an image or not of 8 bits, or if it has more
            pixels than ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    try:
        with Image.open(io.BytesIO(data)) as header:
            width, height = header.size
            if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError(f"{width} x {height} pixels are too many")
            if not data.endswith(_IMAGE_ENDS):
                header.load()  # fails if truncated, where OpenCV silently fills in grey
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if image is None:
            raise ValueError("OpenCV cannot decode it")
    except Image.DecompressionBombError as e:
        raise BadImageError(
            f"The image {name} is larger than PIL.Image.MAX_IMAGE_PIXELS, "
            f"{Image.MAX_IMAGE_PIXELS}: {e}. Tile it, or raise the limit."
        ) from e
    except Exception as e:  # Pillow raises errors of all types for damaged files
        reason = "its format is not known" if isinstance(e, UnidentifiedImageError) else e
        raise BadImageError(f"The image {name} is damaged or not an image: {reason}.") from e
    if image.dtype != np.uint8:
        # OpenCV would keep the upper 8 bits, of which cameras with 12 bits use four.
        raise BadImageError(
            f"The image {name} has {8 * image.itemsize} bits per channel, and values up to "
            f"{image.max():g}: convert all images of the dataset to 8 bits, with one scale."
        )
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if format == "RGB" else image


class OpenCVDatasetMapper(DatasetMapper):
    """
    :class:`DatasetMapper` for boxes, masks and keypoints that decodes and resizes images with
    OpenCV, as the published models were trained and tested. Detectron2 resizes with Pillow, whose
    antialiasing visibly changes the predictions of the same weights.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        check_choice("INPUT.FORMAT", cfg.INPUT.FORMAT, ("BGR", "RGB"))
        ret = super().from_config(cfg, is_train)
        ret["augmentations"] = build_augmentation(cfg, ret["augmentations"], is_train)
        if is_train and cfg.INPUT.get("AUGMENTATION") == "strong":  # it crops, as INPUT.CROP does
            ret["recompute_boxes"] = cfg.MODEL.MASK_ON
        return ret

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Return an image in Detectron2's dataset format with ``image``, a (3, H, W) uint8 tensor, and
        in training with ``instances``. Raise :class:`BadImageError` as :func:`read_image`, or if
        the image has another size than in the dataset.
        """
        if torch.utils.data.get_worker_info() is not None:
            cv2.setNumThreads(1)  # the workers are the threads
        dataset_dict = copy.deepcopy(dataset_dict)  # it will be modified by code below
        image = read_image(dataset_dict["file_name"], self.image_format)
        try:
            utils.check_image_size(dataset_dict, image)  # sets the size if there is none
        except utils.SizeMismatchError as e:
            raise BadImageError(str(e)) from e
        aug_input = T.AugInput(image)
        transforms = self.augmentations(aug_input)
        image = aug_input.image
        planes = np.empty((3, *image.shape[:2]), np.uint8)
        cv2.split(image, list(planes))
        dataset_dict["image"] = torch.from_numpy(planes)

        if not self.is_train:
            dataset_dict.pop("annotations", None)
        elif "annotations" in dataset_dict:
            self._transform_annotations(dataset_dict, transforms, image.shape[:2])
        return dataset_dict

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: T.Transform, image_shape: tuple[int, int]
    ) -> None:
        # The same as Detectron2's, without its slow transposition and any() of masks, and also for
        # an image without objects, whose boxes it cannot recompute.
        bitmask = self.instance_mask_format == "bitmask"
        annotations = []
        for annotation in dataset_dict.pop("annotations"):
            if annotation.get("iscrowd", 0) != 0:
                continue
            if not self.use_instance_mask:
                annotation.pop("segmentation", None)
            if not self.use_keypoint:
                annotation.pop("keypoints", None)
            polygons = annotation.get("segmentation")
            if rasterize := bitmask and isinstance(polygons, list):
                # pycocotools cuts them at the edges of the image. Detectron2 cuts them by Shapely,
                # which may be missing, and leaves out parts of polygons that cross themselves.
                polygons = annotation.pop("segmentation")
            flipped = self.keypoint_hflip_indices
            annotation = utils.transform_instance_annotations(
                annotation, transforms, image_shape, keypoint_hflip_indices=flipped
            )
            if rasterize:
                points = [np.asarray(p, np.float64).reshape(-1, 2) for p in polygons]
                points = [transforms.apply_coords(p).ravel() for p in points]
                annotation["segmentation"] = _rasterize(points, image_shape)
            annotations.append(annotation)
        format = self.instance_mask_format
        instances = utils.annotations_to_instances(annotations, image_shape, format)
        has_masks = instances.has("gt_masks")
        if self.recompute_boxes and has_masks:
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        keep = instances.gt_boxes.nonempty(threshold=1e-5)
        if has_masks and bitmask:
            keep &= torch.tensor([mask.any() for mask in instances.gt_masks.tensor.numpy()])
        elif has_masks:
            keep &= instances.gt_masks.nonempty()
        dataset_dict["instances"] = instances if keep.all() else instances[keep]


def _rasterize(polygons: list[np.ndarray], image_shape: tuple[int, int]) -> np.ndarray:
    if not polygons:
        return np.zeros(image_shape, bool)
    rle = mask_util.merge(mask_util.frPyObjects(polygons, *image_shape))
    return cv2.transpose(mask_util.decode(rle).T).view(bool)
