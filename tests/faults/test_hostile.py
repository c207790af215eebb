"""Hostile slides through every reader: no crash, no hang, no memory taken, words instead of errors, true geometry."""

import itertools
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tifffile

from tests.data import data_dir
from tests.fakes import position_pixels
from tests.faults import hostile
from tests.faults.hostile import DIFFERENT, READ, READERS, UNREADABLE, Sound, examine, sound, warm_up
from tests.faults.mutants import Mutant, Original, mutate, originals
from tests.faults.runs import fork
from wsiengine.datasets.dicom import read_dicom
from wsiengine.errors import SlideError, UnreadableSlide, WsiError
from wsiengine.geometry import Box, Size
from wsiengine.slides import open_slide
from wsiengine.slides.pyramid import PyramidLayout, write_pyramid

EACH = 6  # benchmarks/fuzz.py takes thousands


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    paths = {path.name: path for path in originals(folder, None)}
    warm_up(paths["jpeg-svs.svs"])
    return paths


NAMES = (
    "jpeg-svs.svs",
    "jpeg2000-plain.tif",
    "deflate-svs.svs",
    "deflate-plain.tif",
    "flat.png",
    "flat.jpg",
    "flat.tif",
)


@pytest.mark.parametrize("name", NAMES)
def test_mutants(files: dict[str, Path], tmp_path: Path, name: str) -> None:
    original = Original.load(files[name])
    known = _known(files[name], original)
    assert any(known.values())
    place = tmp_path / f"mutant{files[name].suffix}"
    for seed in range(EACH if "2000" not in name else 3):  # JPEG 2000 takes its time
        mutant = mutate(original, seed)
        place.write_bytes(mutant.data)
        verdict = examine(place, original, mutant, known)
        assert verdict.good, (seed, mutant.kind, str(verdict))


def _known(path: Path, original: Original) -> dict[str | None, Sound | None]:
    return {reader: sound(path, original, reader) for reader in READERS if reader != "run"}


def test_sound_files_are_read_and_a_swap_of_tiles_would_be_seen(files: dict[str, Path], tmp_path: Path) -> None:
    """The test of the test above."""
    path = files["jpeg-svs.svs"]
    original = Original.load(path)
    known = _known(path, original)
    untouched = examine(path, original, Mutant("none", original.data, (), False), known)
    assert set(untouched.outcomes) <= {READ, 2}
    assert untouched.outcomes[:3] == (READ, READ, READ)
    assert known["direct"] is not None
    first, second = sorted(known["direct"].tiles)[:2]
    known["direct"].tiles[first], known["direct"].tiles[second] = (
        known["direct"].tiles[second],
        known["direct"].tiles[first],
    )
    assert not examine(path, original, Mutant("none", original.data, (), False), known).good


