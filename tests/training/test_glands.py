"""The gland network, its export, and its training: the same weights whether it was broken off or not."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from wsiengine.errors import OutputConflict
from wsiengine.models.registry import load_model
from wsiengine.models.runtime import Runtime
from wsiengine.training import glands, glands_release
from wsiengine.training.data import Field
from wsiengine.training.glands import Recipe, Sampler, draw, loss_of, train, training_fields
from wsiengine.training.mobilenet import MobileNetV2
from wsiengine.training.unet import UNet, export_unet

RECIPE = Recipe(side_px=64, batch=2, iterations=2)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two fields of each set with a disc for a gland; random weights instead of ImageNet's."""
    monkeypatch.setattr(glands, "load_weights", lambda backbone, file: None)
    rng = np.random.default_rng(0)
    for source, columns, rows in (
        ("glas", "file,mask,split,patient,grade,fold", ("train,1,healthy,1", "testA,1,healthy,1")),
        ("ebhi", "file,mask,class,case,fold", ("Normal,7,3", "Polyp,8,2")),
    ):
        folder = tmp_path / "data" / "crc" / source
        folder.mkdir(parents=True)
        lines = [columns]
        for k, row in enumerate(rows):
            mask = np.zeros((150, 170), np.uint8)
            cv2.circle(mask, (60 + 20 * k, 70), 40, 255, -1)
            image = np.where(mask[..., None] > 0, (150, 60, 170), (190, 170, 220)) + rng.integers(
                -20, 20, (150, 170, 3)
            )
            cv2.imwrite(str(folder / f"{k}.png"), image.clip(0, 255).astype(np.uint8))
            cv2.imwrite(str(folder / f"{k}.mask.png"), mask)
            lines.append(f"{k}.png,{k}.mask.png,{row}")
        (folder / "labels.csv").write_text("\n".join(lines))
    return tmp_path / "data"


def _state(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "model.pt", weights_only=True)  # type: ignore[no-any-return]


def test_only_the_training_half_is_trained_on(data: Path) -> None:
    glas, ebhi = training_fields(data, RECIPE)
    assert [f.image.name for f in glas] == ["0.png"]
    assert len(ebhi) == 2
    assert len(training_fields(data, Recipe(folds=(3,)))[1]) == 1


def test_a_contour_lies_on_the_border_and_parts_what_nearly_touches(tmp_path: Path) -> None:
    mask = np.zeros((120, 120), np.uint8)
    mask[20:100, 20:60] = mask[20:100, 61:100] = 255  # a gap of one pixel
    cv2.imwrite(str(tmp_path / "mask.png"), mask)
    pixels = np.random.default_rng(0).integers(90, 220, (120, 120, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "image.png"), pixels)
    field = Field(tmp_path / "image.png", tmp_path / "mask.png", "glas", "Normal", "healthy", "c", 0, (0.6, 0.6))
    drawn = draw(field, 1.2)
    assert drawn.truth.shape == (60, 60, 2)
    gland, contour = drawn.truth[30].T.astype(int)
    assert contour[[10, 30, 49]].min() > 100  # both outer borders and the gap
    assert contour[[20, 40]].max() == contour[2] == 0  # not inside, not outside
    assert gland[20] == 255
    assert gland[2] == 0


def test_batches_depend_on_seed_and_iteration_alone(data: Path) -> None:
    glas, ebhi = ([draw(f, 1.2) for f in fields] for fields in training_fields(data, RECIPE))
    one, two = Sampler(glas, ebhi, RECIPE), Sampler(glas, ebhi, RECIPE)
    one.batch(0)
    for a, b in zip(one.batch(5), two.batch(5), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (one.batch(5)[0] != one.batch(6)[0]).any()


def test_a_broken_off_training_ends_with_the_same_weights(data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path / "whole", RECIPE)
    assert not train(data, tmp_path / "parts", RECIPE, seconds=0)
    while not train(data, tmp_path / "parts", RECIPE, seconds=0):
        pass
    whole, parts = _state(tmp_path / "whole"), _state(tmp_path / "parts")
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=0)
    with pytest.raises(OutputConflict):
        train(data, tmp_path / "whole", Recipe(side_px=64, batch=2, iterations=5))


