"""A backbone with a linear head on every cell: what a classifier is trained as.

The head is linear and comes after the last convolution, so that the mean of its class-activation map *is* the score
(Zhou et al. 2016): dense windows and heat maps come from the same weights.
"""

from torch import Tensor, nn

from wsiengine.training.backbones import build

STRIDE_PX = 32


class CellNet(nn.Module):
    """Backbone, class head and epithelium head, both linear per cell.

    Args:
        classes: Number of classes trained.
        width: As for the backbone.
        backbone: Its name.
    """

    def __init__(self, classes: int, width: float = 1.0, backbone: str = "mobilenet_v2") -> None:
        super().__init__()
        self.width, self.kind = width, backbone
        self.backbone = build(backbone, width)
        self.head = nn.Conv2d(self.backbone.features, classes, 1)
        self.gate = nn.Conv2d(self.backbone.features, 1, 1)
        self.dropout = nn.Dropout(0.2)
        for layer in (self.head, self.gate):
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, pixels: Tensor, frozen: int = 0) -> tuple[Tensor, Tensor]:
        """Class-activation map (N, classes, h, w) and epithelium logits (N, h, w) of uint8 pixels (N, 3, H, W).

        A cell speaks as far as it shows epithelium: stroma tells laboratories apart, not diagnoses. The gate learns
        from masks alone, not from what would help the classes.
        """
        features = self.dropout(self.backbone(self.backbone.prepare(pixels), frozen))
        gate = self.gate(features)
        return self.head(features) * gate.sigmoid().detach(), gate[:, 0]
