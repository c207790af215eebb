"""A light U-Net (Ronneberger et al. 2015) on MobileNetV2: a map of probabilities at half the resolution of its tile.

The encoder is the backbone up to its last strided stage; every step of the decoder doubles the map (nearest
neighbour, which depends on no border), joins it with the encoder's map of that size, and filters twice. There is no
normalisation over the tile: a cell sees what lies around it, never how the rest of the tile is stained.
"""

from pathlib import Path

import onnx
import torch
from onnx import TensorProto
from torch import Tensor, nn
from torch.nn.functional import interpolate

from wsiengine.training.mobilenet import InvertedResidual, MobileNetV2
from wsiengine.training.onnx_graph import Graph, tensor

STRIDE_PX = 2
DEEPEST_PX = 32  # tiles are whole numbers of these
_DECODER = (64, 48, 32, 24)  # channels at strides 16, 8, 4, 2


class Join(nn.Module):
    """One step of the decoder: double, join, filter twice."""

    def __init__(self, below: int, beside: int, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(below + beside, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, below: Tensor, beside: Tensor) -> Tensor:
        x = torch.cat([interpolate(below, scale_factor=2.0, mode="nearest"), beside], dim=1)
        return self.second(self.first(x).relu()).relu()


class UNet(nn.Module):
    """uint8 pixels (N, 3, H, W) → logits (N, channels, H/2, W/2); H and W are multiples of 32.

    Args:
        channels: Maps that come out.
        width: Of the backbone; 1.0 for the ImageNet weights, less in tests.
    """

    def __init__(self, channels: int, width: float = 1.0) -> None:
        super().__init__()
        self.width = width
        steps = MobileNetV2(width).steps
        self.ends = _ends(steps)
        self.encoder = nn.ModuleList(steps[: self.ends[-1]])
        *beside, deepest = (_channels(self.encoder[end - 1]) for end in self.ends)
        joins = []
        for out, skip in zip(_DECODER, reversed(beside), strict=True):
            joins.append(Join(deepest, skip, out))
            deepest = out
        self.joins = nn.ModuleList(joins)
        self.head = nn.Conv2d(deepest, channels, 1)
        for conv in (m for m in (*self.joins.modules(), self.head) if isinstance(m, nn.Conv2d)):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def take(self, backbone: MobileNetV2) -> None:
        """Copy what the encoder has of a backbone, such as one with ImageNet's weights."""
        for own, given in zip(self.encoder, backbone.steps, strict=False):
            own.load_state_dict(given.state_dict())

    def forward(self, pixels: Tensor, frozen: int = 0) -> Tensor:
        """``frozen`` steps of the encoder learn nothing."""
        x = pixels.float() * (1 / 127.5) - 1.0
        maps = []
        for done, step in enumerate(self.encoder, start=1):
            with torch.set_grad_enabled(torch.is_grad_enabled() and done > frozen):
                x = step(x)
            if done in self.ends:
                maps.append(x)
        x = maps.pop()
        for join in self.joins:
            x = join(x, maps.pop())
        return self.head(x)


def export_unet(network: UNet, path: Path) -> None:
    """Write the network as ONNX, its weights as float16: uint8 ``tiles`` (N, H, W, 3) → ``maps`` (N, channels, …)."""
    graph = Graph()
    planar = graph.node("Transpose", ["tiles"], "planar", perm=[0, 3, 1, 2])
    (value,) = graph.module("u", network.eval().forward, network, planar, half=True)
    graph.node("Identity", [value], "maps")
    tiles = tensor("tiles", ["N", "H", "W", 3], TensorProto.UINT8)
    onnx.save(graph.model([tiles], [tensor("maps", ["N", network.head.out_channels, "h", "w"])]), path)


def _ends(steps: tuple[nn.Module, ...]) -> tuple[int, ...]:
    """Steps of the backbone up to the last map of each stride: 2, 4, 8, 16, 32."""
    starts = [i for i, step in enumerate(steps) if _stride(step) == 2]
    last = starts[-1] + 3  # the stage of 160 channels; what follows it is for ImageNet's classes
    return (*starts[1:], last)


def _stride(step: nn.Module) -> int:
    return max(int(m.stride[0]) for m in step.modules() if isinstance(m, nn.Conv2d))


def _channels(step: nn.Module) -> int:
    assert isinstance(step, InvertedResidual)
    last = step.units[-1].conv
    assert isinstance(last, nn.Conv2d)
    return last.out_channels
