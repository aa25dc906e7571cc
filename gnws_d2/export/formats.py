"""Export to stock Detectron2, to TorchScript by scripting, and to ONNX by tracing."""

import copy
import io
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead
from detectron2.structures import Boxes
from torch import Tensor, nn

from ..layers import fold_for_inference

# Registered names of this project, and Detectron2's without weight standardization. Their proposal
# generators differ in training alone.
STOCK_NAMES = {
    "build_resnet_gnws_backbone": "build_resnet_backbone",
    "build_resnet_gnws_fpn_backbone": "build_resnet_fpn_backbone",
    "FastRCNNConvFCGNWSHead": "FastRCNNConvFCHead",
    "MaskRCNNConvUpsampleGNWSHead": "MaskRCNNConvUpsampleHead",
    "MinQualityRPN": "RPN",
}

Detections = dict[str, Tensor]  # see `detect`
Detector = Callable[[Tensor], Detections]
Classes = dict[Any, str] | None  # see GNWSCheckpointer

# The fields of `Instances` in the model.
_FIELDS = dict.fromkeys(("proposal_boxes", "pred_boxes"), Boxes) | dict.fromkeys(
    ("objectness_logits", "scores", "pred_classes", "pred_masks"), Tensor
)


def detect(model: GeneralizedRCNN, image: Tensor) -> Detections:
    """
    Run a model in evaluation mode on an image (3, H, W) of the network's input size.

    Returns:
        Detectron2's fields: "pred_boxes" (N, 4) in pixels of `image`, "scores" (N,),
        "pred_classes" (N,) and, for a Mask R-CNN, "pred_masks" (N, 1, 28, 28), probabilities inside
        the box.
    """
    with torch.no_grad():
        (instances,) = model.inference([{"image": image}], do_postprocess=False)
    fields = instances.get_fields()
    return {k: v.tensor if isinstance(v, Boxes) else v for k, v in fields.items()}


def fold_model(model: nn.Module, cfg: CfgNode) -> tuple[nn.Module, CfgNode]:
    """
    Return a model of Detectron2's own modules with the standardized weights of a GN+WS model, which
    is not modified, in evaluation mode, and its config for stock Detectron2.
    """
    stock = cfg.clone()
    stock.defrost()
    _remove_other_keys(stock, get_cfg())
    for name in ("BACKBONE", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "PROPOSAL_GENERATOR"):
        node = stock.MODEL[name]
        node.NAME = STOCK_NAMES.get(node.NAME, node.NAME)
    folded = build_model(stock)
    folded.load_state_dict(fold_for_inference(copy.deepcopy(model)).state_dict())
    return folded.eval(), stock


def _remove_other_keys(cfg: CfgNode, known: CfgNode) -> None:
    for key in list(cfg):
        if key not in known:
            del cfg[key]
        elif isinstance(cfg[key], CfgNode):
            _remove_other_keys(cfg[key], known[key])


def to_folded(
    model: GeneralizedRCNN, cfg: CfgNode, classes: Classes
) -> tuple[dict[str, bytes], Detector]:
    """Export a folded model and its config for stock Detectron2. Return the files and the model."""
    f = io.BytesIO()
    known = {"classes": classes} if classes else {}
    torch.save({"model": model.state_dict(), "weight_standardization": False, **known}, f)
    files = {"model.pth": f.getvalue(), "config.yaml": cfg.dump().encode()}
    return files, partial(detect, model)


class _ScriptAdapter(nn.Module):
    """Return a dict of tensors: Detectron2's classes exist only inside the file."""

    def __init__(self, model: GeneralizedRCNN):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        instances = self.model.inference([{"image": image}], do_postprocess=False)
        return instances[0].get_fields()


def to_torchscript(model: GeneralizedRCNN, classes: Classes) -> tuple[dict[str, bytes], Detector]:
    """
    Export a folded model to TorchScript, with its class names as JSON in the extra file "classes".
    Its parameters no longer require gradients. Return the file and a model of it.
    """
    adapter = _ScriptAdapter(model.requires_grad_(False)).eval()
    f = io.BytesIO()
    extra = {"classes": json.dumps(list(classes.values()))} if classes else {}
    torch.jit.save(scripting_with_instances(adapter, _FIELDS), f, _extra_files=extra)
    f.seek(0)
    return {"model.ts": f.getvalue()}, torch.jit.load(f)


class _NeverEmptyMaskHead(MaskRCNNConvUpsampleHead):
    """Mask head with an extra region, because ONNX Runtime cannot normalize an empty batch."""

    def layers(self, x: Tensor) -> Tensor:
        return super().layers(torch.cat([x, x.new_zeros(1, *x.shape[1:])]))[:-1]


def to_onnx(
    model: GeneralizedRCNN, image: Tensor, classes: Classes
) -> tuple[dict[str, bytes], Detector]:
    """
    Export a folded model to ONNX by tracing it on `image`, with its class names as JSON in the
    metadata "classes". The model is modified. Return the file and a detector of it.
    """
    import onnx  # an optional requirement

    for m in model.modules():
        if type(m) is MaskRCNNConvUpsampleHead:
            m.__class__ = _NeverEmptyMaskHead
    names = sorted(detect(model, image))  # the order of the adapter
    f: Any = io.BytesIO()  # missing in the annotation of torch.onnx.export
    torch.onnx.export(
        TracingAdapter(model, image, detect),
        (image,),
        f,
        input_names=["image"],
        output_names=names,
        dynamic_axes={"image": {1: "height", 2: "width"}, **{n: {0: "detections"} for n in names}},
        opset_version=17,
        dynamo=False,  # the new exporter rejects control flow by values
    )
    proto = onnx.load_from_string(f.getvalue())
    if classes:
        proto.metadata_props.add(key="classes", value=json.dumps(list(classes.values())))
    data = proto.SerializeToString()
    return {"model.onnx": data}, onnx_detector(data)


def onnx_detector(data: bytes) -> Detector:
    """Return a detector that runs a file of :func:`to_onnx` in ONNX Runtime on the CPU."""
    import onnxruntime  # an optional requirement

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(image: Tensor) -> dict[str, Tensor]:
        outputs = session.run(names, {"image": image.numpy()})
        return {name: torch.from_numpy(output) for name, output in zip(names, outputs)}

    return run
