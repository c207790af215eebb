"""The map on disk: OME-Zarr 0.5 that others open, its scale, its overviews, and 0 for what was not analysed."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from tests import planted_slides as planted
from wsiengine.errors import OutputError
from wsiengine.geometry import Box, Lattice, Mpp, Size
from wsiengine.grid import TileGrid
from wsiengine.inference import infer
from wsiengine.store import open_store, write_store
from wsiengine.tasks.classify import MapLayout, decode
from wsiengine.truth import Truth

SLIDE, SLIDE_MPP, WORKING_MPP, CELL_PX = Size(41_003, 57_011), Mpp(0.26, 0.24), Mpp(1.04, 0.96), 16
LATTICE = Lattice(SLIDE, SLIDE_MPP, WORKING_MPP, CELL_PX)
LAYOUT = MapLayout(
    ("Normal", "Tumour"), ((0, 158, 115), (213, 94, 0)), ((0,), (1, 2)), "softmax", 0.25, "No epithelium"
)


def _map(shape: tuple[int, int]) -> np.ndarray:
    """(rows, cols, 3) uint8 whose values tell their place, with a corner that was not analysed."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    coded = np.stack([1 + (y * 7 + x * 3) % 255, 1 + (y * x) % 251, 1 + (x // 5 + y) % 241], axis=-1).astype(np.uint8)
    coded[: shape[0] // 3, : shape[1] // 4] = 0
    return coded


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    """A store, and the map and scores that went into it."""
    coded = _map(LATTICE.extent_cells.shape)
    grid = TileGrid.cover(LATTICE, 64, 0.25)
    scores = np.random.default_rng(1).normal(size=(*grid.shape, 4)).astype(np.float32)
    scores[0, :5] = np.nan
    path = tmp_path_factory.mktemp("store") / "probability.zarr"
    write_store(path, coded, ({"scores": scores}, coded[..., 0] > 0), (LAYOUT, LATTICE), {"note": "µ", "list": [1, 2]})
    return path, coded, scores


def _attributes(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / "zarr.json").read_text())["attributes"])


def test_what_was_written_comes_back(written: tuple[Path, np.ndarray, np.ndarray]) -> None:
    path, coded, scores = written
    stored = open_store(path)
    np.testing.assert_array_equal(np.moveaxis(stored.coded[...], 0, -1), coded)
    np.testing.assert_array_equal(stored.scores[...], scores)
    np.testing.assert_array_equal(stored.analysed[...].astype(bool), coded[..., 0] > 0)
    assert stored.attributes == {"note": "µ", "list": [1, 2]}


def test_the_metadata_are_ome_zarr_05(written: tuple[Path, np.ndarray, np.ndarray]) -> None:
    from ome_zarr_models import v05 as models

    path, _, _ = written
    image = models.Image.from_zarr(zarr.open_group(str(path), mode="r", zarr_format=3))
    [multiscale] = image.attributes.ome.multiscales
    assert [axis.name for axis in multiscale.axes] == ["c", "y", "x"]
    assert [axis.type for axis in multiscale.axes] == ["channel", "space", "space"]
    assert image.attributes.ome.version == "0.5"


def test_the_scale_is_physical(written: tuple[Path, np.ndarray, np.ndarray]) -> None:
    path, _, _ = written
    [multiscale] = _attributes(path)["ome"]["multiscales"]
    assert [axis.get("unit") for axis in multiscale["axes"]] == [None, "micrometer", "micrometer"]
    for level, dataset in enumerate(multiscale["datasets"]):
        scale, *shift = dataset["coordinateTransformations"]
        factor = 2**level
        assert scale["type"] == "scale"
        assert scale["scale"] == pytest.approx([1, 1.04 * 16 * factor, 0.96 * 16 * factor])
        # The centre of an overview's first cell is the mean of the centres of the cells under it.
        moved = shift[0]["translation"] if shift else [0, 0, 0]
        centre_um = np.arange(factor).mean() * np.array([1.04, 0.96]) * 16
        assert moved == pytest.approx([0, *centre_um])


