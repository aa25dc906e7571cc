"""Detectron2's layers with what GN+WS models do one after the other in one operation."""

import torch
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn
from torch.nn import functional as F

from .group_norm import GroupNorm
from .weight_standardization import WSConv2d


def _conv_norm_relu(conv: WSConv2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    return conv.norm(conv.convolve(x), residual, relu=True)


class GNWSBasicStem(BasicStem):
    """:class:`BasicStem` with the norm and the ReLU in one operation."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C_out, H / 4, W / 4)"""
        x = _conv_norm_relu(self.conv1, x)
        if x.device.type == "cpu" and not torch.is_grad_enabled():
            # PyTorch's pooling on CPUs is fast in this format alone.
            x = x.contiguous(memory_format=torch.channels_last)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1).contiguous()


class GNWSBasicBlock(BasicBlock):
    """:class:`BasicBlock` with each norm, its residual and its ReLU in one operation."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C_out, H / stride, W / stride)"""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return _conv_norm_relu(self.conv2, _conv_norm_relu(self.conv1, x), shortcut)


class GNWSBottleneckBlock(BottleneckBlock):
    """:class:`BottleneckBlock` with each norm, its residual and its ReLU in one operation."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C_out, H / stride, W / stride)"""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        out = _conv_norm_relu(self.conv2, _conv_norm_relu(self.conv1, x))
        return _conv_norm_relu(self.conv3, out, shortcut)


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.GroupNorm: GroupNorm,
    BasicStem: GNWSBasicStem,
    BasicBlock: GNWSBasicBlock,
    BottleneckBlock: GNWSBottleneckBlock,
}


def fuse_layers(module: nn.Module) -> nn.Module:
    """
    Give `module` the fast GroupNorm and, where all their convolutions are standardized, ResNet
    blocks, in place. Outputs, parameters and the state dict stay as they are.

    Returns:
        `module`
    """
    for m in module.modules():
        plain = isinstance(m, nn.GroupNorm) and not m.affine  # as in no model of Detectron2
        if type(m) in _FUSED and _is_group_normalized(m) and not plain:
            m.__class__ = _FUSED[type(m)]
    return module


def unfuse_layers(module: nn.Module) -> nn.Module:
    """
    Undo :func:`fuse_layers`, in place.

    Returns:
        `module`
    """
    stock = {fused: plain for plain, fused in _FUSED.items()}
    for m in module.modules():
        m.__class__ = stock.get(type(m), type(m))
    return module


def _is_group_normalized(module: nn.Module) -> bool:
    """Whether every convolution in `module` is standardized and followed by a GroupNorm."""
    return all(
        isinstance(m, WSConv2d) and isinstance(m.norm, nn.GroupNorm)
        for m in module.modules()
        if isinstance(m, nn.Conv2d)
    )
