"""What region-based detectors are made of: anchors, box arithmetic, suppression, pooling of regions.

Suppression and pooling are plain torch here and become ONNX's own NonMaxSuppression and RoiAlign in an exported file:
both compute the same from the same boxes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

RATIOS = (0.5, 1.0, 2.0)
"""Height over width of the anchors."""
_MOST = 4.0  # of the logarithm of a magnification: e⁴ is 55
_SAMPLES = 2  # per side of a pooled cell


def anchors(shape: tuple[Any, Any], stride_px: int, sizes: Sequence[float]) -> Tensor:
    """Anchors of a map: (h · w · A, 4) float32 x0, y0, x1, y1 in pixels, cell by cell; A sizes times ratios.

    Args:
        shape: (h, w) of the map; may be traced.
        stride_px: Pixels of a cell.
        sizes: Square roots of the anchors' areas in cells.
    """
    sides = [(size * stride_px / ratio**0.5, size * stride_px * ratio**0.5) for size in sizes for ratio in RATIOS]
    half = torch.tensor(sides) / 2
    x = (torch.arange(shape[1]).float() + 0.5) * stride_px
    y = (torch.arange(shape[0]).float() + 0.5) * stride_px
    zero = torch.zeros_like(y)[:, None, None] + torch.zeros_like(x)[None, :, None]
    middle_x, middle_y = zero + x[None, :, None], zero + y[:, None, None]
    corners = [middle_x - half[:, 0], middle_y - half[:, 1], middle_x + half[:, 0], middle_y + half[:, 1]]
    return torch.stack(corners, dim=-1).reshape(-1, 4)


def decode(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Boxes (N, 4) moved and stretched by deltas (N, 4), as Faster R-CNN codes them (Ren et al. 2015)."""
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    x = boxes[:, 0] + width / 2 + deltas[:, 0] * width
    y = boxes[:, 1] + height / 2 + deltas[:, 1] * height
    w, h = width * deltas[:, 2].clamp(max=_MOST).exp(), height * deltas[:, 3].clamp(max=_MOST).exp()
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=1)


def encode(boxes: Tensor, wanted: Tensor) -> Tensor:
    """The deltas (N, 4) that :func:`decode` turns from ``boxes`` into ``wanted``."""
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    w, h = wanted[:, 2] - wanted[:, 0], wanted[:, 3] - wanted[:, 1]
    x = (wanted[:, 0] + w / 2 - boxes[:, 0] - width / 2) / width
    y = (wanted[:, 1] + h / 2 - boxes[:, 1] - height / 2) / height
    return torch.stack([x, y, (w / width).log(), (h / height).log()], dim=1)


def clip(boxes: Tensor, height: Any, width: Any) -> Tensor:
    """Boxes cut off at a picture; ``height`` and ``width`` may be traced."""
    far_x, far_y = (torch.as_tensor(v, dtype=boxes.dtype) for v in (width, height))
    x0, y0 = boxes[:, 0].clamp(min=0), boxes[:, 1].clamp(min=0)
    x1, y1 = torch.minimum(boxes[:, 2], far_x), torch.minimum(boxes[:, 3], far_y)
    return torch.stack([torch.minimum(x0, far_x), torch.minimum(y0, far_y), x1.clamp(min=0), y1.clamp(min=0)], dim=1)


def iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU of boxes (N, 4) and (M, 4): (N, M)."""
    shared = (
        (
            torch.minimum(first[:, None, 2:], second[None, :, 2:])
            - torch.maximum(first[:, None, :2], second[None, :, :2])
        )
        .clamp(min=0)
        .prod(dim=2)
    )
    one, other = ((b[:, 2:] - b[:, :2]).prod(dim=1) for b in (first, second))
    return shared / (one[:, None] + other[None] - shared).clamp(min=1e-9)


def suppress(boxes: Tensor, scores: Tensor, above: float, minimum: float, limit: int) -> Tensor:
    """Greedy suppression, class by class.

    Args:
        boxes: (N, 4).
        scores: (C, N).
        above: A box that overlaps a better one of its class by more than this IoU is dropped.
        minimum: Boxes whose score is not above this are dropped.
        limit: At most so many of a class.

    Returns:
        (S, 2) int64: class and box of those that stay; class by class, the best first.
    """
    if torch.onnx.is_in_onnx_export():
        return _Suppress.apply(boxes, scores, above, minimum, limit)
    return _suppress(boxes, scores, above, minimum, limit)


def _suppress(boxes: Tensor, scores: Tensor, above: float, minimum: float, limit: int) -> Tensor:
    kept = [torch.zeros(0, 2, dtype=torch.int64)]
    for index, row in enumerate(scores.detach()):
        able = (row > minimum).nonzero()[:, 0]
        order = able[row[able].argsort(descending=True, stable=True)]
        own = boxes.detach()[order]
        overlap = iou(own, own) > above
        alive = torch.ones(len(order), dtype=torch.bool)
        chosen: list[int] = []
        for i in range(len(order)):
            if alive[i]:
                chosen.append(i)
                alive &= ~overlap[i]
                if len(chosen) == limit:
                    break
        best = order[chosen]
        kept.append(torch.stack([torch.full_like(best, index), best], dim=1))
    return torch.cat(kept)


class _Suppress(torch.autograd.Function):
    """NonMaxSuppression in an exported file."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, above: float, minimum: float, limit: int) -> Tensor:
        return _suppress(boxes, scores, above, minimum, limit)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, above: float, minimum: float, limit: int) -> Any:
        def constant(value: Any, kind: torch.dtype) -> Any:
            return g.op("Constant", value_t=torch.tensor([value], dtype=kind))

        one = constant(0, torch.int64)
        found = g.op(
            "NonMaxSuppression",
            g.op("Unsqueeze", boxes, one),
            g.op("Unsqueeze", scores, one),
            constant(limit, torch.int64),
            constant(above, torch.float32),
            constant(minimum, torch.float32),
        )
        columns = g.op("Constant", value_t=torch.tensor([1, 2], dtype=torch.int64))
        return g.op("Gather", found, columns, axis_i=1)


def pool_regions(features: Tensor, boxes: Tensor, cells: int, stride_px: int) -> Tensor:
    """RoIAlign (He et al. 2017): features (1, C, h, w) under boxes (N, 4) in pixels → (N, C, cells, cells)."""
    if torch.onnx.is_in_onnx_export():
        return _PoolRegions.apply(features, boxes, cells, stride_px)
    return _pool_regions(features, boxes, cells, stride_px)


def _pool_regions(features: Tensor, boxes: Tensor, cells: int, stride_px: int) -> Tensor:
    count, (rows, cols) = len(boxes), features.shape[2:]
    side = cells * _SAMPLES
    at = (torch.arange(side).to(features) + 0.5) / side
    start, size = boxes[:, :2] / stride_px - 0.5, (boxes[:, 2:] - boxes[:, :2]) / stride_px
    x = start[:, :1] + at * size[:, :1]
    y = start[:, 1:] + at * size[:, 1:]
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    grid = 2 * grid / torch.tensor([max(cols - 1, 1), max(rows - 1, 1)]).to(features) - 1
    flat = grid.reshape(1, count * side, side, 2)
    sampled = grid_sample(features, flat, mode="bilinear", padding_mode="border", align_corners=True)
    split = sampled.reshape(features.shape[1], count, cells, _SAMPLES, cells, _SAMPLES)
    return split.mean(dim=(3, 5)).transpose(0, 1)


class _PoolRegions(torch.autograd.Function):
    """RoiAlign in an exported file."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, boxes: Tensor, cells: int, stride_px: int) -> Tensor:
        return _pool_regions(features, boxes, cells, stride_px)

    @staticmethod
    def symbolic(g: Any, features: Any, boxes: Any, cells: int, stride_px: int) -> Any:
        count = g.op("Shape", boxes, start_i=0, end_i=1)
        picture = g.op("ConstantOfShape", count, value_t=torch.tensor([0], dtype=torch.int64))
        return g.op(
            "RoiAlign",
            features,
            boxes,
            picture,
            coordinate_transformation_mode_s="half_pixel",
            output_height_i=cells,
            output_width_i=cells,
            sampling_ratio_i=_SAMPLES,
            spatial_scale_f=1.0 / stride_px,
        )
