"""Backbones: sizes as published, maps at four strides, where a cell looks, and weights from files of others."""

import json
import pickle
import struct

import pytest
import torch

from wsiengine.errors import IntegrityError, WsiError
from wsiengine.training import inception
from wsiengine.training.backbones import NAMES, build, load_weights

WIDTH = 0.25
# Parameters without the classifier, in thousands: He 2016, Huang 2017, Szegedy 2016, Sandler 2018, as torchvision
# counts them (MobileNetV2's batch normalisation is folded into biases here).
PUBLISHED = {
    "resnet18": 11_177,
    "resnet50": 23_508,
    "densenet121": 6_954,
    "inception_v3": 21_786,
    "mobilenet_v2": 2_207,
}


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_of_the_papers(name):
    network = build(name)
    assert round(sum(p.numel() for p in network.parameters()) / 1000) == PUBLISHED[name]
    assert (
        network.features == network.channels[32] == dict(zip(NAMES, (1280, 512, 2048, 1024, 2048), strict=True))[name]
    )


@pytest.mark.parametrize("name", NAMES)
def test_maps_at_four_strides(name):
    torch.manual_seed(1)
    network = build(name, WIDTH).eval()
    pixels = torch.randint(0, 256, (2, 3, 96, 160), dtype=torch.uint8)
    with torch.inference_mode():
        maps = network.pyramid(network.prepare(pixels))
        last = network(network.prepare(pixels))
        (eight,) = network.pyramid(network.prepare(pixels), at=(8,))
    assert [tuple(m.shape) for m in maps] == [(2, network.channels[s], 96 // s, 160 // s) for s in (4, 8, 16, 32)]
    assert torch.equal(last, maps[3])
    assert torch.equal(eight, maps[1])
    assert torch.isfinite(last).all()
    assert last.std() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_cell_is_centred_where_the_backbone_says(name, monkeypatch):
    """With all weights alike, what a cell depends on is centred on 32 i + offset_px."""
    for place in (torch.nn.functional, inception):  # of equal values a maximum takes the first: means have no side

        def mean(x, size, stride, padding, *_, **__):
            return torch.nn.functional.avg_pool2d(x, size, stride, padding)

        monkeypatch.setattr(place, "max_pool2d", mean)
    network = build(name, WIDTH)
    for key, parameter in network.named_parameters():
        torch.nn.init.constant_(parameter, 0.0 if key.endswith("bias") and name != "mobilenet_v2" else 1e-2)
    network.eval()
    side = 1024
    image = torch.full((1, 3, side, side), 0.5, requires_grad=True)
    network(image)[0, 0, 15, 16].backward()
    weight = image.grad[0, 0].abs().double().numpy()
    for axis, cell in ((1, 15), (0, 16)):
        profile = weight.sum(axis=axis)
        centre = (profile * range(side)).sum() / profile.sum()
        assert centre == pytest.approx(32 * cell + network.offset_px, abs=1.0)


def test_frozen_steps_learn_nothing():
    network = build("resnet18", WIDTH)
    network.statistics = True
    network.freeze(3)
    network.train()
    for index, step in enumerate(network.steps):
        assert all(m.training == (index >= 3) for m in step.modules() if isinstance(m, torch.nn.BatchNorm2d))
    network(torch.randn(1, 3, 64, 64), 3).sum().backward()
    assert all(p.grad is None for s in network.steps[:3] for p in s.parameters())
    assert all(p.grad is not None for s in network.steps[3:] for p in s.parameters())


def _save_safetensors(state, file):
    header, body = {}, b""
    for name in sorted(state):
        raw = state[name].numpy().tobytes()
        kind = {torch.float32: "F32", torch.int64: "I64"}[state[name].dtype]
        header[name] = {
            "dtype": kind,
            "shape": list(state[name].shape),
            "data_offsets": [len(body), len(body) + len(raw)],
        }
        body += raw
    head = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    file.write_bytes(struct.pack("<Q", len(head)) + head + body)


@pytest.mark.parametrize(("name", "ours", "theirs"), [("resnet18", "", ""), ("densenet121", "dense.", "features.")])
def test_weights_of_others_fit(name, ours, theirs, tmp_path):
    torch.manual_seed(2)
    donor = build(name, WIDTH)
    state = {theirs + k.removeprefix(ours): v for k, v in donor.state_dict().items()}
    state |= {"fc.weight": torch.zeros(5, 3), "classifier.bias": torch.zeros(5)}
    torch.save(state, tmp_path / "w.pth")
    _save_safetensors(state, tmp_path / "w.safetensors")
    for file in ("w.pth", "w.safetensors"):
        taken = build(name, WIDTH)
        load_weights(taken, tmp_path / file)
        for key, value in donor.state_dict().items():
            assert torch.equal(taken.state_dict()[key], value), key


class Evil:
    def __reduce__(self):
        return print, ("ran",)


def test_other_files_get_words(tmp_path, capsys):
    network = build("resnet18", WIDTH)
    with pytest.raises(WsiError, match="are not there"):
        load_weights(network, tmp_path / "none.pth")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(IntegrityError, match="cannot be read as plain weights"):
        load_weights(network, tmp_path / "evil.pth")
    assert "ran" not in capsys.readouterr().out
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "part.pth")
    with pytest.raises(IntegrityError, match="layers are missing"):
        load_weights(network, tmp_path / "part.pth")
    torch.save(build("resnet18", 0.5).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(IntegrityError, match=r"another shape, the first is conv1\.weight"):
        load_weights(network, tmp_path / "wide.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(IntegrityError, match="no safetensors file"):
        load_weights(network, tmp_path / "cut.safetensors")
    with pytest.raises(WsiError, match="there is no backbone 'vgg'"):
        build("vgg")
    (tmp_path / "m.tflite").write_bytes(b"")
    with pytest.raises(IntegrityError, match="holds MobileNetV2"):
        load_weights(network, tmp_path / "m.tflite")
