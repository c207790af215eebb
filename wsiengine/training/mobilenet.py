"""MobileNetV2 (Sandler et al. 2018) with batch normalisation folded away, as a fully convolutional network.

The ImageNet weights were trained with TensorFlow's padding, which puts the border of a strided convolution at the
bottom and right and so centres cell i on pixel 32 i + 31. Padding a strided layer at the top and left instead shifts
its sampling by one of its own pixels and leaves what it computes unchanged. Doing so in the last strided layer alone
centres cell i on 32 i + 15: half a pixel from the middle of its 32.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from wsiengine.errors import IntegrityError
from wsiengine.training.backbone import CENTRED, Backbone
from wsiengine.training.tflite import read_convolutions

STRIDE_PX = 32
CELL_OFFSET_PX = 15.0
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class ConvUnit(nn.Module):
    """A convolution with its border made explicit: ``border`` is (left, right, top, bottom) pixels of zeros."""

    def __init__(self, conv: nn.Conv2d, border: tuple[int, int, int, int], *, clipped: bool) -> None:
        super().__init__()
        self.conv = conv
        self.border = border
        self.clipped = clipped

    def forward(self, x: Tensor) -> Tensor:
        if any(self.border) and not self.conv.padding[0]:
            x = pad(x, self.border)
        x = self.conv(x)
        return x.clamp(0.0, 6.0) if self.clipped else x


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; added to its input where shapes allow."""

    def __init__(self, units: list[ConvUnit], *, residual: bool) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for unit in self.units:
            y = unit(y)
        return x + y if self.residual else y


def _spatial(channels_in: int, channels_out: int, stride: int, *, last: bool) -> ConvUnit:
    groups = channels_in if channels_in == channels_out else 1
    border = (1, 1, 1, 1) if stride == 1 else (1, 0, 1, 0) if last else (0, 1, 0, 1)
    conv = nn.Conv2d(channels_in, channels_out, 3, stride, groups=groups, padding=1 if stride == 1 else 0)
    return ConvUnit(conv, border, clipped=True)


def _pointwise(channels_in: int, channels_out: int, *, clipped: bool) -> ConvUnit:
    return ConvUnit(nn.Conv2d(channels_in, channels_out, 1), (0, 0, 0, 0), clipped=clipped)


class MobileNetV2(Backbone):
    """The backbone: float [-1, 1] (N, 3, H, W) -> features (N, features, H/32, W/32); H, W multiples of 32.

    Args:
        width: Multiplies all channel counts; 1.0 for the ImageNet weights, less in tests.
    """

    blocks: nn.ModuleList
    offset_px = CELL_OFFSET_PX
    halo_px = 256

    def __init__(self, width: float = 1.0) -> None:
        super().__init__(CENTRED)

        def scaled(channels: int) -> int:
            return max(8, int(channels * width))

        channels = scaled(32)
        stem = ConvUnit(nn.Conv2d(3, channels, 3, 2), (0, 1, 0, 1), clipped=True)
        blocks: list[nn.Module] = [stem]
        reached, ends = 2, {}
        for expand, out, repeats, stage_stride in _STAGES:
            reached *= stage_stride
            for i in range(repeats):
                stride = stage_stride if i == 0 else 1
                hidden, target = channels * expand, scaled(out)
                units = [_pointwise(channels, hidden, clipped=True)] if expand > 1 else []
                units += [_spatial(hidden, hidden, stride, last=out == 160), _pointwise(hidden, target, clipped=False)]
                blocks.append(InvertedResidual(units, residual=stride == 1 and channels == target))
                channels = target
            ends[reached] = (len(blocks), channels)
        blocks.append(_pointwise(channels, scaled(1280), clipped=True))
        ends[32] = (len(blocks), scaled(1280))
        self.blocks = nn.ModuleList(blocks)
        self.chain(blocks, {stride: end for stride, end in ends.items() if stride > 2})

    def load_imagenet(self, path: Path) -> None:
        """Fill in the ImageNet weights of a TensorFlow Lite file (width 1.0).

        Raises:
            IntegrityError: The file's layers are not those of MobileNetV2 1.0.
        """
        units = [m for m in self.modules() if isinstance(m, ConvUnit)]
        layers = read_convolutions(path)[: len(units)]
        if [tuple(u.conv.weight.shape) for u in units] != [layer.weight.shape for layer in layers]:
            raise IntegrityError(
                f"{path} does not hold MobileNetV2 1.0: its layers have other shapes",
                hint="use the MobileNetV2 file of the data folder",
            )
        with torch.no_grad():
            for unit, layer in zip(units, layers, strict=True):
                unit.conv.weight.copy_(torch.from_numpy(layer.weight))
                assert unit.conv.bias is not None
                unit.conv.bias.copy_(torch.from_numpy(layer.bias))
