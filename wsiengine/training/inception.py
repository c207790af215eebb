"""Inception-V3 (Szegedy et al. 2016), as a backbone.

The published network leaves the border out in its stem and wherever it strides, so that 299 px give 8 cells. Here
those layers are padded: H × W pixels give H/32 × W/32 cells, each over its own pixels. Weights fit unchanged; what is
computed more than a few cells from a border is the same, moved.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d

from wsiengine.training.backbone import CENTRED, Backbone


class Unit(nn.Module):
    """Convolution, batch normalisation, ReLU; padded by half the kernel."""

    def __init__(self, channels: int, target: int, kernel: int | tuple[int, int], stride: int = 1) -> None:
        super().__init__()
        high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
        self.conv = nn.Conv2d(channels, target, (high, wide), stride, (high // 2, wide // 2), bias=False)
        self.bn = nn.BatchNorm2d(target, eps=0.001)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class MixedA(nn.Module):
    """5 × 5 and two 3 × 3 beside each other."""

    def __init__(self, channels: int, pooled: int, w: "Widths") -> None:
        super().__init__()
        self.branch1x1 = Unit(channels, w(64), 1)
        self.branch5x5_1, self.branch5x5_2 = Unit(channels, w(48), 1), Unit(w(48), w(64), 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(channels, w(64), 1), Unit(w(64), w(96), 3)
        self.branch3x3dbl_3 = Unit(w(96), w(96), 3)
        self.branch_pool = Unit(channels, w(pooled), 1)
        self.out = w(64) + w(64) + w(96) + w(pooled)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(avg_pool2d(x, 3, 1, 1))], 1)


class MixedB(nn.Module):
    """Halves the side, from stride 8 to 16."""

    def __init__(self, channels: int, w: "Widths") -> None:
        super().__init__()
        self.branch3x3 = Unit(channels, w(384), 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(channels, w(64), 1), Unit(w(64), w(96), 3)
        self.branch3x3dbl_3 = Unit(w(96), w(96), 3, 2)
        self.out = w(384) + w(96) + channels

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, max_pool2d(x, 3, 2, 1)], 1)


class MixedC(nn.Module):
    """7 × 7, as rows and columns of seven."""

    def __init__(self, channels: int, middle: int, w: "Widths") -> None:
        super().__init__()
        m, t = w(middle), w(192)
        self.branch1x1 = Unit(channels, t, 1)
        self.branch7x7_1, self.branch7x7_2 = Unit(channels, m, 1), Unit(m, m, (1, 7))
        self.branch7x7_3 = Unit(m, t, (7, 1))
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Unit(channels, m, 1), Unit(m, m, (7, 1))
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Unit(m, m, (1, 7)), Unit(m, m, (7, 1))
        self.branch7x7dbl_5 = Unit(m, t, (1, 7))
        self.branch_pool = Unit(channels, t, 1)
        self.out = 4 * t

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(avg_pool2d(x, 3, 1, 1))], 1)


class MixedD(nn.Module):
    """Halves the side, from stride 16 to 32."""

    def __init__(self, channels: int, w: "Widths") -> None:
        super().__init__()
        t = w(192)
        self.branch3x3_1, self.branch3x3_2 = Unit(channels, t, 1), Unit(t, w(320), 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Unit(channels, t, 1), Unit(t, t, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = Unit(t, t, (7, 1)), Unit(t, t, 3, 2)
        self.out = w(320) + t + channels

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, max_pool2d(x, 3, 2, 1)], 1)


class MixedE(nn.Module):
    """3 × 3, as a row and a column beside each other."""

    def __init__(self, channels: int, w: "Widths") -> None:
        super().__init__()
        half = w(384)
        self.branch1x1 = Unit(channels, w(320), 1)
        self.branch3x3_1 = Unit(channels, half, 1)
        self.branch3x3_2a, self.branch3x3_2b = Unit(half, half, (1, 3)), Unit(half, half, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(channels, w(448), 1), Unit(w(448), half, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Unit(half, half, (1, 3)), Unit(half, half, (3, 1))
        self.branch_pool = Unit(channels, w(192), 1)
        self.out = w(320) + 4 * half + w(192)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        thin = [self.branch3x3_2a(one), self.branch3x3_2b(one), self.branch3x3dbl_3a(two), self.branch3x3dbl_3b(two)]
        return torch.cat([self.branch1x1(x), *thin, self.branch_pool(avg_pool2d(x, 3, 1, 1))], 1)


class Widths:
    """Channel counts, scaled."""

    def __init__(self, width: float) -> None:
        self._width = width

    def __call__(self, channels: int) -> int:
        return max(4, int(channels * self._width))


class Inception(Backbone):
    """float [-1, 1] (N, 3, H, W) → (N, 2048, H/32, W/32).

    Args:
        width: Multiplies all channel counts; 1.0 for published weights, less in tests.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__(CENTRED)
        w = Widths(width)
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Unit(3, w(32), 3, 2), Unit(w(32), w(32), 3)
        self.Conv2d_2b_3x3 = Unit(w(32), w(64), 3)
        self.maxpool1 = nn.MaxPool2d(3, 2, 1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Unit(w(64), w(80), 1), Unit(w(80), w(192), 3)
        self.maxpool2 = nn.MaxPool2d(3, 2, 1)
        self.Mixed_5b = MixedA(w(192), 32, w)
        self.Mixed_5c = MixedA(self.Mixed_5b.out, 64, w)
        self.Mixed_5d = MixedA(self.Mixed_5c.out, 64, w)
        self.Mixed_6a = MixedB(self.Mixed_5d.out, w)
        self.Mixed_6b = MixedC(self.Mixed_6a.out, 128, w)
        self.Mixed_6c, self.Mixed_6d = (MixedC(self.Mixed_6b.out, 160, w) for _ in range(2))
        self.Mixed_6e = MixedC(self.Mixed_6b.out, 192, w)
        self.Mixed_7a = MixedD(self.Mixed_6e.out, w)
        self.Mixed_7b = MixedE(self.Mixed_7a.out, w)
        self.Mixed_7c = MixedE(self.Mixed_7b.out, w)
        steps = list(self.children())
        at = {module: count for count, module in enumerate(steps, start=1)}
        self.chain(
            steps,
            {
                4: (at[self.Conv2d_4a_3x3], w(192)),
                8: (at[self.Mixed_5d], self.Mixed_5d.out),
                16: (at[self.Mixed_6e], self.Mixed_6e.out),
                32: (at[self.Mixed_7c], self.Mixed_7c.out),
            },
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
