"""What always holds, through ``infer``: the same bytes however a run is cut, spread, repeated or moved.

Slides whose pixels tell their place, and a model that every pixel matters to: a tile moved by one pixel, or scored with
its neighbours' pixels, changes the result. Interruption has its place in ``test_infer.py``.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

import wsiengine
from tests.fakes import ArraySlide, position_pixels
from tests.models.tiny import tiny
from tests.mosaics import position_slide
from tests.sparse_slides import Sparse, write_sparse
from wsiengine.geometry import Size
from wsiengine.inference import Outputs, infer
from wsiengine.models.card import Card
from wsiengine.slides.pyramid import PyramidLayout, write_pyramid

SIZE = Size(611, 887)  # no multiples of tile, cell, block or file tile
MPP = 0.7
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Card:
    return tiny(tmp_path_factory.mktemp("tiny"), gate=True)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slide") / "position.svs"
    position_slide(path, SIZE, MPP)
    return path


def _run(slide: Any, card: Card, folder: Path, **options: Any) -> dict[str, bytes]:
    """Every byte of the results, but for the two parts of run.json that may differ."""
    options = {"tissue": "none", "overlap": 0.5, "outputs": Outputs(tiles=True), **options}
    infer(slide, str(card.folder), folder, **options)
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    facts = json.loads(found["run.json"])
    found["run.json"] = json.dumps({k: v for k, v in facts.items() if k not in ("timing", "host")}).encode()
    return found


@pytest.fixture(scope="module")
def reference(slide: Path, card: Card, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The run in one block, on one thread."""
    return _run(slide, card, tmp_path_factory.mktemp("reference") / "out", block_tiles=500, threads=1)


def test_the_reference_can_tell_tiles_apart(slide: Path, card: Card, reference: dict[str, bytes]) -> None:
    labels = {
        f["properties"]["classification"]["name"] for f in json.loads(reference["annotations.geojson"])["features"]
    }
    assert len(labels) > 1
    tiles = json.loads(reference["tiles.geojson"])["features"]
    assert len({json.dumps(t["properties"]["measurements"]) for t in tiles}) > 0.9 * len(tiles)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_tiles": 1, "threads": 3},
        {"block_tiles": 7, "threads": 2},
        {"block_tiles": 3, "threads": 1, "batch_size": 5},
        {"block_tiles": 16, "threads": 5, "batch_size": 33},
        {"memory_limit_bytes": 1 << 30},
    ],
)
def test_blocks_batches_and_threads_do_not_show(
    slide: Path, card: Card, reference: dict[str, bytes], tmp_path: Path, options: dict[str, Any]
) -> None:
    assert _run(slide, card, tmp_path / "out", **options) == reference


def test_a_cluster_does_not_show(slide: Path, card: Card, reference: dict[str, bytes], tmp_path: Path) -> None:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=2, processes=True, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        assert _run(slide, card, tmp_path / "out", client=client, block_tiles=4) == reference


