"""Grad-CAM: where a class was seen by a network of any form (Selvaraju et al. 2017).

For networks that do not end in average pooling and a linear layer, and so have no exact class-activation map. Where one
does, both agree: the gradient of a score by a cell of the last map is then that cell's weight over the number of cells.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def grad_cam(network: nn.Module, layer: nn.Module, tiles: torch.Tensor, class_index: int) -> torch.Tensor:
    """Grad-CAM of one class.

    Weights are the means over cells of the gradient of the class's score by the layer's maps; the result is the
    weighted sum of the maps, and what speaks against the class is cut off at 0.

    Args:
        network: Gives (N, classes) for ``tiles``; put into evaluation mode for the call.
        layer: Inside it, giving (N, channels, rows, cols); usually its last one that does.
        tiles: (N, 3, h, w), as the network takes them.
        class_index: Of the score.

    Returns:
        (N, rows, cols) float, no less than 0, without gradient.

    Raises:
        ValueError: The layer was not run, or gives no maps; or there is no such class.
    """
    with _kept(network, layer) as maps, torch.enable_grad():
        scores = network(tiles)
        if len(maps) != 1 or maps[0].ndim != 4:
            raise ValueError(
                f"the layer gave {[tuple(m.shape) for m in maps]}, needed maps (N, channels, rows, cols) once"
            )
        if not 0 <= class_index < scores.shape[1]:
            raise ValueError(f"class {class_index} of {scores.shape[1]}")
        [gradient] = torch.autograd.grad(scores[:, class_index].sum(), maps[0])  # tiles do not see each other
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    return (weights * maps[0]).sum(dim=1).clamp(min=0).detach()


@contextmanager
def _kept(network: nn.Module, layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What the layer gives while it lasts; the network is in evaluation mode meanwhile."""
    maps: list[torch.Tensor] = []

    def keep(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        if not output.requires_grad:
            output = output.requires_grad_()  # all weights may be frozen
        maps.append(output)
        return output

    before = network.training
    handle = layer.register_forward_hook(keep)
    network.eval()
    try:
        yield maps
    finally:
        handle.remove()
        network.train(before)
