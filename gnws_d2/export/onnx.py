"""A folded model as an ONNX file, by Detectron2's adapter for tracing."""

import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead
from torch import Tensor

from .detections import Detector, detect

OPSET = 17


class _NeverEmptyMaskHead(MaskRCNNConvUpsampleHead):
    """With one region more, as ONNX Runtime cannot normalize a batch of none."""

    def layers(self, x: Tensor) -> Tensor:
        return super().layers(torch.cat([x, x.new_zeros(1, *x.shape[1:])]))[:-1]


def save_onnx(model: GeneralizedRCNN, image: Tensor, path: str) -> None:
    """
    Args:
        model: of Detectron2's own modules, in evaluation mode. It is of no other use afterwards.
        image: (3, H, W) uint8, any.
        path: the file to write.
    """
    import onnx  # as ONNX Runtime, no requirement of the rest

    for m in model.modules():
        if type(m) is MaskRCNNConvUpsampleHead:
            m.__class__ = _NeverEmptyMaskHead
    example = detect(model, image)
    names = sorted(example)  # as the adapter has them
    torch.onnx.export(
        TracingAdapter(model, image, detect),
        (image,),
        path,
        input_names=["image"],
        output_names=names,
        dynamic_axes={
            "image": {1: "height", 2: "width"},
            **{name: {0: "detections"} for name in names},
        },
        opset_version=OPSET,
        # The new exporter takes no Python that depends on values, as Detectron2's does.
        dynamo=False,
    )
    proto = onnx.load(path)
    for output in proto.graph.output:
        # The exporter loses these.
        sizes = example[output.name].shape[1:]
        for dim, size in zip(output.type.tensor_type.shape.dim[1:], sizes, strict=True):
            dim.dim_value = size
    onnx.save(proto, path)


def load_onnx(path: str) -> Detector:
    """
    Returns:
        The model in the file, on the CPU with as many threads as PyTorch has, from an image to its
        detections.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(image: Tensor) -> dict[str, Tensor]:
        outputs = session.run(names, {"image": image.numpy()})
        return {name: torch.from_numpy(output) for name, output in zip(names, outputs)}

    return run
