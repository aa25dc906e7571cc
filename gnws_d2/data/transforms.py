"""Detectron2's resize with OpenCV's pixels."""

import cv2
import numpy as np
from detectron2.data import transforms as T


class OpenCVResizeTransform(T.ResizeTransform):
    """
    :class:`ResizeTransform` that resizes images with OpenCV's bilinear interpolation, which has no
    antialiasing, instead of Pillow's. Boxes, polygons and masks are left to Detectron2.
    """

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """
        Args:
            img: (h, w) or (h, w, C), uint8 or floating point.
            interp: if given, a Pillow method: Detectron2 asks for nearest to resize a mask.

        Returns:
            (new_h, new_w) or (new_h, new_w, C), same dtype.
        """
        if interp is not None:
            return super().apply_image(img, interp)
        return cv2.resize(img, (self.new_w, self.new_h), interpolation=cv2.INTER_LINEAR)


class OpenCVResizeShortestEdge(T.ResizeShortestEdge):
    """:class:`ResizeShortestEdge` by :class:`OpenCVResizeTransform`."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """
        Args:
            image: (h, w, C)
        """
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            transform = OpenCVResizeTransform(
                transform.h, transform.w, transform.new_h, transform.new_w
            )
        return transform
