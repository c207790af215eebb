"""Where the tiles of a slide lie is read from the file, not kept: large slides take no more memory than small ones."""

import gc
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tifffile

from tests.fakes import position_pixels
from tests.sparse_slides import Sparse, write_sparse
from wsiengine import errors
from wsiengine.geometry import Box, Size
from wsiengine.slides import open_slide
from wsiengine.slides.numbers import NumbersInFile, numbers_at, pieces
from wsiengine.slides.sources import LocalSource, open_source


def test_an_open_slide_holds_no_tables(tmp_path: Path) -> None:
    """33,000 tiles: as arrays half a megabyte, as tifffile's numbers two; not even until the collector comes by."""
    path = write_sparse(tmp_path / "slide.tif", Sparse(Size(40_000, 50_000)))
    open_slide(path).close()  # imports
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        slide = open_slide(path)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert slide.info.reader == "direct"
    assert held < 100_000


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("side", [64, 1200])
def test_numbers_of_any_width_and_order(tmp_path: Path, byteorder: str, bigtiff: bool, side: int) -> None:
    """Of one tile they stand in the directory itself, of many elsewhere."""
    pixels = position_pixels(side, side)
    tifffile.imwrite(tmp_path / "s.tif", pixels, tile=(64, 64), photometric="rgb", byteorder=byteorder, bigtiff=bigtiff)
    with open_slide(tmp_path / "s.tif") as slide:
        assert slide.info.reader == "direct"
        assert np.array_equal(slide.read_level(0, Box(0, 0, side, side)), pixels)


def _plain(path: Path) -> tuple[Path, int]:
    """A slide, and where the table of its tiles lies."""
    tifffile.imwrite(path, position_pixels(1200, 1200), tile=(64, 64), photometric="rgb", bigtiff=True)
    with tifffile.TiffFile(path) as tiff:
        return path, tiff.pages.first.tags["TileOffsets"].valueoffset


@pytest.mark.parametrize("number", [2**63 + 5, 2**64 - 1, 1 << 40], ids=hex)
def test_a_table_that_changes_while_it_is_read_is_told(tmp_path: Path, number: int) -> None:
    path, place = _plain(tmp_path / "s.tif")
    with open_slide(path) as slide:
        with path.open("r+b") as file:
            file.seek(place)
            file.write(number.to_bytes(8, "little"))
        with pytest.raises(errors.UnreadableSlide, match="ends too early"):
            slide.read_level(0, Box(0, 0, 64, 64))


def test_a_file_that_is_cut_short_while_it_is_read_is_told(tmp_path: Path) -> None:
    path, place = _plain(tmp_path / "s.tif")
    with open_slide(path) as slide:
        os.truncate(path, min(place, 4096))
        with pytest.raises(errors.UnreadableSlide, match="ends too early"):
            slide.read_level(0, Box(1100, 1100, 1200, 1200))


def test_remote_numbers_are_fetched_at_once(tmp_path: Path) -> None:
    import fsspec

    values = np.arange(300_000, dtype="<u4")
    (tmp_path / "local").write_bytes(b"head" + values.tobytes())
    with fsspec.open("memory://numbers", "wb") as file:
        file.write((tmp_path / "local").read_bytes())
    for name in (str(tmp_path / "local"), "memory://numbers"):
        with open_source(name) as source:
            numbers = numbers_at(source, 4, len(values), "<u4")
            assert isinstance(numbers, NumbersInFile) == isinstance(source, LocalSource)
            assert np.array_equal(np.concatenate([piece for (piece,) in pieces(numbers)]), values)
            assert np.array_equal(numbers[70_000:70_003], values[70_000:70_003])
            assert len(numbers_at(source, 8, len(values), "<u4")) == 0  # beyond the end
