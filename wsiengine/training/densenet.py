"""DenseNet-121 (Huang et al. 2017), as a backbone."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from wsiengine.training.backbone import Backbone

_LAYERS = (6, 12, 24, 16)
_BOTTLENECK = 4


class DenseLayer(nn.Module):
    """Looks at all maps so far and adds ``growth`` new ones to them."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(channels, _BOTTLENECK * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(_BOTTLENECK * growth)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(_BOTTLENECK * growth, growth, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu1(self.norm1(x)))
        return torch.cat([x, self.conv2(self.relu2(self.norm2(y)))], 1)


class DenseNet(Backbone):
    """float (N, 3, H, W), ImageNet's mean and deviation → (N, 1024, H/32, W/32).

    Args:
        width: Multiplies the growth and all channel counts; 1.0 for published weights, less in tests.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        growth = max(4, int(32 * width))
        channels = 2 * growth
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            conv0=nn.Conv2d(3, channels, 7, 2, 3, bias=False),
            norm0=nn.BatchNorm2d(channels),
            relu0=nn.ReLU(),
            pool0=nn.MaxPool2d(3, 2, 1),
        )
        steps: list[nn.Module] = [nn.Sequential(*parts.values())]
        ends = {}
        for i, count in enumerate(_LAYERS, start=1):
            block = nn.Sequential()
            for j in range(1, count + 1):
                block.add_module(f"denselayer{j}", DenseLayer(channels, growth))
                channels += growth
            parts[f"denseblock{i}"] = block
            steps += block
            if i < len(_LAYERS):
                ends[2 * 2**i] = (len(steps), channels)
                parts[f"transition{i}"] = transition = nn.Sequential(
                    OrderedDict(
                        norm=nn.BatchNorm2d(channels),
                        relu=nn.ReLU(),
                        conv=nn.Conv2d(channels, channels // 2, 1, bias=False),
                        pool=nn.AvgPool2d(2, 2),
                    )
                )
                steps.append(transition)
                channels //= 2
        parts["norm5"] = nn.BatchNorm2d(channels)
        parts["relu5"] = nn.ReLU()
        steps.append(nn.Sequential(parts["norm5"], parts["relu5"]))
        ends[32] = (len(steps), channels)
        self.dense = nn.Sequential(parts)  # torchvision calls it `features`, which is a number here
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        self.chain(steps, ends)
        # Each average of 2 × 2 pixels, centred between them, moves what follows by half a pixel of its own input.
        self.offset_px = 2.0 + 4.0 + 8.0
