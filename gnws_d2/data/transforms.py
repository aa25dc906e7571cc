"""Detectron2's resize transforms, with OpenCV's interpolation."""

import cv2
import numpy as np
from detectron2.data import transforms as T


class OpenCVResizeTransform(T.ResizeTransform):
    """
    :class:`ResizeTransform` that resizes images with OpenCV's bilinear interpolation, which has no
    antialiasing, instead of Pillow's.
    """

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """
        Args:
            img: (h, w) or (h, w, C), uint8 or floating point; so is the result, with the new size.
            interp: a Pillow method to use instead: Detectron2 resizes masks by nearest neighbour.
        """
        if interp is not None:
            return super().apply_image(img, interp)
        return cv2.resize(img, (self.new_w, self.new_h), interpolation=cv2.INTER_LINEAR)


class OpenCVResizeScale(T.ResizeScale):
    """:class:`ResizeScale` with :class:`OpenCVResizeTransform`."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        t = super().get_transform(image)
        return OpenCVResizeTransform(t.h, t.w, max(1, t.new_h), max(1, t.new_w))


class OpenCVResizeShortestEdge(T.ResizeShortestEdge):
    """:class:`ResizeShortestEdge` with :class:`OpenCVResizeTransform`."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        t = super().get_transform(image)
        if isinstance(t, T.ResizeTransform):
            # Detectron2 would round the short edge of a long image to 0.
            t = OpenCVResizeTransform(t.h, t.w, max(1, t.new_h), max(1, t.new_w))
        return t
