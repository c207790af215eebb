"""Exported detectors: what ONNX Runtime makes of their borders."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from wsiengine.models.registry import load_model
from wsiengine.training.detection_export import export_network


class Bordered(nn.Module):
    """A strided convolution with its border at the bottom and right, of ``value``, of zeros where none is said."""

    def __init__(self, value: float | None) -> None:
        super().__init__()
        self.value = value
        self.conv = nn.Conv2d(3, 8, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        border = (0, 1, 0, 1)
        x = pad(x, border) if self.value is None else pad(x, border, value=self.value)
        return self.conv(x).clamp(0, 6)


def as_run(file: Path, to: Path) -> list[str]:
    """The operators that a session has in the end."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(to)
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(to).graph.node]


@pytest.mark.parametrize("value", [None, 0.0, 1.0])
@pytest.mark.parametrize("half", [False, True])
def test_a_border_of_zeros_costs_no_copy(tmp_path: Path, value: float | None, half: bool) -> None:
    torch.manual_seed(0)
    network, file = Bordered(value).eval(), tmp_path / "n.onnx"
    x = torch.rand(2, 3, 20, 28)
    axes = {"x": {0: "N"}, "y": {0: "N"}}
    export_network(network, x[:1], file, outputs=("y",), axes=axes, name="x", half=half)
    (found,) = onnxruntime.InferenceSession(file).run(["y"], {"x": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, network(x).numpy(), atol=0.02 if half else 1e-5)
    assert ("Pad" in as_run(file, tmp_path / "run.onnx")) == (value == 1)


@pytest.mark.parametrize("name", ["rbc", "mass"])
def test_bundled_detectors_are_run_without_copies(name: str, tmp_path: Path) -> None:
    """One Pad may stay: it fills a tile up to whole cells."""
    card = load_model(name)
    files = [card.model_path, *(card.folder / file for file in (card.second.files if card.second else ()))]
    for file in files:
        assert as_run(file, tmp_path / "run.onnx").count("Pad") <= (file == card.model_path)