def test_name_place_and_time_do_not_show(slide: Path, card: Card, reference: dict[str, bytes], tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "other name.svs"
    moved.parent.mkdir()
    moved.write_bytes(slide.read_bytes())
    assert _run(moved, card, tmp_path / "another folder" / "out") == reference


def test_a_change_of_one_pixel_shows(slide: Path, card: Card, reference: dict[str, bytes], tmp_path: Path) -> None:
    from wsiengine.slides.whole import WholeSlide

    with pytest.MonkeyPatch.context() as patch:
        original = WholeSlide.read
        patch.setattr(WholeSlide, "read", lambda self, box, mpp: original(self, box.shift(0, 1), mpp))
        shifted = _run(slide, card, tmp_path / "out")
    assert shifted["annotations.geojson"] != reference["annotations.geojson"]
    assert shifted["tiles.geojson"] != reference["tiles.geojson"]


def test_the_lazy_map_is_the_map_on_disk(slide: Path, card: Card, tmp_path: Path) -> None:
    result = infer(slide, str(card.folder), tmp_path / "out", tissue="none", overlap=0.5)
    plan = wsiengine.plan(slide, str(card.folder), tissue="none", overlap=0.5, block_tiles=3)
    np.testing.assert_array_equal(plan.to_dask().compute(), result.probability.compute())


# --- reading and writing once --------------------------------------------------------------------


@pytest.mark.parametrize("block_tiles", [2, 5])
def test_each_block_is_read_once_and_nothing_else(card: Card, tmp_path: Path, block_tiles: int) -> None:
    slide = ArraySlide(position_pixels(SIZE.height, SIZE.width), 1.0)
    plan = wsiengine.plan(slide, str(card.folder), tissue="none", block_tiles=block_tiles)
    slide.reads.clear()
    plan.to_dask().compute(scheduler="sync")
    assert sorted(read.box for read in slide.reads) == sorted(block.box_px(plan.grid) for block in plan.blocks())
    assert sum(read.box.area for read in slide.reads) == plan.read_px


def test_each_file_tile_is_read_once_but_for_the_halo(slide: Path, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    from wsiengine.slides.sources import LocalSource

    read: Counter[int] = Counter()
    original = LocalSource.read

    with tifffile.TiffFile(slide) as tiff:
        places = set(tiff.pages.first.dataoffsets)  # what else is read are the tables that name them

    def count(self: LocalSource, offset: int, length: int) -> bytes:
        read[offset] += offset in places
        return original(self, offset, length)

    monkeypatch.setattr(LocalSource, "read", count)
    tiles = -(-SIZE.height // 256) * -(-SIZE.width // 256)
    for block_tiles, most in ((500, 1), (8, 4)):  # blocks of 8 × 8 are larger than a file tile: four meet at most
        plan = wsiengine.plan(slide, str(card.folder), tissue="none", block_tiles=block_tiles)
        read.clear()
        plan.to_dask().compute(scheduler="sync")
        assert len(+read) == tiles
        assert max(read.values()) <= most


def test_each_chunk_is_written_once(slide: Path, card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zarr.storage import LocalStore

    written: Counter[str] = Counter()
    original = LocalStore.set

    async def count(self: LocalStore, key: str, value: Any) -> None:
        written[key] += 1
        await original(self, key, value)

    monkeypatch.setattr(LocalStore, "set", count)
    infer(slide, str(card.folder), tmp_path / "out", tissue="none")
    chunks = {key: times for key, times in written.items() if "/c/" in key}
    assert chunks
    assert set(chunks.values()) == {1}


# --- memory --------------------------------------------------------------------------------------

_MEASURE = """
import json, sys, threading
from pathlib import Path
from wsiengine import infer

peak, over = [0], threading.Event()
def watch():
    while not over.wait(0.005):
        status = Path("/proc/self/status").read_text()
        peak[0] = max(peak[0], int(status.split("RssAnon:")[1].split()[0]) << 10)
threading.Thread(target=watch, daemon=True).start()
result = infer(sys.argv[1], sys.argv[3], sys.argv[2], tissue=sys.argv[4], threads=2)
over.set()
print(json.dumps({"peak": peak[0], "planned": result.run["host"]["peak_bytes_planned"]}))
"""


def _peak(slide: Path, out: Path, model: str = "planted", tissue: str = "none") -> tuple[int, int]:
    command = [sys.executable, "-c", _MEASURE, str(slide), str(out), model, tissue]
    paths = f"{ROOT}:{ROOT / 'kernels'}"
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": paths})
    found = json.loads(done.stdout.splitlines()[-1])
    return found["peak"], found["planned"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_is_as_planned_and_does_not_grow_with_the_slide(tmp_path: Path) -> None:
    peaks = []
    for name, size in (("small", Size(2100, 3000)), ("large", Size(7900, 11900))):
        tile = position_pixels(700, 1000)

        def rows(y0: int, y1: int, tile: np.ndarray = tile, size: Size = size) -> np.ndarray:
            wide = np.tile(tile, (1, -(-size.width // tile.shape[1]), 1))[:, : size.width]
            return np.take(wide, range(y0, y1), axis=0, mode="wrap")

        write_pyramid(tmp_path / f"{name}.svs", rows, size, 0.5, PyramidLayout())
        peak, planned = _peak(tmp_path / f"{name}.svs", tmp_path / name)
        assert peak <= planned
        peaks.append(peak)
    small, large = peaks
    assert large < 1.2 * small  # 15 times the pixels


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_know_how_large_the_slide_is(tmp_path: Path) -> None:
    """Mask, map and labels of 10 Gpx, which take 100 MB, lie in scratch files; tissue is looked for in all of it."""
    peaks = []
    for name, size, share in (("small", Size(8_660, 11_547), 0.05), ("large", Size(86_602, 115_473), 0.002)):
        slide = write_sparse(tmp_path / f"{name}.tiff", Sparse(size, share=share))
        if not peaks:
            _peak(slide, tmp_path / "warm", "crc5", "auto")  # compiles kernels, which takes memory of its own
        peak, planned = _peak(slide, tmp_path / name, "crc5", "auto")
        assert peak <= planned <= 1.4 * peak
        peaks.append(peak)
    small, large = peaks
    assert large < 1.1 * small  # 100 times the pixels
