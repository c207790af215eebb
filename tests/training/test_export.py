"""Every backbone's file says what torch says, per tile and as a map of scores."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate, pad

from wsiengine.training.backbones import NAMES
from wsiengine.training.cells import CellNet
from wsiengine.training.export import export_onnx
from wsiengine.training.onnx_graph import Graph, tensor


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def unsettle(network, seed):
    """Statistics and heads that are not the ones of a new network: folding them wrongly shows."""
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.3, 0.9)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    for layer in (network.head, network.gate):
        nn.init.normal_(layer.weight, std=0.2)
    return network.eval()


@pytest.mark.parametrize("name", NAMES)
def test_the_file_says_what_torch_says(name, tmp_path):
    network = unsettle(CellNet(3, 0.25, name), 7)
    export_onnx(network, tmp_path / "m.onnx", rows=((0, 0.0), (1, 0.0), (2, -0.5)), half=False)
    tiles = np.random.default_rng(1).integers(0, 256, (2, 96, 160, 3), dtype=np.uint8)
    names = ("logits", "epithelium", "cam", "map")
    found = dict(zip(names, session(tmp_path / "m.onnx").run(None, {"tiles": tiles}), strict=True))
    with torch.inference_mode():
        maps, gate = network(torch.from_numpy(tiles).permute(0, 3, 1, 2))
    expected = maps.numpy() - np.array([0, 0, 0.5])[:, None, None]
    assert found["cam"].shape == (2, 3, 3, 5)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(found["cam"], expected, atol=1e-4)
    np.testing.assert_allclose(found["logits"], found["cam"].mean(axis=(2, 3)), atol=1e-5)
    np.testing.assert_allclose(found["map"], gate.sigmoid().numpy(), atol=1e-4)


def test_decoders_are_written_as_well(tmp_path):
    """Enlarging, joining and borders, as decoders use them."""

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.deep, self.flat = nn.Conv2d(3, 4, 3, 2, bias=False), nn.Conv2d(7, 2, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.norm(self.deep(pad(x, (1, 0, 0, 1)))).relu()
            wide = interpolate(y, scale_factor=2, mode="bilinear")
            near = interpolate(y, scale_factor=2.0)
            return [self.flat(torch.cat([wide, x], 1)).sigmoid(), avg_pool2d(near, 3, 1, 1) * 0.5 - 1]

    torch.manual_seed(3)
    module = Decoder().eval()
    graph = Graph()
    outputs = graph.module("d", module, module, "x", half=False)
    shapes = [tensor(n, ["N", c, "h", "w"]) for n, c in zip(outputs, (2, 4), strict=True)]
    (tmp_path / "d.onnx").write_bytes(graph.model([tensor("x", ["N", 3, "H", "W"])], shapes).SerializeToString())
    x = torch.randn(2, 3, 12, 20)
    with torch.inference_mode():
        expected = module(x)
    for got, want in zip(session(tmp_path / "d.onnx").run(outputs, {"x": x.numpy()}), expected, strict=True):
        np.testing.assert_allclose(got, want.numpy(), atol=1e-5)


def test_a_layer_without_translation_is_refused():
    layer = nn.Tanh()
    with pytest.raises(TypeError, match="no translation to ONNX for the layer Tanh"):
        Graph().module("t", layer, layer, "x", half=False)
