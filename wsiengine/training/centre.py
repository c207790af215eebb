"""An anchor-free detector: a heat map of centres, and at each centre the way to the four sides of its box.

Objects are the peaks of the heat map (CenterNet, Zhou et al. 2019); the Gaussian round a centre takes the shape of its
box, and all of it learns the box (TTFNet, Liu et al. 2020), by the generalised IoU (Rezatofighi et al. 2019). Features
of several strides are joined from coarse to fine (Lin et al. 2017).
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d, pad

from wsiengine.datasets.rows import Objects
from wsiengine.training.backbone import Backbone

STRIDES = (4, 8, 16)
STRIDE_PX = STRIDES[0]
_SHAPE = 0.54 / 6  # standard deviation of the Gaussian as part of the box's side (Liu et al. 2020)


class CentreNet(nn.Module):
    """Backbone, top-down neck and two heads on stride 4.

    Args:
        backbone: Any; its maps at strides 4, 8 and 16 are used.
        classes: Number of classes.
        width: Channels of the neck.
        fill: Grey value (0–255) with which pictures are filled up to whole cells of the coarsest map.
        areas: A third head learns where objects lie; it shapes the features and is not exported.
        usual_px: Side of a usual object: what boxes begin with.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        *,
        width: int = 48,
        fill: int = 255,
        areas: bool = False,
        usual_px: float = 26.0,
    ) -> None:
        super().__init__()
        self.backbone, self.fill = backbone, fill
        self.lateral = nn.ModuleList([nn.Conv2d(backbone.channels[stride], width, 1) for stride in STRIDES])
        self.smooth = nn.ModuleList([_separable(width) for _ in STRIDES[1:]])
        self.heat_body, self.heat = _separable(width), nn.Conv2d(width, classes, 1)
        self.sides_body, self.sides = _separable(width), nn.Conv2d(width, 4, 1)
        self.areas = nn.Conv2d(width, 1, 1) if areas else None
        for layer, start in ((self.heat, -3.5), (self.sides, float(np.log(usual_px / 2 / STRIDE_PX)))):
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            nn.init.constant_(layer.bias, start)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Heat logits (N, classes, h, w) and distances to left, top, right, bottom in pixels (N, 4, h, w).

        Args:
            pixels: uint8 (N, 3, H, W), any size; h = H / 4 and w = W / 4 after filling up to whole 16 px.
        """
        return self.read(self.features(pixels))

    def features(self, pixels: Tensor) -> Tensor:
        """What the heads read: (N, width, h, w)."""
        full = STRIDES[-1]
        border = (0, (full - pixels.shape[3] % full) % full, 0, (full - pixels.shape[2] % full) % full)
        x = self.backbone.prepare(pad(pixels.float(), border, value=float(self.fill)))
        maps = [layer(m) for layer, m in zip(self.lateral, self.backbone.pyramid(x, STRIDES), strict=True)]
        top = maps[-1]
        for finer, smooth in zip(maps[-2::-1], self.smooth, strict=True):
            top = smooth(finer + interpolate(top, scale_factor=2.0, mode="nearest"))
        return top

    def read(self, top: Tensor) -> tuple[Tensor, Tensor]:
        """Heat and distances from the features."""
        sides = self.sides(self.sides_body(top)).clamp(-3.0, 6.0).exp() * STRIDE_PX
        return self.heat(self.heat_body(top)), sides


def _separable(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, groups=width), nn.Conv2d(width, width, 1), nn.ReLU(inplace=True)
    )


class CentreDetector(nn.Module):
    """The network with its peaks read: uint8 pixels in, boxes out; what the ONNX file holds.

    Args:
        network: Trained.
        limit: At most so many objects of a picture, the best.
    """

    def __init__(self, network: CentreNet, limit: int = 300) -> None:
        super().__init__()
        self.network, self.limit = network, limit

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (K, 4) float32 x0, y0, x1, y1 in pixels, scores (K,) float32, labels (K,) int64, best first.

        Args:
            pixels: uint8 (1, H, W, 3).
        """
        heat, sides = self.network(pixels.permute(0, 3, 1, 2))
        heat = heat.sigmoid()
        peaks = heat * (heat == max_pool2d(heat, 3, 1, 1))
        classes, width = peaks.shape[1], peaks.shape[3]
        cells = peaks.shape[2] * width
        scores, order = peaks[0].reshape(-1).sort(descending=True)
        scores, order = scores[: self.limit], order[: self.limit]
        place = order % cells
        x = (place % width).float() * STRIDE_PX + STRIDE_PX / 2
        y = (place // width).float() * STRIDE_PX + STRIDE_PX / 2
        left, top, right, bottom = sides[0].reshape(4, -1)[:, place]
        far_x, far_y = pixels.shape[2], pixels.shape[1]
        boxes = torch.stack(
            [
                (x - left).clamp(min=0),
                (y - top).clamp(min=0),
                torch.minimum(x + right, torch.as_tensor(far_x, dtype=x.dtype)),
                torch.minimum(y + bottom, torch.as_tensor(far_y, dtype=x.dtype)),
            ],
            dim=1,
        )
        return boxes, scores, order // cells if classes > 1 else torch.zeros_like(order)


def targets(objects: Objects, classes: int, shape: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """What the network should say of one picture.

    Args:
        objects: In pixels of the picture.
        classes: Number of classes.
        shape: (h, w) of the maps.

    Returns:
        Heat (classes, h, w) float32 0–1; boxes (4, h, w) float32 x0, y0, x1, y1 in pixels; weight of the box (h, w)
        float32, summing to 1 for an object; counted (h, w) float32, 0 where an ignored object lies.
    """
    heat = np.zeros((classes, *shape), np.float32)
    boxes = np.zeros((4, *shape), np.float32)
    weight = np.zeros(shape, np.float32)
    counted = np.ones(shape, np.float32)
    area = np.prod(objects.boxes_xyxy[:, 2:] - objects.boxes_xyxy[:, :2], axis=1)
    for i in np.argsort(-area, kind="stable"):  # small ones last: they keep their centre
        x0, y0, x1, y1 = objects.boxes_xyxy[i] / STRIDE_PX
        if objects.ignored[i]:
            counted[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = 0
            continue
        cx, cy = (min(int((a + b) / 2), n - 1) for a, b, n in ((x0, x1, shape[1]), (y0, y1, shape[0])))
        bell_y = _bell(np.arange(shape[0]) - cy, y1 - y0)
        bell_x = _bell(np.arange(shape[1]) - cx, x1 - x0)
        bell = bell_y[:, None] * bell_x
        np.maximum(heat[objects.labels[i]], bell, out=heat[objects.labels[i]])
        near = bell > 0.1
        boxes[:, near] = objects.boxes_xyxy[i].astype(np.float32)[:, None]
        weight[near] = bell[near] / bell[near].sum()
        counted[near] = 1
    return heat, boxes, weight, counted


def _bell(away: np.ndarray, side: float) -> np.ndarray:
    deviation = max(_SHAPE * side, 0.4)
    return np.exp(-(away**2) / (2 * deviation**2))


def centre_loss(heat: Tensor, sides: Tensor, wanted: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Focal loss of the heat map and GIoU loss of the boxes, both per object.

    Args:
        heat: Logits (N, C, h, w).
        sides: (N, 4, h, w) pixels.
        wanted: As :func:`targets`, with a first axis N.
    """
    want, boxes, weight, counted = wanted
    found = heat.float().sigmoid().clamp(1e-4, 1 - 1e-4)
    centre = (want == 1).float()
    hit = centre * (1 - found) ** 2 * found.log()
    miss = (1 - centre) * (1 - want) ** 4 * found**2 * (1 - found).log() * counted[:, None]
    objects = centre.sum().clamp(min=1)
    by_heat = -(hit.sum() + miss.sum()) / objects
    rows, cols = heat.shape[2:]
    y = (torch.arange(rows) + 0.5)[:, None] * STRIDE_PX
    x = (torch.arange(cols) + 0.5)[None] * STRIDE_PX
    left, top, right, bottom = sides.float().unbind(1)
    made = torch.stack([x - left, y - top, x + right, y + bottom], 1)
    on = weight > 0
    gained = giou(made.permute(0, 2, 3, 1)[on], boxes.permute(0, 2, 3, 1)[on])
    by_box = ((1 - gained) * weight[on]).sum() / weight.sum().clamp(min=1)
    return by_heat, by_box


def giou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU of boxes x0, y0, x1, y1, row by row: (N, 4), (N, 4) → (N,)."""
    shared = (torch.minimum(first[:, 2:], second[:, 2:]) - torch.maximum(first[:, :2], second[:, :2])).clamp(min=0)
    hull = (torch.maximum(first[:, 2:], second[:, 2:]) - torch.minimum(first[:, :2], second[:, :2])).clamp(min=0)
    common, round_both = shared.prod(1), hull.prod(1).clamp(min=1e-6)
    union = (first[:, 2:] - first[:, :2]).prod(1) + (second[:, 2:] - second[:, :2]).prod(1) - common
    return common / union.clamp(min=1e-6) - (round_both - union) / round_both
