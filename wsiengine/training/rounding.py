"""int8 from any classifier in ONNX: ranges from real tissue, then a short training of the rounded network.

A network of 8-bit numbers computes slightly other scores. Rounding alone costs accuracy, the more so as weights that
began on an int8 grid round back to where they began; so the rounded network is trained for a while to say what the
whole one says, tile by tile (distillation: no labels are needed), with the rounding in its forward pass and the
straight way back (Jacob et al. 2018).

Types: activations are unsigned 8 bits; weights are signed **7** bits for each output channel. Processors without VNNI
multiply unsigned by signed bytes in pairs and add both products in 16 bits, which saturates: two products stay below
2 · 255 · 63 = 32,130 < 32,767 = 2¹⁵ − 1. Bytes of the tile enter as they are. The last convolutions, which give the
scores, stay float32, and so do the few whose rounding alone costs much (in MobileNetV2 the first depthwise one).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from torch import Tensor

from wsiengine.training.int8_layout import CENTRE, FIRST, centred, lay_out
from wsiengine.training.onnx_torch import OnnxModule

WEIGHT_MOST = 63
LEVELS = 255
_SAMPLES = 4096  # of a value, per batch, for its range
_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
_SPARED = 3  # convolutions, at most
_COSTLY = 0.2  # of the difference that rounding all weights makes


@dataclass(frozen=True)
class Range:
    """How a value is written in 8 bits: value = (byte − zero) · scale."""

    scale: float
    zero: int

    @property
    def high(self) -> float:
        """The largest value that can be written."""
        return (LEVELS - self.zero) * self.scale


@dataclass(frozen=True)
class Training:
    """How the rounded network is trained.

    Attributes:
        iterations: Batches; 0 leaves it as rounding makes it.
        batch: Tiles in each.
        rate: Of Adam: rising over the first tenth (its first steps move every weight alike, whatever the gradient,
            and would undo what rounding left), then falling to 0 along a cosine.
        calibration: Batches that ranges are taken from.
    """

    iterations: int = 300
    batch: int = 8
    rate: float = 2e-5
    calibration: int = 12
    seed: int = 0
    threads: int = 1

    def rate_at(self, iteration: int) -> float:
        """The rate of an iteration."""
        done = iteration / self.iterations
        return self.rate * min(1.0, (done + 1 / self.iterations) / 0.1) * 0.5 * (1 + float(np.cos(np.pi * done)))


class Rounded:
    """The network with every chosen value and weight rounded on its way; its weights can be trained."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = centred(model)
        self.layout = lay_out(self.model)
        self.network = OnnxModule(self.model).requires_grad_(False)
        for index in self.layout.convolutions:  # the last ones stay as they are: they are what scores mean
            for parameter in self.network.convolution(index):
                parameter.requires_grad_(True)
        self.ranges: dict[str, Range] = {FIRST: Range(1.0, CENTRE)}

    def calibrate(self, batches: Sequence[Tensor]) -> None:
        """Set the range of every value: the part of its spread that costs least when it is written in 8 bits."""
        samples: dict[str, list[np.ndarray]] = {}
        rng = np.random.default_rng(0)

        def look(name: str, value: Tensor) -> Tensor:
            if name in self.layout.values and name not in self.ranges:
                flat = value.reshape(-1).numpy()
                picked = flat[rng.integers(0, flat.size, min(_SAMPLES, flat.size))]
                samples.setdefault(name, []).append(np.concatenate([picked, [flat.min(), flat.max()]]))
            return value

        with torch.inference_mode():
            for batch in batches:
                self.network(batch, look)
        for name, parts in samples.items():
            self.ranges[name] = best_range(np.concatenate(parts))
        for name, other in self.layout.alias.items():
            self.ranges[name] = self.ranges[other]

    def spare(self, tiles: Tensor) -> list[int]:
        """Leave float32 to the convolutions whose rounding alone makes much of the difference; returns them."""
        with torch.inference_mode():
            wanted = self.network(tiles)

            def cost(rounded: set[int]) -> float:
                given = self.network(tiles, lambda n, v: self.tap(n, v) if _index(n) in rounded else v)
                return sum(float(_difference(given[name], wanted[name])) for name in wanted)

            whole = cost(self.layout.convolutions)
            costs = {index: cost({index}) for index in sorted(self.layout.convolutions)}
        worst = sorted(costs, key=lambda index: -costs[index])[:_SPARED]
        spared = [index for index in worst if costs[index] > _COSTLY * whole]
        self.layout.convolutions -= set(spared)
        return spared

    def tap(self, name: str, value: Tensor) -> Tensor:
        """Rounds what is to be rounded."""
        if _index(name) in self.layout.convolutions:
            scale = weight_scale(value.detach())
            zeros = torch.zeros(len(scale), dtype=torch.int32)
            return torch.fake_quantize_per_channel_affine(value, scale, zeros, 0, -WEIGHT_MOST, WEIGHT_MOST)
        if name in self.layout.values:
            found = self.ranges[name]
            return torch.fake_quantize_per_tensor_affine(value, found.scale, found.zero, 0, LEVELS)
        return value

    def train(self, batch: Callable[[int], Tensor], how: Training, say: Callable[[str], None]) -> None:
        """Make it say what the whole network says.

        Args:
            batch: Tiles of an iteration, as the model takes them.
            how: For how long, and how fast.
            say: Told of progress.
        """
        teacher = OnnxModule(self.model).requires_grad_(False)
        optimiser = torch.optim.Adam([p for p in self.network.parameters() if p.requires_grad], lr=how.rate)
        started, mean = time.monotonic(), 0.0
        for iteration in range(how.iterations):
            for group in optimiser.param_groups:
                group["lr"] = how.rate_at(iteration)
            tiles = batch(iteration)
            with torch.no_grad():
                wanted = teacher(tiles)
            given = self.network(tiles, self.tap)
            loss = torch.stack([_difference(given[name], wanted[name]) for name in wanted]).sum()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            mean = loss.item() if not iteration else 0.95 * mean + 0.05 * loss.item()
            if (iteration + 1) % 50 == 0:
                say(
                    f"int8: {iteration + 1} of {how.iterations} batches, difference {mean:.4f}, "
                    f"{time.monotonic() - started:.0f} s"
                )


def _index(name: str) -> int | None:
    """The node whose weight is called so; None for any other value."""
    return int(name[7:]) if name.startswith("weight_") else None


def _difference(given: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared difference, as part of the spread of what is wanted."""
    return (given - wanted).square().mean() / (wanted.var() + 1e-6)


def weight_scale(weight: Tensor) -> Tensor:
    """Of each output channel, so that its largest weight is ±63."""
    return (weight.abs().amax(dim=tuple(range(1, weight.ndim))) / WEIGHT_MOST).clamp_min(1e-12)


def best_range(values: np.ndarray) -> Range:
    """The range of 256 steps with the least squared error over ``values``; 0 is always written exactly."""
    low, high = min(0.0, float(values.min())), max(float(values.max()), 1e-6)
    best, least = Range(1.0, 0), np.inf
    for ratio in _RATIOS:
        scale = ratio * (high - low) / LEVELS
        found = Range(scale, int(np.clip(round(-ratio * low / scale), 0, LEVELS)))
        written = (np.clip(np.round(values / scale) + found.zero, 0, LEVELS) - found.zero) * scale
        error = float(np.square(written - values).mean())
        if error < least:
            best, least = found, error
    return best
