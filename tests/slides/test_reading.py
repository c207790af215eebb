"""Levels, resampling, borders: what a pixel is worth, whatever reads it and however it is asked for."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import crop, position_pixels, resample_area
from tests.mosaics import position_slide
from wsiengine import Box, Mpp, Size, open_slide
from wsiengine.errors import ResolutionError
from wsiengine.slides.base import Level, levels_of
from wsiengine.slides.pyramid import PyramidLayout
from wsiengine.slides.reading import best_level, plausible

SIZE = Size(389, 523)
LAYOUT = PyramidLayout(tile_px=64, compression="deflate", downsamples=(1, 4))


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A slide at 0.5 µm/px whose pixels tell their place, and its level 0."""
    path = tmp_path_factory.mktemp("slides") / "coded.svs"
    return path, position_slide(path, SIZE, 0.5, LAYOUT)


@pytest.fixture(params=["direct", "openslide", "tiffslide"])
def reader(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(
    "box",
    [Box(0, 0, 389, 523), Box(60, 60, 70, 200), Box(-7, -9, 5, 3), Box(380, 500, 400, 540), Box(-5, 600, 3, 610)],
    ids=["whole", "across tiles", "top left", "bottom right", "outside"],
)
def test_a_level_is_read_to_its_edges_and_white_beyond(coded: tuple[Path, np.ndarray], reader: str, box: Box) -> None:
    path, pixels = coded
    with open_slide(path, reader=reader) as slide:
        assert slide.info.reader == reader
        assert slide.info.size_l0 == SIZE
        np.testing.assert_array_equal(slide.read_level(0, box), crop(pixels, box))


def test_empty_boxes_are_read(coded: tuple[Path, np.ndarray], reader: str) -> None:
    with open_slide(coded[0], reader=reader) as slide:
        assert slide.read_level(0, Box(5, 5, 5, 9)).shape == (0, 4, 3)
        assert slide.read(Box(5, 5, 5, 9), Mpp.square(1.3)).shape == (0, 4, 3)


@pytest.mark.parametrize(
    "mpp", [Mpp.square(0.5), Mpp.square(1.0), Mpp.square(0.667), Mpp.square(0.4), Mpp(0.9, 1.3)], ids=str
)
def test_resampling_is_the_area_mean_of_level_0(coded: tuple[Path, np.ndarray], reader: str, mpp: Mpp) -> None:
    path, pixels = coded
    ratio = mpp.y / 0.5, mpp.x / 0.5
    box = Box(-3, 5, int(SIZE.height / ratio[0]) + 4, int(SIZE.width / ratio[1]) + 3)
    with open_slide(path, reader=reader) as slide:
        got = slide.read(box, mpp)
    want = resample_area(pixels, ratio, box)
    assert np.abs(got.astype(int) - want).max() <= 1  # the twin rounds halves to even


def test_a_coarser_level_is_used_where_it_fits(coded: tuple[Path, np.ndarray]) -> None:
    """At 2.5 µm/px the level at 2 µm/px serves; where pixels change slowly (red, green) that is level 0's mean."""
    path, pixels = coded
    box = Box(0, 0, 70, 90)
    with open_slide(path) as slide:
        asked: list[int] = []
        plain = slide.read_level
        slide.read_level = lambda level, *how: asked.append(level) or plain(level, *how)  # type: ignore[method-assign]
        got = slide.read(box, Mpp.square(2.5))
    assert asked == [1]
    assert np.abs(got.astype(int) - resample_area(pixels, (5, 5), box))[..., :2].max() <= 1


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_pixel_has_one_value_however_the_box_is_cut(coded: tuple[Path, np.ndarray], data: st.DataObject) -> None:
    path, _ = coded
    mpp = Mpp(*(data.draw(st.floats(0.34, 4.2)) for _ in "yx"))
    whole = Box(-4, -6, int(SIZE.height * 0.5 / mpp.y) + 5, int(SIZE.width * 0.5 / mpp.x) + 7)
    y0, y1 = sorted(data.draw(st.integers(whole.y0, whole.y1)) for _ in "01")
    x0, x1 = sorted(data.draw(st.integers(whole.x0, whole.x1)) for _ in "01")
    part = Box(y0, x0, y1, x1)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read(part, mpp), slide.read(whole, mpp)[part.relative_to(whole).slices])


@pytest.mark.parametrize("reader", ["direct", "openslide", "tiffslide"])
def test_levels_of_broken_downsample_do_not_depend_on_the_box(tmp_path: Path, reader: str) -> None:
    """1,490 / 372 is no whole number: OpenSlide then interpolates between pixels, by where the read begins."""
    path = tmp_path / "odd.svs"
    position_slide(path, Size(1307, 1490), 0.5, PyramidLayout(tile_px=64, compression="deflate", downsamples=(1, 4)))
    with open_slide(path, reader=reader) as slide:
        whole = slide.read_level(1, Box(0, 0, 326, 372))
        for y, x in ((1, 1), (33, 100), (200, 257), (211, 301)):
            box = Box(y, x, y + 61, x + 59)
            np.testing.assert_array_equal(slide.read_level(1, box), whole[box.slices])


