"""Immunohistochemistry loses its say, haematoxylin and eosin keep it; the file says what the formula says."""

import numpy as np
import onnxruntime
import pytest
import torch

from wsiengine.training.cells import CellNet
from wsiengine.training.export import export_onnx
from wsiengine.training.other_stain import StainRule, remaining_say, silence_other_stains, stain_ratio

RULE = StainRule(1.55, 1.65)
HAEMATOXYLIN, EOSIN, BROWN = (0.650, 0.704, 0.286), (0.072, 0.990, 0.105), (0.268, 0.570, 0.776)


def stained(*amounts, seed=0, side=160):
    """Nuclei and fibres: a tile (side, side, 3) of three stains' amounts, spread at random."""
    rng = np.random.default_rng(seed)
    density = rng.gamma(2.0, 0.5, (side, side, 3)) * amounts @ np.array([HAEMATOXYLIN, EOSIN, BROWN])
    return np.clip(256 * np.exp(-density) - 1, 0, 255).astype(np.uint8)


def test_stains_are_told_apart():
    assert (remaining_say(stained(0.6, 0.6, 0), RULE) == 1).all()
    assert (remaining_say(stained(0.6, 0, 0), RULE) == 1).all()  # lymphocytes: haematoxylin alone
    assert (remaining_say(stained(0.1, 0, 1.0), RULE) == 0).all()
    assert (remaining_say(np.full((96, 96, 3), 243, np.uint8), RULE) == 1).all()


def test_the_ratio_is_that_of_the_stain():
    tile = np.broadcast_to(stained(0, 0, 1, side=8)[:1, :1], (160, 160, 3))
    red, green, blue = -np.log((tile[0, 0].astype(float) + 1) / 256)
    np.testing.assert_allclose(stain_ratio(tile), (red + blue + 0.05) / (green + 0.05), rtol=1e-5)


def test_only_the_neighbourhood_counts():
    tile = np.concatenate([stained(0.5, 0.5, 0, side=320), stained(0.1, 0, 1.0, side=320)])
    say = remaining_say(tile, RULE)
    assert (say[:8] == 1).all()
    assert (say[-8:] == 0).all()
    assert say.shape == (20, 10)


def _session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    torch.manual_seed(3)
    network = CellNet(3, width=0.25)
    torch.nn.init.normal_(network.head.weight, std=0.3)
    folder = tmp_path_factory.mktemp("files")
    for name in ("plain", "ruled"):
        export_onnx(network.eval(), folder / name, rows=((0, 0.0), (1, 0.0), (2, -0.7), (2, -0.7)))
    silence_other_stains(folder / "ruled", RULE)
    return _session(folder / "plain"), _session(folder / "ruled")


def test_the_file_fades_as_the_formula_does(files):
    tiles = np.stack([stained(0.5, 0.5, 0), stained(0.3, 0, 0.8), stained(0.1, 0, 1.0)])
    (plain, _, cam, _), (ruled, epithelium, faded, covered) = (f.run(None, {"tiles": tiles}) for f in files)
    added = np.array([0, 0, -0.7, -0.7], np.float32)[:, None, None]
    say = np.stack([remaining_say(t, RULE) for t in tiles])
    assert 0 < say[1].mean() < 1
    np.testing.assert_allclose(faded, (cam - added) * say[:, None] + added, atol=2e-4)
    np.testing.assert_allclose(ruled, faded.mean(axis=(2, 3)), atol=1e-5)
    np.testing.assert_allclose(ruled[0], plain[0], atol=1e-5)
    np.testing.assert_allclose(epithelium, covered.mean(axis=(1, 2)), atol=1e-5)  # the gate has no part in it


def test_nothing_is_asserted_of_another_stain(files):
    logits = files[1].run(["logits"], {"tiles": stained(0.1, 0, 1.0)[None]})[0][0]
    classes = np.array([logits[0], logits[1], np.logaddexp(*logits[2:])])
    probability = np.exp(classes) / np.exp(classes).sum()
    assert probability.max() < 0.34 + 0.02