def test_overviews_average_analysed_cells_only(written: tuple[Path, np.ndarray, np.ndarray]) -> None:
    path, coded, _ = written
    root = zarr.open_group(str(path), mode="r")
    names = [dataset["path"] for dataset in _attributes(path)["ome"]["multiscales"][0]["datasets"]]
    assert len(names) > 2
    fine = coded
    for name in names[1:]:
        coarse = np.moveaxis(root[name][...], 0, -1)
        assert coarse.shape[:2] == tuple(-(-n // 2) for n in fine.shape[:2])
        for y, x in ((0, 0), (coarse.shape[0] // 3, coarse.shape[1] // 4), (coarse.shape[0] - 1, coarse.shape[1] - 1)):
            quad = fine[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].reshape(-1, 3).astype(float)
            for channel in range(3):
                values = quad[quad[:, channel] > 0, channel]
                assert coarse[y, x, channel] == (np.floor(values.mean() + 0.5) if len(values) else 0)
        np.testing.assert_array_equal(coarse[..., 0] == 0, _none_under(fine[..., 0]))
        fine = coarse
    assert max(fine.shape[:2]) <= 256


def _none_under(values: np.ndarray) -> np.ndarray:
    """Whether all of each 2 × 2 are 0."""
    rows, cols = values.shape
    padded = np.zeros((rows + rows % 2, cols + cols % 2), bool)
    padded[:rows, :cols] = values > 0
    return ~padded.reshape(padded.shape[0] // 2, 2, -1, 2).any(axis=(1, 3))


def test_not_analysed_is_not_probability_0(written: tuple[Path, np.ndarray, np.ndarray]) -> None:
    path, _, _ = written
    coded = np.moveaxis(open_store(path).coded[...], 0, -1)
    assert np.isnan(decode(coded)[coded == 0]).all()
    assert decode(np.array([1, 255, 128], np.uint8)) == pytest.approx([0, 1, 0.5])


def test_arrays_are_sharded_and_tell_where_nothing_is(written: tuple[Path, np.ndarray, np.ndarray]) -> None:
    path, coded, _ = written
    array = zarr.open_group(str(path), mode="r")["0"]
    assert array.metadata.zarr_format == 3
    assert array.shards == (3, 1024, 1024)
    assert array.chunks == (1, 256, 256)
    assert array.fill_value == 0
    assert array.metadata.dimension_names == ("c", "y", "x")
    files = [p for p in (path / "0" / "c").rglob("*") if p.is_file()]
    assert len(files) == np.prod([-(-n // 1024) for n in coded.shape[:2]])


def test_channels_have_the_colours_of_the_classes(written: tuple[Path, np.ndarray, np.ndarray]) -> None:
    path, _, _ = written
    channels = _attributes(path)["ome"]["omero"]["channels"]
    assert [(c["label"], c["color"]) for c in channels] == [
        ("Normal", "009E73"),
        ("Tumour", "D55E00"),
        ("gate", "FFFFFF"),
    ]
    assert [c["active"] for c in channels] == [True, True, False]


def test_the_ome_zarr_reader_opens_it(written: tuple[Path, np.ndarray, np.ndarray]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that it brings
        from ome_zarr import io, reader

        path, coded, _ = written
        location = io.parse_url(str(path), mode="r")
        assert location is not None
        [node] = [n for n in reader.Reader(location)() if n.data]
        np.testing.assert_array_equal(np.moveaxis(node.data[0].compute(), 0, -1), coded)
        assert node.metadata["channel_names"] == ["Normal", "Tumour", "gate"]
        assert len(node.data) == len(_attributes(path)["ome"]["multiscales"][0]["datasets"])


def test_equal_maps_give_equal_files(written: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    path, coded, scores = written
    again = tmp_path / "again.zarr"
    write_store(again, coded, ({"scores": scores}, coded[..., 0] > 0), (LAYOUT, LATTICE), {"note": "µ", "list": [1, 2]})
    files = {p.relative_to(path) for p in path.rglob("*") if p.is_file()}
    assert files == {p.relative_to(again) for p in again.rglob("*") if p.is_file()}
    for name in files:
        assert (path / name).read_bytes() == (again / name).read_bytes(), name


def test_a_small_map_has_one_level(tmp_path: Path) -> None:
    lattice = Lattice(Size(40, 55), Mpp.square(0.5), Mpp.square(1.0), 16)
    coded = _map(lattice.extent_cells.shape)
    scores = np.zeros((1, 1, 4), np.float32)
    write_store(tmp_path / "small.zarr", coded, ({"scores": scores}, coded[..., 0] > 0), (LAYOUT, lattice), {})
    assert len(_attributes(tmp_path / "small.zarr")["ome"]["multiscales"][0]["datasets"]) == 1
    np.testing.assert_array_equal(np.moveaxis(open_store(tmp_path / "small.zarr").coded[...], 0, -1), coded)


def test_what_is_no_store_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no finished probability map"):
        open_store(tmp_path / "nothing.zarr")
    zarr.open_group(str(tmp_path / "other.zarr"), mode="w-", zarr_format=3)
    with pytest.raises(OutputError, match="no finished probability map"):
        open_store(tmp_path / "other.zarr")


# --- as a run writes it --------------------------------------------------------------------------


def test_a_run_tells_what_its_map_is(tmp_path: Path) -> None:
    tissue = Box(128, 128, 640, 896)
    pixels = planted.paint(Size(803, 1111), [(planted.A, Box(200, 200, 500, 600))], tissue=tissue)
    slide = planted.write(tmp_path / "s.svs", pixels)
    result = infer(slide, "planted", tmp_path / "out", overlap=0.5, threshold=0.4)
    path = tmp_path / "out" / "probability.zarr"
    facts = _attributes(path)["wsiengine"]
    run = result.run
    assert facts["model"]["sha256"] == run["model"]["sha256"]
    assert facts["fingerprint"] == run["slide"]["fingerprint"]
    assert facts["version"] == run["wsiengine"]
    assert facts["parameters"]["overlap"] == 0.5
    assert facts["parameters"] == run["identity"]["parameters"]
    coded = result.probability.compute()
    assert coded.shape == (*Lattice(Size(803, 1111), Mpp.square(0.5), Mpp.square(1.0), 16).extent_cells.shape, 4)
    glass, mark = coded[-2:], coded[10:14, 10:16]  # cells of 32 level-0 px
    assert (glass == 0).all()
    assert (mark > 0).all()
    assert (mark[..., 0] > 200).all()  # Mark A; that the others are not there is told from not having looked:
    assert (mark[..., 1:3] == 1).any()


def test_the_truth_on_disk_makes_the_same_map_again(tmp_path: Path) -> None:
    slide = planted.write(tmp_path / "s.svs", planted.paint(Size(803, 1111), [(planted.C, Box(300, 300, 700, 1000))]))
    result = infer(slide, "planted", tmp_path / "out", tissue="none", overlap=0.6)
    truth = Truth.load(tmp_path / "out" / "probability.zarr")
    np.testing.assert_array_equal(truth.map(), result.probability.compute())
