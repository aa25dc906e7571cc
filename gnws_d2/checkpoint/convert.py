"""The formats of checkpoints and their parameter names, converted to Detectron2's and back."""

import re
from typing import Any

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from torch import Tensor

from ..utils.errors import UserError

# For each layer, its name in MMDetection and in Detectron2, and what to add to each number in the
# former to get the latter.
_LAYERS: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    ("backbone.conv1", "backbone.bottom_up.stem.conv1", ()),
    ("backbone.gn1", "backbone.bottom_up.stem.conv1.norm", ()),
    ("backbone.layer{}.{}.conv{}", "backbone.bottom_up.res{}.{}.conv{}", (1, 0, 0)),
    ("backbone.layer{}.{}.gn{}", "backbone.bottom_up.res{}.{}.conv{}.norm", (1, 0, 0)),
    ("backbone.layer{}.{}.downsample.0", "backbone.bottom_up.res{}.{}.shortcut", (1, 0)),
    ("backbone.layer{}.{}.downsample.1", "backbone.bottom_up.res{}.{}.shortcut.norm", (1, 0)),
    ("neck.lateral_convs.{}.conv", "backbone.fpn_lateral{}", (2,)),
    ("neck.lateral_convs.{}.gn", "backbone.fpn_lateral{}.norm", (2,)),
    ("neck.fpn_convs.{}.conv", "backbone.fpn_output{}", (2,)),
    ("neck.fpn_convs.{}.gn", "backbone.fpn_output{}.norm", (2,)),
    ("rpn_head.rpn_conv", "proposal_generator.rpn_head.conv", ()),
    ("rpn_head.rpn_cls", "proposal_generator.rpn_head.objectness_logits", ()),
    ("rpn_head.rpn_reg", "proposal_generator.rpn_head.anchor_deltas", ()),
    ("roi_head.bbox_head.shared_convs.{}.conv", "roi_heads.box_head.conv{}", (1,)),
    ("roi_head.bbox_head.shared_convs.{}.gn", "roi_heads.box_head.conv{}.norm", (1,)),
    ("roi_head.bbox_head.shared_fcs.{}", "roi_heads.box_head.fc{}", (1,)),
    ("roi_head.bbox_head.fc_cls", "roi_heads.box_predictor.cls_score", ()),
    ("roi_head.bbox_head.fc_reg", "roi_heads.box_predictor.bbox_pred", ()),
    ("roi_head.mask_head.convs.{}.conv", "roi_heads.mask_head.mask_fcn{}", (1,)),
    ("roi_head.mask_head.convs.{}.gn", "roi_heads.mask_head.mask_fcn{}.norm", (1,)),
    ("roi_head.mask_head.upsample", "roi_heads.mask_head.deconv", ()),
    ("roi_head.mask_head.conv_logits", "roi_heads.mask_head.predictor", ()),
)
_BACKBONE = "backbone.bottom_up."


def convert_to_detectron2(checkpoint: Any) -> dict[str, Any]:
    """
    Convert what `torch.load` returns to Detectron2's format. The given format is recognized:

    * Detectron2's own, or a state dict with Detectron2's names: returned as it is;
    * an MMDetection detector, without the copies of its EMA;
    * an ImageNet backbone with MMCV's names, or with the names of the WS authors, who call
      GroupNorm layers ``bn``, without its classifier ``fc``.

    Returns:
        ``{"model": state dict, ...}``, as `DetectionCheckpointer` loads it.

    Raises:
        UserError: if it is none of these, or has BatchNorm. The message has no file name.
    """
    state = checkpoint
    if isinstance(checkpoint, dict):
        state = checkpoint.get("model", checkpoint.get("state_dict", checkpoint))
    items = list(state.items()) if isinstance(state, dict) else []
    if not items or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in items):
        raise UserError("it holds no state dict.")
    if "model" in checkpoint:
        return checkpoint
    # DistributedDataParallel adds "module.", MMDetection's EMA "ema_".
    state = {k.removeprefix("module."): v for k, v in items if not k.startswith("ema_")}
    if any(key.endswith("running_mean") for key in state):
        raise UserError("it is a model with BatchNorm, not GroupNorm.")
    if any(key.startswith((_BACKBONE, "proposal_generator.", "roi_heads.")) for key in state):
        return {"model": state}
    if "backbone.layer1.0.conv1.weight" in state:
        converted = {"model": _rename(state, to_detectron2=True), "__author__": "MMDetection"}
        names = _read_class_names(checkpoint.get("meta"))
        return {**converted, "classes": dict(enumerate(names, 1))} if names else converted
    if "layer1.0.conv1.weight" in state:
        renamed = {
            "backbone." + re.sub(r"\bbn(\d)\b", r"gn\1", key): value
            for key, value in state.items()
            if not key.startswith("fc.")
        }
        backbone = _rename(renamed, to_detectron2=True)
        # Without a prefix, to be matched with the model's names: like Detectron2's own backbones.
        state = {key.removeprefix(_BACKBONE): value for key, value in backbone.items()}
        return {"model": state, "__author__": "MMCV", "matching_heuristics": True}
    raise UserError(f"its parameters, such as {items[0][0]}, belong to no known model.")


def _read_class_names(meta: Any) -> list[str]:
    """Return the names that MMDetection 2 or 3 wrote; none for COCO's, whose ids have gaps."""
    meta = meta if isinstance(meta, dict) else {}
    data = meta.get("dataset_meta")
    names = data.get("classes") if isinstance(data, dict) else meta.get("CLASSES")
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return []
    is_coco = list(names) == [c["name"] for c in COCO_CATEGORIES if c["isthing"]]
    return [] if is_coco else list(names)


def convert_to_mmdet(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Convert a detector to MMDetection's format; raise :class:`UserError` if it does not fit."""
    return {"meta": {}, "state_dict": _rename(checkpoint["model"], to_detectron2=False)}


def _rename(state: dict[str, Tensor], to_detectron2: bool) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        layer, _, parameter = key.rpartition(".")
        for mmdet, detectron2, offsets in _LAYERS:
            source, target = (mmdet, detectron2) if to_detectron2 else (detectron2, mmdet)
            pattern = re.escape(source).replace(r"\{\}", r"(\d{1,4})")
            if match := re.fullmatch(pattern, layer):
                sign = 1 if to_detectron2 else -1
                numbers = (int(n) + sign * o for n, o in zip(match.groups(), offsets))
                renamed[f"{target.format(*numbers)}.{parameter}"] = value
                break
        else:
            raise UserError(f"its parameter {key} belongs to no known model.")
    return renamed
