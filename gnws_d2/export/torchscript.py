"""A folded model as a TorchScript file, by Detectron2's exporter."""

import torch
from detectron2.export import scripting_with_instances
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes
from torch import Tensor, nn

from .detections import Detector

# All that the model keeps in `Instances` on its way.
_FIELDS = {
    "proposal_boxes": Boxes,
    "objectness_logits": Tensor,
    "pred_boxes": Boxes,
    "scores": Tensor,
    "pred_classes": Tensor,
    "pred_masks": Tensor,
}


class _Adapter(nn.Module):
    """One image in, tensors by name out: Detectron2's classes cannot leave a file."""

    def __init__(self, model: GeneralizedRCNN):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        instances = self.model.inference([{"image": image}], do_postprocess=False)
        return instances[0].get_fields()


def save_torchscript(model: GeneralizedRCNN, path: str) -> None:
    """
    Args:
        model: of Detectron2's own modules, in evaluation mode. It needs no gradients afterwards,
            as the file would have them.
        path: the file to write.
    """
    adapter = _Adapter(model.requires_grad_(False)).eval()
    scripting_with_instances(adapter, _FIELDS).save(path)


def load_torchscript(path: str) -> Detector:
    """
    Returns:
        The model in the file, on the CPU, from an image to its detections.
    """
    return torch.jit.load(path, map_location="cpu")
