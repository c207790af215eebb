"""Grad-CAM against a network small enough to be computed by hand, and against exact class-activation maps."""

import pytest
import torch
from torch import nn

from wsiengine.training.gradcam import grad_cam


class ByHand(nn.Module):
    """Two maps of 2 × 2 cells: red, and twice green; score 0 is the *square* of the red map's sum minus green's sum."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Conv2d(3, 2, 1, bias=False)
        with torch.no_grad():
            self.maps.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 2.0, 0]])[:, :, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.maps(x)
        red, green = maps[:, 0].sum(dim=(1, 2)), maps[:, 1].sum(dim=(1, 2))
        return torch.stack([red**2 - green, green], dim=1)


def tile() -> torch.Tensor:
    """Red 1, 2, 0, 3 (sum 6); green 0, 1, 5, 0."""
    x = torch.zeros(1, 3, 2, 2)
    x[0, 0] = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    x[0, 1] = torch.tensor([[0.0, 1.0], [5.0, 0.0]])
    return x


def test_by_hand() -> None:
    network = ByHand()
    found = grad_cam(network, network.maps, tile(), 0)
    # d score / d red = 2 · 6 = 12 in every cell, d score / d green map = −1; maps: red, 2 · green
    wanted = torch.tensor([[12.0 * 1 - 0, 12.0 * 2 - 2], [max(0.0, 0 - 10), 12.0 * 3]])
    assert torch.equal(found[0], wanted)
    assert torch.equal(grad_cam(network, network.maps, tile(), 1)[0], torch.tensor([[0.0, 2.0], [10.0, 0.0]]))


class Placed(ByHand):
    """The score weighs cells by 1, 2, 3 and 6: the map's weight is their mean, 3."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.maps(x)
        return (maps[:, 0] * torch.tensor([[1.0, 2.0], [3.0, 6.0]])).sum(dim=(1, 2))[:, None]


def test_weights_are_means_over_cells() -> None:
    network = Placed()
    assert torch.equal(grad_cam(network, network.maps, tile(), 0)[0], 3 * tile()[0, 0])


def test_tiles_of_a_batch_do_not_see_each_other() -> None:
    network = ByHand()
    both = torch.cat([tile(), 3 * tile()])
    found = grad_cam(network, network.maps, both, 0)
    assert torch.equal(found[0], grad_cam(network, network.maps, tile(), 0)[0])
    assert torch.equal(found[1], grad_cam(network, network.maps, 3 * tile(), 0)[0])


def test_of_a_pooling_network_it_is_the_exact_map() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU())
    head = nn.Linear(6, 4)
    network = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).train()
    x = torch.randn(3, 3, 21, 17)
    found = grad_cam(network, body, x, 2)
    assert network.training  # as it was
    network.eval()
    with torch.no_grad():
        exact = torch.einsum("c,nchw->nhw", head.weight[2], body(x))
    cells = exact.shape[1] * exact.shape[2]
    torch.testing.assert_close(found, exact.clamp(min=0) / cells)


def test_frozen_weights_and_an_outer_no_grad() -> None:
    network = ByHand().requires_grad_(False)
    with torch.no_grad():
        assert grad_cam(network, network.maps, tile(), 0)[0, 1, 1] == 36


def test_what_does_not_fit() -> None:
    network = ByHand()
    with pytest.raises(ValueError, match="needed maps"):
        grad_cam(network, nn.Conv2d(3, 2, 1), tile(), 0)
    with pytest.raises(ValueError, match="class 5 of 2"):
        grad_cam(network, network.maps, tile(), 5)
