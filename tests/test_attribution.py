"""Class-activation maps of a slide: over tiles and dense, whatever the blocks; drawn, exported, refused."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import zarr

from tests import planted_slides as planted
from tests.models.tiny import card_json, tiny
from wsiengine.attribution import blend_windows, evidence
from wsiengine.cli import main
from wsiengine.errors import CardError, OutputConflict, PlanError
from wsiengine.events import Event
from wsiengine.geometry import Box, Lattice, Mpp, Size
from wsiengine.grid import TileGrid
from wsiengine.inference import infer
from wsiengine.truth import Truth

SIZE = Size(803, 1211)
MARKS = [(planted.A, Box(128, 192, 352, 448)), (planted.C, Box(400, 700, 803, 1000))]


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.write(tmp_path_factory.mktemp("slide") / "slide.svs", planted.paint(SIZE, MARKS))


def stored(out: Path) -> np.ndarray:
    return np.asarray(zarr.open_group(str(out / "attribution.zarr"), mode="r")["0"][0])


def slow_blend(windows: np.ndarray, grid: TileGrid, shape: tuple[int, int]) -> np.ndarray:
    """The obvious twin: every tile laid over the map."""
    side, stride = grid.rows.tile, grid.rows.stride
    total, count = np.zeros(np.add(shape, side)), np.zeros(np.add(shape, side))
    for i, j in np.ndindex(windows.shape[:2]):
        if not np.isnan(windows[i, j, 0]):
            at = np.s_[i * stride : i * stride + side, j * stride : j * stride + side]
            total[at] += windows[i, j].reshape(side, side)
            count[at] += 1
    with np.errstate(invalid="ignore"):
        return (total / count)[: shape[0], : shape[1]]


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.7])
def test_blending_is_that_of_the_obvious_twin(overlap: float) -> None:
    lattice = Lattice(Size(611, 437), Mpp.square(1.0), Mpp.square(1.0), 16)
    grid = TileGrid.cover(lattice, 112, overlap)
    random = np.random.default_rng(1)
    windows = random.normal(size=(*grid.shape, 49)).astype(np.float32)
    windows[random.random(grid.shape) < 0.4] = np.nan
    shape = lattice.extent_cells.shape
    found = blend_windows(windows, grid, np.ones(shape, bool))
    np.testing.assert_allclose(found, slow_blend(windows, grid, shape), rtol=1e-5, atol=1e-6)
    assert np.isnan(found).any() or overlap


def test_evidence_of_a_sum_of_classes() -> None:
    values = np.array([[1.0, 2.0, 500.0]])
    assert evidence(values, [2]) == 500
    assert evidence(values, [0, 1])[0] == pytest.approx(np.log(np.exp(1) + np.exp(2)))
    assert np.isfinite(evidence(values, [1, 2])).all()


def test_over_tiles_it_is_high_on_its_mark_alone(slide: Path, tmp_path: Path) -> None:
    infer(slide, "planted", tmp_path / "out", cam="Mark A", tissue="none", overlap=0.5)
    found = stored(tmp_path / "out")
    cell = 32  # level-0 pixels
    inside = found[128 // cell : 352 // cell, 192 // cell : 448 // cell]
    assert inside.min() > 15
    outside = found.copy()
    outside[128 // cell : 352 // cell, 192 // cell : 448 // cell] = 0
    assert np.nanmax(np.abs(outside)) < 1
    picture = cv2.imread(str(tmp_path / "out" / "attribution.png"))
    assert picture.shape[0] > SIZE.height
    truth = Truth.load(tmp_path / "out" / "probability.zarr")
    cams = np.asarray(zarr.open_group(str(tmp_path / "out" / "probability.zarr"), mode="r")["truth/cam"])
    ran = truth.ran
    np.testing.assert_allclose(
        cams[ran].mean(axis=-1), truth.scores[ran][:, 0], atol=1e-4
    )  # the map's mean is the score


def test_a_cell_where_no_mark_is_differs_from_not_analysed(slide: Path, tmp_path: Path) -> None:
    infer(slide, "planted", tmp_path / "out", cam="Mark C")
    truth = Truth.load(tmp_path / "out" / "probability.zarr")
    assert np.array_equal(np.isnan(stored(tmp_path / "out")), truth.map()[..., 0] == 0)


def test_blocks_threads_and_interruption_change_no_bit(slide: Path, tmp_path: Path) -> None:
    whole = infer(slide, "planted", tmp_path / "a", cam="Mark C", tissue="none", threads=1, block_tiles=8)
    plain = infer(slide, "planted", tmp_path / "b", tissue="none")
    assert whole.summary == plain.summary

    class Stopped(Exception):
        pass

    def listener(event: Event) -> None:
        if event.kind == "progress" and event.data["done"] > 40:
            raise Stopped

    options = {"cam": "Mark C", "tissue": "none", "block_tiles": 3}
    with pytest.raises(Stopped):
        infer(slide, "planted", tmp_path / "c", listener=listener, threads=1, **options)
    infer(slide, "planted", tmp_path / "c", threads=2, **options)
    for name in ("attribution.png", "attribution.zarr/zarr.json", "overlay.png", "annotations.geojson"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes(), name
    assert np.array_equal(stored(tmp_path / "a"), stored(tmp_path / "c"), equal_nan=True)
    assert (plain.folder / "overlay.png").read_bytes() == (tmp_path / "c" / "overlay.png").read_bytes()


def test_a_dense_run_has_the_maps_of_all_classes(
    slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    infer(slide, "planted", out, mode="dense", tissue="none")
    for name in ("Mark A", "Mark C"):
        assert main(["export", str(out), "--cam", name, "-o", str(tmp_path / name), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["class"] == name
        assert all(Path(file).exists() for file in told["files"])
        infer(slide, "planted", tmp_path / f"tiles {name}", cam=name, tissue="none")
        dense, tiles = stored(tmp_path / name), stored(tmp_path / f"tiles {name}")
        assert np.array_equal(dense, tiles, equal_nan=True)  # a cell of this network sees nothing beyond it
    assert np.nanmax(np.abs(stored(tmp_path / "Mark A") - stored(tmp_path / "Mark C"))) > 10
    assert main(["export", str(out), "--cam", "Mark A", "-o", str(tmp_path / "Mark A")]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["export", str(out), "--cam", "Mark B", "-o", str(tmp_path / "Mark A"), "--overwrite"]) == 0
    assert np.nanmax(stored(tmp_path / "Mark A")) < 1


def test_a_run_over_tiles_kept_one_class(slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    infer(slide, "planted", tmp_path / "out", cam="Mark A", tissue="none")
    assert main(["export", str(tmp_path / "out"), "--cam", "Mark A", "-o", str(tmp_path / "again")]) == 0
    assert np.array_equal(stored(tmp_path / "again"), stored(tmp_path / "out"), equal_nan=True)
    capsys.readouterr()
    assert main(["export", str(tmp_path / "out"), "--cam", "Mark B"]) == 1
    err = capsys.readouterr().err
    assert "kept no class-activation map of Mark B (only that of Mark A)" in err
    assert "--cam 'Mark B'" in err


def test_what_is_refused(slide: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="knows no class 'Mark X'"):
        infer(slide, "planted", tmp_path / "out", cam="Mark X")
    data = card_json()
    card = tiny(tmp_path / "model")
    del data["outputs"]["cam"]
    facts = {**data, "resources": [{"file": "tiny.onnx", "sha256": card.sha256}]}
    (tmp_path / "model" / "card.json").write_text(json.dumps(facts))
    with pytest.raises(CardError, match=r"names no outputs\.cam"):
        infer(slide, str(tmp_path / "model"), tmp_path / "out", cam="Class 0")
    infer(slide, "planted", tmp_path / "done", tissue="none")
    with pytest.raises(OutputConflict, match="the class of the activation map differs"):
        infer(slide, "planted", tmp_path / "done", tissue="none", cam="Mark A")