def test_a_second_training_goes_on_from_the_first(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "first", RECIPE)
    later = Recipe(side_px=64, batch=2, iterations=1, rate=0.0, head_rate=0.0, start_sha256="1")
    train(data, tmp_path / "second", later, start=tmp_path / "first" / "model.pt")
    first, second = _state(tmp_path / "first"), _state(tmp_path / "second")
    torch.testing.assert_close(second["head.weight"], first["head.weight"])


def test_the_loss_falls_towards_the_truth() -> None:
    truth = (torch.rand(2, 2, 16, 16, generator=torch.manual_seed(0)) > 0.5).float()
    good, bad = (truth * 2 - 1) * 6, (1 - truth * 2) * 6
    assert loss_of(good, truth) < 0.1 < loss_of(torch.zeros_like(truth), truth) < loss_of(bad, truth)


def test_the_encoder_is_the_backbone() -> None:
    torch.manual_seed(0)
    network, backbone = UNet(2, width=0.25), MobileNetV2(0.25)
    network.take(backbone)
    x = torch.rand(1, 3, 64, 96) * 2 - 1
    for own, given in zip(network.encoder, backbone.steps, strict=False):
        torch.testing.assert_close(own(x), given(x))
        x = given(x)
    assert x.shape[2:] == (2, 3)
    assert network(torch.zeros(1, 3, 64, 96, dtype=torch.uint8)).shape == (1, 2, 32, 48)


def test_frozen_steps_learn_nothing() -> None:
    network = UNet(1, width=0.25)
    network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), frozen=4).sum().backward()
    learnt = [any(p.grad is not None for p in step.parameters()) for step in network.encoder]
    assert learnt == [False] * 4 + [True] * (len(learnt) - 4)


def test_the_file_equals_the_network(tmp_path: Path) -> None:
    """Weights go through float16 on the way."""
    torch.manual_seed(1)
    run, to = tmp_path / "run", tmp_path / "glands"
    run.mkdir()
    network = UNet(2)
    torch.save(network.state_dict(), run / "model.pt")
    (run / "recipe.json").write_text(json.dumps({"mpp": 1.2}))
    glands_release.main(["--run", str(run), "--to", str(to)])
    for conv in (m for m in network.modules() if isinstance(m, torch.nn.Conv2d)):
        conv.weight.data = conv.weight.data.half().float()
    tile = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    with torch.inference_mode():
        expected = network.eval()(torch.from_numpy(tile).permute(2, 0, 1)[None]).numpy()
    card = load_model(str(to))
    [[found]] = Runtime(card, device="cpu").outputs(tile, np.zeros((1, 2), np.int64))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert expected.std() > 0.05
    assert card.model_path.stat().st_size < 4.5e6


def test_figures_stand_on_the_card(tmp_path: Path) -> None:
    torch.save(UNet(2).state_dict(), tmp_path / "model.pt")
    (tmp_path / "recipe.json").write_text(json.dumps({"mpp": 1.2}))
    scores = {
        "f1": 0.91,
        "precision": 0.9,
        "recall": 0.92,
        "dice": 0.9,
        "hausdorff_px": 41.2,
        "drawn": 663,
        "found": 670,
    }
    glands_release.release(tmp_path, tmp_path / "to", {"images": 60, "all": scores}, "python -m mine")
    card = load_model(str(tmp_path / "to"))
    assert card.classes[0].evidence["f1"] == 0.91
    assert card.training_command == "python -m mine"


def test_a_file_of_maps_is_small_and_free_in_size(tmp_path: Path) -> None:
    export_unet(UNet(2, width=0.25), tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").stat().st_size < 1e6
