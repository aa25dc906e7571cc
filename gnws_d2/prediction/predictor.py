"""Detectron2's predictor for trained and published models."""

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from .. import model_zoo
from ..checkpoint import GNWSCheckpointer, find_checkpoint, read_config
from ..checkpoint.catalog import download_from_hub
from ..checkpoint.files import read_threshold
from ..config import check_device, choose_device, load_config
from ..data.coco import class_metadata
from ..data.dataset_mapper import BadImageError
from ..data.transforms import OpenCVResizeShortestEdge
from ..layers import fold_for_inference
from ..modeling.backbone import check_keys
from ..utils.errors import UserError
from ..utils.process import keep_freed_memory
from .picture import find_images, open_picture
from .test_time_augmentation import with_tta

_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.pth)")  # USER/REPO


def find_trained(
    model: str | os.PathLike[str], opts: Sequence[Any] = (), datasets: Sequence[Sequence[str]] = ()
) -> CfgNode:
    """
    Return the config of a trained model with its weights, on the CPU if PyTorch finds no GPU.

    Args:
        model: the ``OUTPUT_DIR`` of a run, for its best checkpoint, or else its last; a checkpoint;
            or a name of :mod:`.model_zoo`, if there is no run of that name; or "USER/REPO", if
            there is no such path, or "hf://USER/REPO@REVISION", of the Hugging Face Hub.
        opts, datasets: see :func:`load_config`.

    Raises:
        UserError: if there is no such model; see :func:`load_config`, too.
    """
    model, names, text = os.fspath(model), model_zoo.names(), ""
    if model in names and not os.path.isfile(os.path.join(model, "config.yaml")):
        config_file, weights = model_zoo.get_config_file(model), model_zoo.get_checkpoint_url(model)
    else:
        is_path = os.path.exists(model) or os.path.isdir(os.path.dirname(model))
        if model.startswith("hf://") or (_HUB.fullmatch(model) and not is_path):
            model = download_from_hub(model)
        weights = find_checkpoint(model) if os.path.exists(model) else ""
        config_file = os.path.join(os.path.dirname(weights), "config.yaml")
        text = read_config(weights) if weights else ""
        if not (text or (weights and os.path.isfile(config_file))):
            near = difflib.get_close_matches(model, names, n=3, cutoff=0)
            raise UserError(
                f"{model or repr(model)} is not a trained model: name the OUTPUT_DIR of a run with "
                "a checkpoint, a checkpoint beside its config.yaml, or a published model "
                f"({', '.join(near)})."
            )
    cfg = load_config(config_file, ["MODEL.WEIGHTS", weights, *opts], datasets, text)
    if "MODEL.DEVICE" not in opts:
        choose_device(cfg)
    return cfg


class Predictor(DefaultPredictor):
    """
    :class:`DefaultPredictor` that resizes with OpenCV, as the published models were tested, loads
    what :class:`GNWSCheckpointer` loads, and takes a picture in any form, or several. Weights are
    standardized once, when it is built. On a CPU the whole process keeps freed memory from then on,
    which saves a third of the time (:func:`keep_freed_memory`), except with ``MODEL.GNWS.KERNELS
    reference``.

    Attributes:
        metadata: has the class names of the checkpoint, ``thing_classes``.
        threshold (float): the score from which on detections are worth showing; the best one in the
            last evaluation of the model, or else 0.5. All detections are returned, however, with a
            score above ``MODEL.ROI_HEADS.SCORE_THRESH_TEST``.

    Examples:
    ::
        predictor = Predictor.from_pretrained("mask_rcnn_R50_gnws_2x")  # or the OUTPUT_DIR of a run
        instances = predictor("input.jpg")["instances"]
        instances = instances[instances.scores >= predictor.threshold]
        names = [predictor.metadata.thing_classes[i] for i in instances.pred_classes]
    """

    def __init__(self, cfg: CfgNode):
        """Raise :class:`UserError` if ``MODEL.DEVICE`` or ``MODEL.WEIGHTS`` cannot be used."""
        if not isinstance(cfg, CfgNode):
            raise UserError(f"Predictor takes a config: use Predictor.from_pretrained({cfg!r}).")
        check_device(cfg)
        if cfg.MODEL.DEVICE == "cpu" and check_keys(cfg) != "reference":
            keep_freed_memory()
        self.cfg = cfg.clone()
        self.model = build_model(self.cfg).eval()
        checkpointer = GNWSCheckpointer(self.model, strict=True)
        checkpointer.load(cfg.MODEL.WEIGHTS)
        dataset = next(iter(cfg.DATASETS.TEST), "unknown")
        self.metadata = MetadataCatalog.get(dataset)
        if checkpointer.classes:
            self.metadata = class_metadata(dataset, checkpointer.classes)
        self.threshold = read_threshold(cfg.MODEL.WEIGHTS)
        fold_for_inference(self.model)
        size = cfg.INPUT.MIN_SIZE_TEST
        self.aug = OpenCVResizeShortestEdge([size, size], cfg.INPUT.MAX_SIZE_TEST)
        if cfg.TEST.AUG.ENABLED:
            self.model = with_tta(cfg, self.model)
        self.input_format = cfg.INPUT.FORMAT

    @classmethod
    def from_pretrained(
        cls, model: str | os.PathLike[str], opts: Sequence[Any] = ()
    ) -> "Predictor":
        """Build a predictor from a trained model: see :func:`find_trained`."""
        return cls(find_trained(model, opts))

    def __call__(
        self, original_image: Any
    ) -> dict[str, Any] | list[dict[str, Any]] | Iterator[dict[str, Any]]:
        """
        Args:
            original_image: an image in a form that :func:`open_picture` takes, such as a path or an
                array of shape (H, W, 3), uint8, in BGR order; a list of them, of any sizes, as one
                batch; or a directory or pattern (:func:`find_images`), for one image at a time.

        Returns:
            ``{"instances": Instances}`` in the coordinates of the image, a list of such dicts, or
            an iterator over such dicts with the ``file_name`` as well.

        Raises:
            BadImageError: a ValueError, if it is anything else, or an image cannot be read.
        """
        if isinstance(original_image, str | Path) and not os.path.isfile(original_image):
            found = find_images(original_image)
            if os.path.isdir(original_image) and not found:
                raise BadImageError(f"There is no image in {original_image}.")
            if found:
                return ({"file_name": f, **self._predict([open_picture(f)])[0]} for f in found)
        if isinstance(original_image, list | tuple) and original_image:
            return self._predict(list(map(open_picture, original_image)))
        return self._predict([open_picture(original_image)])[0]

    def _predict(self, images: list[np.ndarray]) -> list[dict[str, Any]]:
        with torch.no_grad():
            return self.model([self._input(image) for image in images])

    def _input(self, image: np.ndarray) -> dict[str, Any]:
        height, width = image.shape[:2]
        if self.input_format == "RGB":
            image = np.ascontiguousarray(image[:, :, ::-1])
        if not self.cfg.TEST.AUG.ENABLED:  # test-time augmentation resizes
            image = self.aug.get_transform(image).apply_image(image)
        tensor = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return {"image": tensor, "height": height, "width": width}
