"""Training of the anchor-free detector: crops, what they should say, and the loss."""

from dataclasses import asdict
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from wsiengine.datasets.rows import Objects
from wsiengine.training.centre import STRIDE_PX, CentreNet, centre_loss, targets
from wsiengine.training.detection_data import Augment, Sample, draw
from wsiengine.training.detection_loop import Batch, Lesson

_BOX_WEIGHT = 2.0


def centre_lesson(
    network: CentreNet, samples: list[Sample], augment: Augment, batch: int, facts: dict[str, Any] | None = None
) -> Lesson:
    """What :func:`wsiengine.training.detection_loop.fit` needs.

    Args:
        network: To be trained.
        samples: Images in memory.
        augment: How crops differ.
        batch: Crops at once.
        facts: What else decides the weights.
    """
    classes = network.heat.out_channels

    def drawn(random: np.random.Generator) -> Batch:
        crops = [draw(samples[i], augment, random) for i in random.integers(len(samples), size=batch)]
        side = -(-augment.side_px // 16) * 16 // STRIDE_PX
        wanted = [(*targets(c.objects, classes, (side, side)), area_map(c.objects, side)) for c in crops]
        pixels = torch.from_numpy(np.stack([c.pixels for c in crops])).permute(0, 3, 1, 2)
        return pixels, *(torch.from_numpy(np.stack(part)) for part in zip(*wanted, strict=True))

    said = {"recipe": "centre", "augment": asdict(augment), "batch": batch, "classes": classes, **(facts or {})}
    return Lesson(network, drawn, _loss, said)


def area_map(objects: Objects, side: int) -> np.ndarray:
    """(side, side) float32: 1 where an object lies, NaN where an ignored one does, 0 elsewhere; cells of the heads."""
    area = np.zeros((side, side), np.float32)
    for i in np.argsort(~objects.ignored, kind="stable"):
        ring = np.rint(objects.outline(int(i)) / STRIDE_PX - 0.5).astype(np.int32)
        cv2.fillPoly(area, [ring.reshape(-1, 1, 2)], float("nan") if objects.ignored[i] else 1.0)
    return area


def _loss(network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    assert isinstance(network, CentreNet)
    pixels, *wanted, area = batch
    top = network.features(pixels)
    by_heat, by_box = centre_loss(*network.read(top), tuple(wanted))
    parts = {"heat_loss": by_heat, "box_loss": by_box}
    if network.areas is not None:
        parts["area_loss"] = _area_loss(network.areas(top)[:, 0], area)
    return by_heat + _BOX_WEIGHT * by_box + parts.get("area_loss", torch.zeros(())), parts


def _area_loss(logits: Tensor, area: Tensor) -> Tensor:
    """Cross-entropy plus what is missing to a Dice of 1 (Milletari et al. 2016)."""
    known = ~area.isnan()
    said, true = logits[known], area[known]
    found = said.sigmoid()
    dice = (2 * (found * true).sum() + 1) / (found.sum() + true.sum() + 1)
    return binary_cross_entropy_with_logits(said, true) + 1 - dice