@pytest.mark.parametrize(("full", "size"), [(356, 126), (398, 60), (531, 27), (1490, 372), (4096, 1024)])
def test_positions_survive_tiffslides_truncation(full: int, size: int) -> None:
    from wsiengine.slides.tiffslide import _level0_place

    downsample = full / size
    assert [int(_level0_place(pixel, downsample) / downsample) for pixel in range(size)] == list(range(size))


def test_white_outside_enters_the_mean_before_resampling(coded: tuple[Path, np.ndarray]) -> None:
    path, pixels = coded
    with open_slide(path) as slide:
        last = slide.read(Box(0, 130, 1, 131), Mpp.square(2.0))  # columns 520 to 523 inside, one outside
    with open_slide(path, reader="direct") as slide:
        level = slide.read_level(1, Box(0, 130, 1, 131))
    np.testing.assert_array_equal(last, level)
    with open_slide(path) as slide:
        last = slide.read(Box(0, 261, 1, 262), Mpp.square(1.0))[0, 0]  # column 522 inside, 523 outside
    want = (pixels[0:2, 522].astype(int).sum(axis=0) + 2 * 255) / 4
    assert np.abs(last - want).max() <= 0.5


def test_threads_see_the_same_pixels(coded: tuple[Path, np.ndarray], reader: str) -> None:
    path, pixels = coded
    boxes = list(Box(-10, -10, 400, 540).pieces(37, 53))
    with open_slide(path, reader=reader) as slide, ThreadPoolExecutor(8) as pool:
        for box, got in zip(boxes, pool.map(lambda box: slide.read_level(0, box), boxes), strict=True):
            np.testing.assert_array_equal(got, crop(pixels, box))


