"""Training of Faster and Mask R-CNN: which anchors and regions are right, and what each is taught."""

from dataclasses import asdict
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, smooth_l1_loss

from wsiengine.datasets.rows import Objects
from wsiengine.training.detection_data import Augment, Sample, draw
from wsiengine.training.detection_loop import Batch, Lesson
from wsiengine.training.rcnn import DELTA_SCALE, POOLED_PX, STRIDES, Limits, RcnnNet, proposals
from wsiengine.training.rcnn_parts import encode, iou

_ANCHORS, _REGIONS = 128, 64  # taught per picture
_RIGHT_ANCHOR, _WRONG_ANCHOR, _RIGHT_REGION = 0.6, 0.3, 0.5
_MASK_PX = 28


def rcnn_lesson(
    network: RcnnNet, samples: list[Sample], augment: Augment, batch: int, facts: dict[str, Any] | None = None
) -> Lesson:
    """What :func:`wsiengine.training.detection_loop.fit` needs; arguments as of the anchor-free recipe."""

    def drawn(random: np.random.Generator) -> Batch:
        crops = [draw(samples[i], augment, random) for i in random.integers(len(samples), size=batch)]
        pixels = torch.from_numpy(np.stack([c.pixels for c in crops])).permute(0, 3, 1, 2)
        return pixels, [c.objects for c in crops]

    masks = network.mask_head is not None
    said = {"recipe": "rcnn", "augment": asdict(augment), "batch": batch, "classes": network.classes, "masks": masks}
    return Lesson(network, drawn, rcnn_loss, said | (facts or {}))


def rcnn_loss(network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """All losses of a batch: pixels uint8 (N, 3, H, W) and the objects of each picture."""
    assert isinstance(network, RcnnNet)
    pixels, pictures = batch
    maps = network.pyramid(pixels)
    scores, deltas, places = network.propose(maps)
    features = maps[STRIDES.index(POOLED_PX)]
    parts: dict[str, list[Tensor]] = {}
    limits = Limits(before=400, proposals=100)
    for i, objects in enumerate(pictures):
        true = torch.from_numpy(objects.boxes_xyxy[~objects.ignored]).float()
        ignored = torch.from_numpy(objects.boxes_xyxy[objects.ignored]).float()
        found = _proposal_loss(scores[i], deltas[i], places, true, ignored)
        shape = (pixels.shape[2], pixels.shape[3])
        boxes = proposals(scores[i].detach(), deltas[i].detach(), places, shape, limits)
        found |= _region_loss(network, features[i : i + 1], torch.cat([boxes, true]), objects)
        for name, loss in found.items():
            parts.setdefault(name, []).append(loss)
    means = {name: torch.stack(losses).mean() for name, losses in parts.items()}
    return torch.stack(list(means.values())).sum(), means


def _some(candidates: Tensor, count: int) -> Tensor:
    """At most ``count`` of the indices where ``candidates`` is true, drawn."""
    where = candidates.nonzero()[:, 0]
    return where[torch.randperm(len(where))[:count]]


def _proposal_loss(scores: Tensor, deltas: Tensor, places: Tensor, true: Tensor, ignored: Tensor) -> dict[str, Tensor]:
    overlap = iou(places, true) if len(true) else places.new_zeros(len(places), 1)
    best, which = overlap.max(dim=1)
    right = best >= _RIGHT_ANCHOR
    if len(true):
        right |= ((overlap == overlap.max(dim=0).values) & (overlap > 0.1)).any(dim=1)  # each object has an anchor
    wrong = (best < _WRONG_ANCHOR) & ~right
    if len(ignored):
        wrong &= iou(places, ignored).max(dim=1).values < _WRONG_ANCHOR
    good = _some(right, _ANCHORS // 2)
    bad = _some(wrong, _ANCHORS - len(good))
    asked = torch.cat([good, bad])
    wanted = torch.cat([torch.ones(len(good)), torch.zeros(len(bad))])
    moved = smooth_l1_loss(deltas[good], encode(places[good], true[which[good]]), beta=0.1, reduction="sum")
    return {
        "proposal_score_loss": binary_cross_entropy_with_logits(scores[asked], wanted),
        "proposal_box_loss": moved / max(1, len(asked)) if len(good) else deltas.sum() * 0,
    }


def _region_loss(network: RcnnNet, features: Tensor, boxes: Tensor, objects: Objects) -> dict[str, Tensor]:
    counted = np.flatnonzero(~objects.ignored)
    true = torch.from_numpy(objects.boxes_xyxy[counted]).float()
    overlap = iou(boxes, true) if len(true) else boxes.new_zeros(len(boxes), 1)
    best, which = overlap.max(dim=1)
    right = best >= _RIGHT_REGION
    wrong = ~right
    if objects.ignored.any():
        crowd = torch.from_numpy(objects.boxes_xyxy[objects.ignored]).float()
        wrong &= iou(boxes, crowd).max(dim=1).values < _WRONG_ANCHOR
    good = _some(right, _REGIONS // 4)
    asked = torch.cat([good, _some(wrong, _REGIONS - len(good))])
    labels = torch.zeros(len(asked), dtype=torch.int64)
    labels[: len(good)] = torch.from_numpy(objects.labels[counted])[which[good]] + 1 if len(good) else 0
    logits, moved = network.judge(features, boxes[asked])
    losses = {"class_loss": cross_entropy(logits, labels), "box_loss": moved.sum() * 0}
    if len(good):
        scale = torch.tensor(DELTA_SCALE)
        wanted = encode(boxes[good], true[which[good]]) / scale
        losses["box_loss"] = smooth_l1_loss(moved[: len(good)] / scale, wanted, reduction="sum") / len(asked)
    if network.mask_head is not None:
        losses["mask_loss"] = features.sum() * 0
        if len(good):
            rings = [objects.outline(int(counted[k])) for k in which[good]]
            drawn = torch.stack([_drawn(ring, box) for ring, box in zip(rings, boxes[good].numpy(), strict=True)])
            said = network.outline(features, boxes[good])[torch.arange(len(good)), labels[: len(good)] - 1]
            losses["mask_loss"] = binary_cross_entropy_with_logits(said, drawn)
    return losses


def _drawn(ring: np.ndarray, box: np.ndarray) -> Tensor:
    """The part of an outline in a box, (28, 28) float32 0 or 1."""
    scale = _MASK_PX / np.maximum(box[2:] - box[:2], 1e-6)
    points = np.rint((ring - box[:2]) * scale - 0.5).astype(np.int32)
    mask = np.zeros((_MASK_PX, _MASK_PX), np.uint8)
    cv2.fillPoly(mask, [points.reshape(-1, 1, 2)], (1,))
    return torch.from_numpy(mask).float()