def test_damage_is_confined_to_the_file_tile_whose_bytes_it_hit(files: dict[str, Path], tmp_path: Path) -> None:
    path = files["jpeg-svs.svs"]
    original = Original.load(path)
    offset, length = original.tiles[(1, 2)]
    data = bytearray(original.data)
    data[offset + length // 2 : offset + length // 2 + 40] = bytes(40)
    place = tmp_path / "damaged.svs"
    place.write_bytes(data)
    mutant = Mutant("hole", bytes(data), ((offset + length // 2, offset + length // 2 + 40),), False)
    verdict = examine(place, original, mutant, _known(path, original))
    assert verdict.good, str(verdict)
    assert verdict.outcomes[0] in (DIFFERENT, UNREADABLE)


@pytest.mark.parametrize(("side", "tag"), [(None, 273), (None, 279), (64, 324), (64, 325)])
def test_pixels_that_are_not_in_the_file_are_never_black(tmp_path: Path, side: int | None, tag: int) -> None:
    path = tmp_path / "holes.tif"
    layout = {"tile": (side, side)} if side else {"rowsperstrip": 64}
    tifffile.imwrite(path, position_pixels(301, 403), photometric="rgb", compression="zlib", **layout)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        values = list(tiff.pages[0].tags[tag].value)
        values[2] = 0
        tiff.pages[0].tags[tag].overwrite(values)
    for reader in (None, "direct", "openslide", "flat", "tiffslide"):
        try:
            with open_slide(path, reader=reader) as slide:
                pixels = slide.read_level(0, Box(0, 0, 301, 403))
        except SlideError:
            continue
        differs = (pixels != position_pixels(301, 403)).any(axis=2)
        assert (pixels[differs] == 255).all()  # OpenSlide: what was never scanned is glass


def test_a_height_from_nowhere_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "tall.tif"
    tifffile.imwrite(path, position_pixels(301, 403), photometric="rgb", compression="zlib", rowsperstrip=64)
    _with_tag(path, 0, 257, (1 << 32) - 1)
    for reader in (None, "direct", "openslide", "flat", "tiffslide"):
        with pytest.raises(SlideError):
            open_slide(path, reader=reader)


@pytest.mark.parametrize("bigtiff", [False, True])
def test_directories_that_go_round_in_a_circle(tmp_path: Path, bigtiff: bool) -> None:
    path = tmp_path / "circle.tif"
    with tifffile.TiffWriter(path, bigtiff=bigtiff) as writer:
        for side in (300, 150):
            writer.write(position_pixels(side, side + 60), tile=(64, 64), photometric="rgb", compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        last, first = tiff.pages[1], tiff.pages[0].offset
        link = last.offset + tiff.tiff.tagnosize + len(last.tags) * tiff.tiff.tagsize
        form = "<Q" if bigtiff else "<I"
    data = bytearray(path.read_bytes())
    assert struct.unpack_from(form, data, link) == (0,)
    struct.pack_into(form, data, link, first)
    path.write_bytes(data)
    with pytest.raises(UnreadableSlide, match="go round in a circle"):
        open_slide(path)


def _with_tag(path: Path, page: int, tag: int, value: int) -> None:
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[page % len(tiff.pages)].tags[tag].overwrite(value)


def test_tiles_that_no_memory_holds_do_not_reach_openslide(tmp_path: Path) -> None:
    path = tmp_path / "tiles.svs"
    write_pyramid(path, position_pixels(300, 420), Size(300, 420), 0.5, PyramidLayout(128, downsamples=(1,)))
    _with_tag(path, 0, 323, 65520)
    _with_tag(path, 0, 322, 65520)
    for reader in (None, "openslide"):
        with pytest.raises(UnreadableSlide, match=r"tiles of 65,520 × 65,520 px"):
            open_slide(path, reader=reader)


def test_packed_tiles_that_no_memory_holds_do_not_reach_openslide(tmp_path: Path) -> None:
    path = tmp_path / "tiles.svs"
    write_pyramid(path, position_pixels(300, 420), Size(300, 420), 0.5, PyramidLayout(512, downsamples=(1,)))
    _with_tag(path, 0, 325, (1 << 32) - 1)
    for reader in (None, "openslide"):
        with pytest.raises(UnreadableSlide, match=r"its pixels reach to byte 4,29\d,\d{3},\d{3}, the file ends at"):
            open_slide(path, reader=reader)


@pytest.mark.parametrize("height", [75 * 16, 75 * 2])
def test_levels_that_contradict_each_other(tmp_path: Path, height: int) -> None:
    path = tmp_path / "levels.svs"
    layout = PyramidLayout(128, downsamples=(1, 4), compression="deflate")
    write_pyramid(path, position_pixels(300, 420), Size(300, 420), 0.5, layout)
    _with_tag(path, -1, 257, height)
    for reader in (None, "openslide"):
        with pytest.raises(SlideError):
            open_slide(path, reader=reader)


def test_adversarial_files_are_read_or_refused_in_words(tmp_path: Path, files: dict[str, Path]) -> None:
    folder = data_dir() / "wsi" / "adversarial"
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(paths) >= 8
    for path in paths:
        original = Original(path.name, path.read_bytes(), {}, (0, 0), [], [], [], [], "<")
        verdict = examine(path, original, Mutant("none", original.data, ((0, 1),), True), dict.fromkeys(READERS))
        assert verdict.good, (path.name, str(verdict))
        assert np.any(np.array(verdict.outcomes) != 0)


@pytest.mark.parametrize("reader", [None, "direct", "openslide", "tiffslide", "flat"])
def test_an_image_larger_than_its_tiles_is_refused(files: dict[str, Path], tmp_path: Path, reader: str | None) -> None:
    """OpenSlide read such a slide as 65,535 px wide, its rows of tiles in the wrong places."""
    path = tmp_path / "wide.svs"
    path.write_bytes(files["jpeg-svs.svs"].read_bytes())
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags["ImageWidth"].overwrite(65_535)  # type: ignore[union-attr]
    with pytest.raises(UnreadableSlide, match=r"is said to be 65,535 × .* px, which takes .* tiles; it has"):
        open_slide(path, reader=reader)


@pytest.mark.parametrize("stopped_s", [0, 1000])
def test_who_is_slow_is_waited_for_and_who_hangs_is_not(monkeypatch: pytest.MonkeyPatch, stopped_s: int) -> None:
    """Fifteen sound mutants were once called hangs: the machine had been busy, and the campaign stopped meanwhile."""
    monkeypatch.setattr(hostile, "WAIT_S", 0.5)

    def busy() -> None:
        until = time.process_time() + 1.2
        while time.process_time() < until:
            pass

    pid, real, looks = fork(busy), time.monotonic, itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: real() + (stopped_s if next(looks) > 5 else 0))
    assert hostile._await(pid) == "well"
    assert hostile._await(fork(lambda: time.sleep(60))) == "by force after 0.5 s"


def test_a_length_from_nowhere_in_a_dicom_file_takes_no_memory(tmp_path: Path) -> None:
    """pydicom asked for the 4 GiB that one damaged length announced."""
    pytest.importorskip("pydicom")
    syntax = b"1.2.840.10008.1.2.1\0"
    meta = struct.pack("<HH2sH", 2, 0x10, b"UI", len(syntax)) + syntax
    absurd = struct.pack("<HH2sHI", 8, 0x16, b"UN", 0, 0xFFFF_FFF0) + b"few"
    path = tmp_path / "grey.dcm"
    path.write_bytes(bytes(128) + b"DICM" + meta + absurd)
    with pytest.raises(SlideError):
        open_slide(path)  # imports
    tracemalloc.start()
    try:
        with pytest.raises(SlideError, match="is a DICOM file, but not"):
            open_slide(path)
        with pytest.raises(WsiError, match="it is no whole DICOM image"):
            read_dicom(path)
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert taken < 10 << 20
