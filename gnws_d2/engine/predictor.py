"""Prediction with the published image pipeline."""

from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from ..checkpoint import GNWSCheckpointer
from ..data.transforms import OpenCVResizeShortestEdge
from ..layers import fold_for_inference
from .checks import check_device


class Predictor(DefaultPredictor):
    """
    :class:`DefaultPredictor` that resizes with OpenCV, as the published models were tested, loads
    what :class:`GNWSCheckpointer` loads, and takes several images at once. Weights are standardized
    once, when it is made.

    Examples:
    ::
        predictor = Predictor(model_zoo.get_config("mask_rcnn_R50_gnws_2x", trained=True))
        outputs = predictor(cv2.imread("input.jpg"))
    """

    def __init__(self, cfg: CfgNode):
        """Raise :class:`UserError` if ``MODEL.DEVICE`` or ``MODEL.WEIGHTS`` cannot be used."""
        check_device(cfg)
        self.cfg = cfg.clone()
        self.model = build_model(self.cfg).eval()
        if len(cfg.DATASETS.TEST):
            self.metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
        GNWSCheckpointer(self.model, strict=True).load(cfg.MODEL.WEIGHTS)
        fold_for_inference(self.model)
        size = cfg.INPUT.MIN_SIZE_TEST
        self.aug = OpenCVResizeShortestEdge([size, size], cfg.INPUT.MAX_SIZE_TEST)
        self.input_format = cfg.INPUT.FORMAT
        assert self.input_format in ["RGB", "BGR"], self.input_format

    def __call__(
        self, original_image: np.ndarray | list[np.ndarray]
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """
        Args:
            original_image: an image of shape (H, W, 3), uint8, in BGR order, or a list of them,
                of any sizes, which is one batch.

        Returns:
            ``{"instances": Instances}`` in the coordinates of the image, or a list of these.
        """
        images = [original_image] if isinstance(original_image, np.ndarray) else original_image
        with torch.no_grad():
            predictions = self.model([self._input(image) for image in images])
        return predictions[0] if isinstance(original_image, np.ndarray) else predictions

    def _input(self, image: np.ndarray) -> dict[str, Any]:
        height, width = image.shape[:2]
        if self.input_format == "RGB":
            image = np.ascontiguousarray(image[:, :, ::-1])
        image = self.aug.get_transform(image).apply_image(image)
        tensor = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return {"image": tensor, "height": height, "width": width}
