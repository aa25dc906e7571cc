"""The formats of checkpoints, told apart by their content, and Detectron2's names for each."""

import re
from typing import Any

from torch import Tensor

from ..utils.errors import UserError

# The names of a layer in MMDetection and in Detectron2, and what is added to each number of the
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
    Convert the content of a checkpoint file to Detectron2's format. It is recognized as one of

    * Detectron2's own format, or a state dict with Detectron2's names: taken as it is;
    * an MMDetection detector: its state dict, its EMA copies left out;
    * an ImageNet backbone with MMCV's names, or with those of the WS authors, who name GroupNorm
      layers ``bn``: its backbone, the classifier ``fc`` left out.

    Args:
        checkpoint: what `torch.load` gave.

    Returns:
        ``{"model": state dict, ...}``, as `DetectionCheckpointer` takes it.

    Raises:
        UserError: if it is none of these, or a model with BatchNorm. The message has no file name.
    """
    state = checkpoint
    for key in ("model", "state_dict"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            state = checkpoint[key]
            break
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    ):
        raise UserError("it holds no state dict.")
    if checkpoint.get("model") is state:
        if not isinstance(checkpoint.get("weight_standardization", False), bool):
            raise UserError("its weight_standardization is neither True nor False.")
        return checkpoint
    state = {
        key.removeprefix("module."): value  # of DistributedDataParallel
        for key, value in state.items()
        if not key.startswith("ema_")
    }
    if any(key.endswith("running_mean") for key in state):
        raise UserError("it is a model with BatchNorm, not GroupNorm.")
    if any(key.startswith((_BACKBONE, "proposal_generator.", "roi_heads.")) for key in state):
        return {"model": state}
    if "backbone.layer1.0.conv1.weight" in state:
        return {"model": _rename(state, to_detectron2=True), "__author__": "MMDetection"}
    if "layer1.0.conv1.weight" in state:
        state = {
            "backbone." + re.sub(r"\bbn(\d)\b", r"gn\1", key): value
            for key, value in state.items()
            if not key.startswith("fc.")
        }
        state = _rename(state, to_detectron2=True)
        # Without the prefix of the FPN, and to be matched, as Detectron2's own backbones.
        return {
            "model": {key.removeprefix(_BACKBONE): value for key, value in state.items()},
            "__author__": "MMCV",
            "matching_heuristics": True,
        }
    keys = ", ".join(list(state)[:3])
    raise UserError(f"its parameters ({keys}, ...) are those of no model known here.")


def convert_to_mmdet(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """
    The inverse of :func:`convert_to_detectron2` for a detector.

    Args:
        checkpoint: in Detectron2's format.

    Returns:
        ``{"meta": {}, "state_dict": state dict}``, with MMDetection's names.

    Raises:
        UserError: if it has parameters that MMDetection's models have not.
    """
    return {"meta": {}, "state_dict": _rename(checkpoint["model"], to_detectron2=False)}


def _rename(state: dict[str, Tensor], to_detectron2: bool) -> dict[str, Tensor]:
    renamed, unknown = {}, []
    for key, value in state.items():
        layer, _, parameter = key.rpartition(".")
        for mmdet, detectron2, offsets in _LAYERS:
            source, target = (mmdet, detectron2) if to_detectron2 else (detectron2, mmdet)
            match = re.fullmatch(re.escape(source).replace(r"\{\}", r"(\d{1,4})"), layer)
            if match:
                signed = (o if to_detectron2 else -o for o in offsets)
                numbers = (int(n) + o for n, o in zip(match.groups(), signed))
                renamed[f"{target.format(*numbers)}.{parameter}"] = value
                break
        else:
            unknown.append(key)
    if unknown:
        raise UserError(
            f"{len(unknown)} of its parameters have no counterpart in a Faster or Mask R-CNN of "
            f"this project, the first of them {unknown[0]}."
        )
    return renamed
