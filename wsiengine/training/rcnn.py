"""Faster and Mask R-CNN (Ren et al. 2015; He et al. 2017) on any of the backbones, in plain torch.

A feature pyramid (Lin et al. 2017) is summed down to stride 4; proposals come from all of its maps, regions are pooled
from the one at stride 8, into which the coarser ones are summed. Pictures keep their size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from wsiengine.training.backbone import Backbone
from wsiengine.training.rcnn_parts import RATIOS, anchors, clip, decode, pool_regions, suppress

STRIDES = (4, 8, 16, 32)
POOLED_PX = 8
BOX_CELLS, MASK_CELLS = 7, 14
DELTA_SCALE = (0.1, 0.1, 0.2, 0.2)
"""Of the box head's deltas, so that all losses are alike in size."""


@dataclass(frozen=True)
class Limits:
    """How many boxes go from step to step, and what is suppressed.

    Attributes:
        before, proposals: Proposals before and after suppression.
        proposal_iou, iou: Overlap above which the less likely box is dropped, among proposals and among objects.
        minimum: Objects of no higher score are dropped.
        objects: At most so many of a class.
    """

    before: int = 1000
    proposals: int = 200
    proposal_iou: float = 0.7
    iou: float = 0.5
    minimum: float = 0.05
    objects: int = 100


class RcnnNet(nn.Module):
    """The network.

    Args:
        backbone: Any; its maps at strides 4 to 32 are used.
        classes: Number of classes, without background.
        masks: With a mask head (Mask R-CNN).
        width: Channels of the pyramid.
        sizes: Square roots of the anchors' areas, in cells of each map.
        fill: Grey value (0–255) with which pictures are filled up to whole cells of the coarsest map.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        *,
        masks: bool,
        width: int = 64,
        sizes: tuple[float, ...] = (4.0, 6.35),
        fill: int = 255,
    ) -> None:
        super().__init__()
        self.backbone, self.classes, self.sizes, self.fill = backbone, classes, sizes, fill
        self.lateral = nn.ModuleList([nn.Conv2d(backbone.channels[stride], width, 1) for stride in STRIDES])
        self.smooth = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in STRIDES])
        each = len(sizes) * len(RATIOS)
        self.proposal_body = nn.Conv2d(width, width, 3, padding=1)
        self.proposal_score, self.proposal_delta = nn.Conv2d(width, each, 1), nn.Conv2d(width, 4 * each, 1)
        self.box_body = nn.Sequential(
            nn.Flatten(),
            nn.Linear(width * BOX_CELLS**2, 4 * width),
            nn.ReLU(),
            nn.Linear(4 * width, 4 * width),
            nn.ReLU(),
        )
        self.box_score, self.box_delta = nn.Linear(4 * width, classes + 1), nn.Linear(4 * width, 4)
        self.mask_head = _mask_head(width, classes) if masks else None
        for layer in (self.proposal_score, self.proposal_delta, self.box_score, self.box_delta):
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def pyramid(self, pixels: Tensor) -> list[Tensor]:
        """The maps (N, width, H/s, W/s) at :data:`STRIDES`, of uint8 pixels (N, 3, H, W) filled up to whole 32 px."""
        full = STRIDES[-1]
        border = (0, (full - pixels.shape[3] % full) % full, 0, (full - pixels.shape[2] % full) % full)
        x = self.backbone.prepare(pad(pixels.float(), border, value=float(self.fill)))
        maps = [layer(m) for layer, m in zip(self.lateral, self.backbone.pyramid(x, STRIDES), strict=True)]
        for i in range(len(maps) - 2, -1, -1):
            maps[i] = maps[i] + interpolate(maps[i + 1], scale_factor=2.0, mode="nearest")
        return [smooth(m) for smooth, m in zip(self.smooth, maps, strict=True)]

    def propose(self, maps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Of every anchor of every picture: score logits (N, K), deltas (N, K, 4); and the anchors (K, 4)."""
        scores, deltas, places = [], [], []
        for stride, features in zip(STRIDES, maps, strict=True):
            x = self.proposal_body(features).relu()
            scores.append(self.proposal_score(x).permute(0, 2, 3, 1).flatten(1))
            deltas.append(self.proposal_delta(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4))
            places.append(anchors((features.shape[2], features.shape[3]), stride, self.sizes))
        return torch.cat(scores, 1), torch.cat(deltas, 1), torch.cat(places)

    def judge(self, features: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (B, 1 + classes), background first, and deltas (B, 4) of boxes on one picture's pooled map."""
        x = self.box_body(pool_regions(features, boxes, BOX_CELLS, POOLED_PX))
        return self.box_score(x), self.box_delta(x) * x.new_tensor(DELTA_SCALE)

    def outline(self, features: Tensor, boxes: Tensor) -> Tensor:
        """Mask logits (B, classes, 28, 28) of boxes."""
        assert self.mask_head is not None
        return self.mask_head(pool_regions(features, boxes, MASK_CELLS, POOLED_PX))


def _mask_head(width: int, classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    layers += [nn.ConvTranspose2d(width, width, 2, 2), nn.ReLU(), nn.Conv2d(width, classes, 1)]
    return nn.Sequential(*layers)


def proposals(scores: Tensor, deltas: Tensor, places: Tensor, shape: tuple[int, int], limits: Limits) -> Tensor:
    """The boxes worth a look on one picture: (P, 4), best first.

    Args:
        scores: Logits (K,) of the anchors.
        deltas: (K, 4).
        places: The anchors (K, 4).
        shape: (rows, cols) of the picture.
        limits: How many.
    """
    best, order = scores.sort(descending=True)
    best, order = best[: limits.before], order[: limits.before]
    boxes = clip(decode(places[order], deltas[order]), *shape)
    # Boxes that the picture's edge leaves nothing of cannot be pooled: they are pushed to the end.
    best = torch.where(((boxes[:, 2:] - boxes[:, :2]) > 1).all(dim=1), best.sigmoid(), torch.full_like(best, -1.0))
    kept = suppress(boxes, best[None], limits.proposal_iou, 0.0, limits.proposals)
    return boxes[kept[:, 1]]


class RcnnDetector(nn.Module):
    """The network from pixels to objects; what the ONNX file holds."""

    def __init__(self, network: RcnnNet, limits: Limits | None = None) -> None:
        super().__init__()
        self.network, self.limits = network, limits or Limits()

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Boxes (S, 4) float32 x0, y0, x1, y1 in pixels, scores (S,) float32, labels (S,) int64, best first.

        With a mask head also masks (S, 28, 28) float32, probabilities over the box.

        Args:
            pixels: uint8 (1, H, W, 3).
        """
        network, limits = self.network, self.limits
        shape = (pixels.shape[1], pixels.shape[2])
        maps = network.pyramid(pixels.permute(0, 3, 1, 2))
        scores, deltas, places = network.propose(maps)
        boxes = proposals(scores[0], deltas[0], places, shape, limits)
        features = maps[STRIDES.index(POOLED_PX)]
        logits, moved = network.judge(features, boxes)
        boxes = clip(decode(boxes, moved), *shape)
        chance = logits.softmax(dim=1)[:, 1:].t()
        kept = suppress(boxes, chance, limits.iou, limits.minimum, limits.objects)
        score, order = chance[kept[:, 0], kept[:, 1]].sort(descending=True)
        labels, boxes = kept[:, 0][order], boxes[kept[:, 1]][order]
        if network.mask_head is None:
            return boxes, score, labels
        masks = network.outline(features, boxes).sigmoid()
        return boxes, score, labels, masks[torch.arange(labels.shape[0]), labels]
