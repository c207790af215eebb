"""ResNet-18 and ResNet-50 (He et al. 2016), as backbones."""

from torch import Tensor, nn

from wsiengine.training.backbone import Backbone

_STAGES = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions, added to their input."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1 × 1 to fewer channels, 3 × 3 (which strides), 1 × 1 back; added to its input."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(channels, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


def _shortcut(channels: int, target: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and channels == target:
        return None
    return nn.Sequential(nn.Conv2d(channels, target, 1, stride, bias=False), nn.BatchNorm2d(target))


class ResNet(Backbone):
    """float (N, 3, H, W), ImageNet's mean and deviation → (N, 512 or 2048, H/32, W/32).

    Args:
        depth: 18 or 50.
        width: Multiplies all channel counts; 1.0 for published weights, less in tests.
    """

    halo_px = 224

    def __init__(self, depth: int, width: float = 1.0) -> None:
        super().__init__()
        block = BasicBlock if depth == 18 else Bottleneck
        base = max(8, int(64 * width))
        self.conv1 = nn.Conv2d(3, base, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(base)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = base
        stages: list[nn.Sequential] = []
        for i, count in enumerate(_STAGES[depth]):
            target = base * 2**i
            blocks = []
            for j in range(count):
                blocks.append(block(channels, target, 2 if i and not j else 1))
                channels = target * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        stem = nn.Sequential(self.conv1, self.bn1, self.relu, self.maxpool)
        steps: list[nn.Module] = [stem]
        ends = {}
        for i, stage in enumerate(stages):
            steps += stage
            ends[4 * 2**i] = (len(steps), base * 2**i * block.expansion)
        self.chain(steps, ends)
