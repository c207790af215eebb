"""The second stage: crops round objects, each with several types at once, and then normal or abnormal.

One network with a sigmoid for every type, as the red-cell study has; gradient boosting on the types' probabilities says
whether a patch is abnormal. A type that nobody stated for a patch is neither learnt nor tested on it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from wsiengine.datasets.rows import NO, UNKNOWN, YES, Annotated
from wsiengine.training.backbone import Backbone
from wsiengine.training.detection_data import Augment, Sample, draw_around

STEPS = 17
"""Of MobileNetV2: up to 160 channels at stride 32, without the wide last layers."""


class PatchNet(nn.Module):
    """Types of a crop: the first steps of a backbone, the mean of their map, one logit a type.

    Args:
        backbone: Any; so many of its ``steps`` are used.
        types: How many.
    """

    def __init__(self, backbone: Backbone, types: int, steps: int = STEPS) -> None:
        super().__init__()
        self.backbone, self.steps = backbone, steps
        with torch.no_grad():
            channels = self._features(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)).shape[1]
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(channels, types)

    def _features(self, crops: Tensor) -> Tensor:
        x = self.backbone.prepare(crops.permute(0, 3, 1, 2))
        for step in self.backbone.steps[: self.steps]:
            x = step(x)
        return x.mean(dim=(2, 3))

    def forward(self, crops: Tensor) -> Tensor:
        """Logits (N, types) of uint8 crops (N, H, W, 3); H, W multiples of 32."""
        return self.head(self.dropout(self._features(crops)))


@dataclass(frozen=True)
class PatchRows:
    """Patches of which something is known.

    Attributes:
        image: (N,) int64, index of the image.
        centre_xy: (N, 2) float64.
        types: (N, T) int8.
    """

    image: np.ndarray
    centre_xy: np.ndarray
    types: np.ndarray

    def __len__(self) -> int:
        return len(self.image)


def known_patches(rows: tuple[Annotated, ...]) -> PatchRows:
    """The patches of these images with at least one type said to be there."""
    image, centre, types = [], [], []
    for index, row in enumerate(rows):
        objects = row.objects
        keep = (objects.types == YES).any(axis=1) & ~objects.ignored
        boxes = objects.boxes_xyxy[keep]
        image.append(np.full(len(boxes), index))
        centre.append((boxes[:, :2] + boxes[:, 2:]) / 2)
        types.append(objects.types[keep])
    return PatchRows(np.concatenate(image), np.concatenate(centre), np.concatenate(types))


def abnormal(types: np.ndarray, normal: int) -> np.ndarray:
    """(N,) int8: :data:`YES` where a type other than the normal one is there, :data:`NO` where none is, else unknown.

    Args:
        types: (N, T) int8.
        normal: Index of the normal type.
    """
    others = np.delete(types, normal, axis=1)
    some, none = (others == YES).any(axis=1), (others == NO).all(axis=1)
    return np.where(some, YES, np.where(none, NO, UNKNOWN)).astype(np.int8)


class PatchSampler:
    """Batches of crops: half of them as they come, half with every type as often as every other."""

    def __init__(self, samples: list[Sample], patches: PatchRows, augment: Augment, batch: int) -> None:
        self.samples, self.patches, self.augment, self.batch = samples, patches, augment, batch
        self._of_type = [where for t in patches.types.T if len(where := np.flatnonzero(t == YES))]

    def __call__(self, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """uint8 (N, side, side, 3) and int8 (N, T)."""
        chosen = [self._choose(random, i % 2 == 0) for i in range(self.batch)]
        crops = [self._crop(i, random) for i in chosen]
        return torch.from_numpy(np.stack(crops)), torch.from_numpy(self.patches.types[chosen])

    def _choose(self, random: np.random.Generator, balanced: bool) -> int:
        if not balanced:
            return int(random.integers(len(self.patches)))
        return int(random.choice(self._of_type[random.integers(len(self._of_type))]))

    def _crop(self, index: int, random: np.random.Generator) -> np.ndarray:
        x, y = self.patches.centre_xy[index] + random.normal(0, 2.0, 2)  # a detector's centre is not the true one
        return draw_around(self.samples[self.patches.image[index]].pixels, (x, y), self.augment, random)


def patch_loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Binary cross-entropy over the types that are known."""
    crops, types = batch
    logits = network(crops)
    known = types != UNKNOWN
    smooth = (types == YES).float() * 0.96 + 0.02
    loss = binary_cross_entropy_with_logits(logits[known], smooth[known])
    return loss, {"types_loss": loss}
