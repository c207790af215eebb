"""What every backbone offers: pixels in, maps of features out, at strides of 4, 8, 16 and 32 pixels.

A backbone is a chain of *steps*; the last step of a stride gives that stride's map. Freezing counts steps, from the
first. Modules carry the names that torchvision's networks have, so that a file of weights in its layout fits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
"""Mean and standard deviation of ImageNet's pixels, 0 to 255: what most published weights were trained on."""
CENTRED = ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5))
"""Pixels from −1 to 1."""
STRIDES = (4, 8, 16, 32)


def halved(device: str = "cpu") -> torch.autocast:
    """A context in bfloat16 where that is faster; processors without AVX-512 emulate it at a tenth of the speed."""
    slow = device == "cpu" and not torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.autocast(device, dtype=torch.bfloat16, enabled=not slow)


class Backbone(nn.Module):
    """Base of all backbones. A subclass calls :meth:`chain` at the end of its ``__init__``.

    Attributes:
        channels: Channels of the map at each stride.
        features: Channels of the last map (stride 32).
        offset_px: The input pixel on which cell 0 of the last map is centred; cell i lies 32 i further.
        halo_px: Context beyond which a cell of the last map hardly changes (measured); None where that is so much that
            running it over dense blocks does not pay.
        statistics: Whether batch normalisation learns its statistics in training. Published weights keep theirs: the
            batches here are small, and of odd tissue.
    """

    channels: dict[int, int]
    scale: Tensor
    shift: Tensor
    features: int
    offset_px: float = 0.0
    halo_px: int | None = None
    statistics: bool = False

    def __init__(self, pixels: tuple[Sequence[float], Sequence[float]] = IMAGENET) -> None:
        super().__init__()
        self._frozen = 0
        mean, std = (torch.tensor(v, dtype=torch.float32).reshape(1, 3, 1, 1) for v in pixels)
        self.register_buffer("scale", 1 / std, persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def chain(self, steps: Sequence[nn.Module], ends: dict[int, tuple[int, int]]) -> None:
        """Set the steps, and of each stride the number of steps up to its map and the map's channels."""
        self._steps = tuple(steps)  # a tuple: modules keep the names that the subclass gave them
        self._ends = {stride: count for stride, (count, _) in ends.items()}
        self.channels = {stride: width for stride, (_, width) in ends.items()}
        self.features = self.channels[32]

    @property
    def steps(self) -> tuple[nn.Module, ...]:
        """The chain, in order."""
        return self._steps

    def prepare(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W), uint8 or float 0 to 255 → what :meth:`forward` takes."""
        return pixels.float() * self.scale + self.shift

    def forward(self, x: Tensor, frozen: int = 0) -> Tensor:
        """The map at stride 32; the first ``frozen`` steps learn nothing, and are run as :func:`halved` says.

        Args:
            x: Prepared pixels (N, 3, H, W); H and W multiples of 32.
            frozen: Steps.

        Returns:
            (N, features, H/32, W/32).
        """
        if frozen:
            with torch.no_grad(), halved(x.device.type):
                for step in self.steps[:frozen]:
                    x = step(x)
            x = x.float()
        for step in self.steps[frozen:]:
            x = step(x)
        return x

    def pyramid(self, x: Tensor, at: Sequence[int] = STRIDES) -> list[Tensor]:
        """The maps at several strides, for decoders: (N, channels[s], H/s, W/s) for each s of ``at``."""
        wanted = {self._ends[stride]: stride for stride in at}
        found = {}
        for done, step in enumerate(self.steps[: max(wanted)], start=1):
            x = step(x)
            if done in wanted:
                found[wanted[done]] = x
        return [found[stride] for stride in at]

    def freeze(self, steps: int) -> None:
        """Let the first steps learn nothing, and the others learn."""
        for index, step in enumerate(self.steps):
            step.requires_grad_(index >= steps)
        self._frozen = steps
        self.train(self.training)

    def train(self, mode: bool = True) -> "Backbone":
        """As of any module; but batch normalisation of frozen steps, or without ``statistics``, stands still."""
        super().train(mode)
        still = self.steps[: self._frozen] if self.statistics else (self,)
        for step in still:
            for module in step.modules():
                if isinstance(module, nn.BatchNorm2d):
                    nn.Module.train(module, False)
        return self
