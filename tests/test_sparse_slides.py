"""The slides that large benchmarks are run on show what they say that they show."""

from pathlib import Path

import numpy as np
import pytest

import wsiengine
from tests import planted_slides as planted
from tests.sparse_slides import Sparse, write_repeated, write_sparse
from wsiengine.geometry import Box, Size


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    marks = [(planted.A, Box(200, 300, 900, 1300)), (planted.B, Box(1500, 1200, 2300, 2900))]
    return planted.write(
        tmp_path_factory.mktemp("source") / "s.svs", planted.paint(Size(4303, 4507), marks), compression="jpeg"
    )


def test_copies_show_the_source_at_every_level_and_place(source: Path, tmp_path: Path) -> None:
    made = wsiengine.open_slide(write_repeated(tmp_path / "copies.tiff", source, 3))
    known = wsiengine.open_slide(source)
    assert made.info.mpp == known.info.mpp
    assert len(made.info.levels) == len(known.info.levels)
    height, width = (n // 3 for n in made.info.size_l0.shape)
    assert (made.info.size_l0.height, made.info.size_l0.width) == (3 * height, 3 * width)
    assert 0 < height <= known.info.size_l0.height
    for level, whole in enumerate(known.info.levels):
        down = round(whole.downsample[0])
        copy, side = Size(height // down, width // down), 200
        expected = known.read_level(level, Box(40, 60, 40 + side, 60 + side))
        for row, col in ((0, 0), (1, 2), (2, 1)):
            y, x = row * copy.height + 40, col * copy.width + 60
            np.testing.assert_array_equal(made.read_level(level, Box(y, x, y + side, x + side)), expected)


def test_copies_take_no_more_bytes(source: Path, tmp_path: Path) -> None:
    one, many = (write_repeated(tmp_path / f"{n}.tiff", source, n).stat().st_size for n in (1, 6))
    assert many < one + 36 * 1000 * 16


def test_what_cannot_be_repeated_is_refused(tmp_path: Path) -> None:
    small = write_sparse(tmp_path / "small.tiff", Sparse(Size(3000, 4000)))
    deflated = planted.write(tmp_path / "deflated.svs", planted.paint(Size(2100, 2100), []))
    for path, reason in ((small, "smaller than a tile"), (deflated, "no plain TIFF of JPEG tiles")):
        with pytest.raises(ValueError, match=reason):
            write_repeated(tmp_path / "x.tiff", path, 2)