@pytest.mark.parametrize("compression", ["jpeg", "deflate"])
def test_threads_share_no_buffer(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "slide.svs"
    position_slide(path, Size(700, 900), 0.5, PyramidLayout(tile_px=128, compression=compression, downsamples=(1,)))
    boxes = list(Box(0, 0, 330, 430).pieces(61, 47)) * 3
    with open_slide(path) as slide:
        whole = slide.read(Box(0, 0, 330, 430), Mpp.square(1.0))
        with ThreadPoolExecutor(8) as pool:
            for box, got in zip(boxes, pool.map(lambda box: slide.read(box, Mpp.square(1.0)), boxes), strict=True):
                np.testing.assert_array_equal(got, whole[box.slices])


def test_reads_do_not_share_memory(coded: tuple[Path, np.ndarray]) -> None:
    """The source pixels of a read lie in memory that the next read uses again; the result must not."""
    box = Box(0, 0, 40, 50)
    with open_slide(coded[0]) as slide:
        for mpp in (0.5, 0.7, 1.0, 2.0):
            first = slide.read(box, Mpp.square(mpp))
            kept = first.copy()
            slide.read(box.shift(30, 20), Mpp.square(mpp))
            np.testing.assert_array_equal(first, kept)


def test_pixels_go_where_they_are_asked_to(coded: tuple[Path, np.ndarray], reader: str) -> None:
    path, pixels = coded
    out = np.zeros((30, 40, 3), np.uint8)
    box = Box(380, 500, 410, 540)
    with open_slide(path, reader=reader) as slide:
        assert slide.read_level(0, box, out=out) is out
    np.testing.assert_array_equal(out, crop(pixels, box))


def test_a_pickled_slide_opens_again_the_same_way(
    coded: tuple[Path, np.ndarray], reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, pixels = coded
    monkeypatch.chdir(path.parent)
    with open_slide(path.name, mpp=0.3, reader=reader) as slide:
        packed = pickle.dumps(slide)
        info, fingerprint = slide.info, slide.fingerprint()
    monkeypatch.chdir("/")
    assert len(packed) < 1000
    with pickle.loads(packed) as again:
        assert again.info == info
        assert again.info.mpp == Mpp.square(0.3)
        assert again.fingerprint() == fingerprint
        np.testing.assert_array_equal(again.read_level(0, Box(3, 4, 50, 60)), pixels[3:50, 4:60])


def _fingerprint(path: Path) -> str:
    with open_slide(path) as slide:
        return slide.fingerprint()


def test_the_fingerprint_does_not_know_the_path(coded: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    copy = tmp_path / "other name.svs"
    copy.write_bytes(coded[0].read_bytes())
    assert _fingerprint(copy) == _fingerprint(coded[0])


@pytest.mark.parametrize("where", [30, -30], ids=["first MiB", "last MiB"])
def test_the_fingerprint_knows_the_ends_of_the_file(coded: tuple[Path, np.ndarray], tmp_path: Path, where: int) -> None:
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, position_pixels(1100, 1200), tile=(64, 64), photometric="rgb")
    before = _fingerprint(path)
    changed = position_pixels(1100, 1200)
    changed[where, 40] ^= 64
    tifffile.imwrite(path, changed, tile=(64, 64), photometric="rgb")
    assert _fingerprint(path) != before


def test_the_fingerprint_knows_the_tile_tables(tmp_path: Path) -> None:
    """Two tiles of the second level change places in its table, which lies far from both ends of the file."""
    path = tmp_path / "slide.tif"
    with tifffile.TiffWriter(path) as tiff:
        for side, kind in ((1200, 0), (1000, 1)):
            tiff.write(position_pixels(side, side), tile=(64, 64), photometric="rgb", subfiletype=kind, metadata=None)
    before = _fingerprint(path)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tag = tiff.pages[1].tags["TileOffsets"]
        assert 1 << 20 < tag.valueoffset < path.stat().st_size - (1 << 20)
        offsets = list(tag.value)
        offsets[100], offsets[101] = offsets[101], offsets[100]
        tag.overwrite(offsets)
    assert _fingerprint(path) != before


@pytest.mark.parametrize(
    ("sizes", "downsamples"),
    [
        ([(10249, 11952), (2562, 2988)], [(1, 1), (4, 4)]),
        ([(3567, 4443), (1783, 2221)], [(1, 1), (2, 2)]),
        ([(250, 300), (125, 150), (62, 75), (31, 37)], [(1, 1), (2, 2), (4, 4), (8, 8)]),
        ([(683, 517), (341, 258), (113, 86), (28, 21)], [(1, 1), (2, 2), (6, 6), (24, 24)]),
        ([(35, 35), (2, 2)], [(1, 1), (16, 16)]),
        ([(3000, 1000), (1000, 1000)], [(1, 1), (3, 1)]),
        ([(1000, 2000), (400, 800)], [(1, 1), (2.5, 2.5)]),
    ],
)
def test_downsamples_are_whole_where_sizes_were_rounded(sizes: list, downsamples: list) -> None:
    assert [level.downsample for level in levels_of([Size(*size) for size in sizes])] == downsamples


def test_the_best_level_is_the_coarsest_that_is_fine_enough() -> None:
    levels = [Level(Size(1, 1), (d, d)) for d in (1.0, 4.0, 16.0)]
    wanted = {0.7: 0, 1: 0, 3.9: 0, 3.96: 1, 4: 1, 15: 1, 16: 2, 400: 2}
    assert {w: best_level(levels, (w, w)) for w in wanted} == wanted
    assert best_level(levels, (20, 3)) == 0


def test_what_no_microscope_has() -> None:
    assert plausible(Mpp(0.25, 0.25))
    assert plausible(Mpp(0.99, 1.29))
    for wrong in (None, Mpp(352.8, 352.8), Mpp(0.001, 0.001), Mpp(25.4, 19), Mpp(19, 25.4), Mpp(0.25, 0.6)):
        assert not plausible(wrong)


def test_missing_and_absurd_resolutions_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "absurd.tif"
    position_slide(
        path, SIZE, Mpp.square(352.8), PyramidLayout(tile_px=64, compression="deflate", svs=False, downsamples=(1,))
    )
    with open_slide(path) as slide:
        assert slide.info.mpp is None
        assert slide.info.stated_mpp is not None
        with pytest.raises(ResolutionError, match=r"states 352\.8 µm/px, which no microscope"):
            slide.read(Box(0, 0, 4, 4), Mpp.square(1))
    with open_slide(path, mpp=0.5) as slide:
        assert slide.info.mpp == Mpp.square(0.5)
        assert slide.read(Box(0, 0, 4, 4), Mpp.square(1)).shape == (4, 4, 3)
    for absurd in (0, -1.0, float("nan")):
        with pytest.raises(ResolutionError, match="must be a positive number"):
            open_slide(path, mpp=absurd)


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    path = tmp_path / "squashed.tif"
    layout = PyramidLayout(tile_px=64, compression="deflate", svs=False, downsamples=(1, 2))
    pixels = position_slide(path, SIZE, Mpp(y=0.25, x=0.5), layout)
    with open_slide(path) as slide:
        assert slide.info.mpp is not None
        np.testing.assert_allclose([slide.info.mpp.y, slide.info.mpp.x], [0.25, 0.5], rtol=1e-4)
    with open_slide(path, mpp=Mpp(y=0.25, x=0.5)) as slide:
        got = slide.read(Box(0, 0, 97, 261), Mpp.square(1.0))
    assert np.abs(got.astype(int) - resample_area(pixels, (4, 2), Box(0, 0, 97, 261))).max() <= 2
