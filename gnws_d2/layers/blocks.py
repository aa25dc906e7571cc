"""Detectron2's ResNet blocks with each norm, its residual and its ReLU in one operation."""

import torch
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor
from torch.nn import functional as F


class GNWSBasicStem(BasicStem):
    """:class:`BasicStem` with fused operations."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C_out, H / 4, W / 4)"""
        x = self.conv1(x, relu=True)
        inference = not (torch.is_grad_enabled() or torch.jit.is_tracing())
        if inference and x.device.type == "cpu":
            # PyTorch's pooling on CPUs is fast in this format only.
            x = x.contiguous(memory_format=torch.channels_last)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1).contiguous()


class GNWSBasicBlock(BasicBlock):
    """:class:`BasicBlock` with fused operations."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C_out, H / stride, W / stride)"""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.conv2(self.conv1(x, relu=True), shortcut, relu=True)


class GNWSBottleneckBlock(BottleneckBlock):
    """:class:`BottleneckBlock` with fused operations."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C_out, H / stride, W / stride)"""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        out = self.conv2(self.conv1(x, relu=True), relu=True)
        return self.conv3(out, shortcut, relu=True)
