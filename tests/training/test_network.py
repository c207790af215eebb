"""The network: ImageNet weights, where a cell looks, and the same numbers from the exported file."""

import math

import numpy as np
import onnxruntime
import pytest
import torch

from tests.data import data_dir
from wsiengine.errors import IntegrityError
from wsiengine.training.cells import CellNet
from wsiengine.training.crc5 import BACKBONE
from wsiengine.training.export import export_onnx, widened
from wsiengine.training.mobilenet import CELL_OFFSET_PX, STRIDE_PX, MobileNetV2
from wsiengine.training.release import ROWS
from wsiengine.training.tflite import read_convolutions


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(5)
    network = CellNet(3, width=0.25)
    for layer in (network.head, network.gate):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return network.eval()


def _session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def test_a_cell_looks_at_its_own_pixels():
    """With all weights alike, what cell (2, 3) depends on is centred on 32 i + CELL_OFFSET_PX."""
    network = MobileNetV2(0.25)
    for parameter in network.parameters():
        torch.nn.init.constant_(parameter, 1e-2)
    image = torch.full((1, 3, 640, 640), 0.5, requires_grad=True)
    network(image)[0, 0, 9, 10].backward()
    weight = image.grad[0, 0].abs().numpy()
    for axis, cell in ((1, 9), (0, 10)):
        profile = weight.sum(axis=axis)
        centre = (profile * np.arange(640)).sum() / profile.sum()
        assert centre == pytest.approx(STRIDE_PX * cell + CELL_OFFSET_PX, abs=1e-3)


def test_the_file_says_what_torch_says(small, tmp_path):
    export_onnx(small, tmp_path / "m.onnx", rows=ROWS, temperature=1.7)
    tiles = np.random.default_rng(1).integers(0, 256, (3, 96, 160, 3), dtype=np.uint8)
    logits, epithelium, cam, covered = _session(tmp_path / "m.onnx").run(None, {"tiles": tiles})
    with torch.inference_mode():
        maps, gate = widened(small)(torch.from_numpy(tiles).permute(0, 3, 1, 2))
    expected = maps.numpy()[:, [0, 1, 2, 2, 2]] / 1.7 - np.array([0, 0, 1, 1, 1])[:, None, None] * math.log(3)
    assert cam.shape == (3, 5, 3, 5)
    assert np.ptp(cam) > 0.1
    np.testing.assert_allclose(cam, expected, atol=1e-4)
    np.testing.assert_allclose(logits, cam.mean(axis=(2, 3)), atol=1e-5)
    np.testing.assert_allclose(covered, gate.sigmoid().numpy(), atol=1e-4)
    np.testing.assert_allclose(epithelium, covered.mean(axis=(1, 2)), atol=1e-5)


def test_sharing_a_score_in_three_leaves_its_probability(small, tmp_path):
    export_onnx(small, tmp_path / "m.onnx", rows=ROWS)
    tiles = np.random.default_rng(2).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    logits = _session(tmp_path / "m.onnx").run(["logits"], {"tiles": tiles})[0]
    with torch.inference_mode():
        own = widened(small)(torch.from_numpy(tiles).permute(0, 3, 1, 2))[0].mean(dim=(2, 3)).softmax(dim=1).numpy()
    shared = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(shared[:, 2:].sum(axis=1), own[:, 2], atol=1e-5)
    np.testing.assert_allclose(shared[:, :2], own[:, :2], atol=1e-5)


def test_imagenet_weights_are_dequantised():
    """The last backbone layer's features of a real weight file keep their scale; another network is refused."""
    path = data_dir() / BACKBONE
    layers = read_convolutions(path)
    assert len(layers) == 53
    assert layers[0].weight.shape == (32, 3, 3, 3)
    assert layers[1].depthwise
    assert layers[1].weight.shape == (32, 1, 3, 3)
    network = MobileNetV2()
    network.load_imagenet(path)
    with torch.inference_mode():
        features = network(torch.zeros(1, 3, 96, 96))
    assert features.shape == (1, 1280, 3, 3)
    assert 0.05 < float(features.mean()) < 3
    with pytest.raises(IntegrityError, match=r"does not hold MobileNetV2 1\.0"):
        MobileNetV2(0.5).load_imagenet(path)


def test_a_file_that_is_no_network_is_refused(tmp_path):
    (tmp_path / "a.tflite").write_bytes(b"not a model at all")
    with pytest.raises(IntegrityError, match="not a TensorFlow Lite file"):
        read_convolutions(tmp_path / "a.tflite")
    (tmp_path / "b.tflite").write_bytes(b"\x10\x00\x00\x00TFL3" + b"\xff" * 20)
    with pytest.raises(IntegrityError, match="is damaged"):
        read_convolutions(tmp_path / "b.tflite")
