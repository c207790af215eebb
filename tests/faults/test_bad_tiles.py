"""``--on-bad-tile``: a damaged slide ends the run, or leaves out just the tiles that saw the damage, and says so."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.faults.kills import killed_at_change
from tests.faults.mutants import Original
from tests.faults.runs import COMMAND, contents, environment, run
from wsiengine.errors import OutputConflict, UnreadableSlide
from wsiengine.geometry import Box, Size
from wsiengine.result import Result
from wsiengine.slides import open_slide
from wsiengine.slides.tolerant import PIECE_PX, TolerantSlide

HOLE = (1, 2)  # the file tile that is damaged


@pytest.fixture(scope="module")
def damaged(slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    original = Original.load(slide)
    offset, length = original.tiles[HOLE]
    data = bytearray(original.data)
    data[offset : offset + length] = bytes(length)
    path = tmp_path_factory.mktemp("damaged") / "slide.svs"
    path.write_bytes(data)
    return path


def _hole(slide: Path) -> Box:
    height, width = Original.load(slide).tile_px
    return Box.of(Size(height, width), HOLE[0] * height, HOLE[1] * width)


def test_by_default_damage_ends_the_run_in_words(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(UnreadableSlide, match=r"cannot be decoded at x 512, y 256"):
        run(damaged, tmp_path / "out")


def test_only_tiles_that_saw_the_damage_are_left_out(slide: Path, damaged: Path, tmp_path: Path) -> None:
    sound = run(slide, tmp_path / "sound", tissue="none")
    texts: list[str] = []
    result = run(
        damaged, tmp_path / "out", tissue="none", on_bad_tile="skip", listener=lambda e: texts.append(str(e.data))
    )
    hole, there, here = _hole(slide), _scores(sound), _scores(result)
    left_out = np.isnan(here[..., 0])
    assert np.array_equal(here[~left_out], there[~left_out])
    side, stride = 128, 96  # level-0 pixels of a tile, and from one to the next
    slack = 2 * PIECE_PX  # level-0 pixels: pieces are of working pixels, twice as large
    for i, j in np.ndindex(left_out.shape):
        tile = Box(i * stride, j * stride, i * stride + side, j * stride + side)
        if tile.intersect(hole):
            assert left_out[i, j]
        elif not tile.intersect(Box(hole.y0 - slack, hole.x0 - slack, hole.y1 + slack, hole.x1 + slack)):
            assert not left_out[i, j]
    count = int(left_out.sum())
    assert result.summary["unreadable_tiles"] == count > 0
    assert any(f"{count} tiles could not be read" in text for text in texts)
    coded = result.probability.compute()
    assert (coded[hole.y0 // 32 + 2, hole.x0 // 32 + 2] == 0).all()
    assert "unreadable_tiles" not in sound.summary


def _scores(result: Result) -> np.ndarray:
    from wsiengine.truth import Truth

    return Truth.load(result.folder / "probability.zarr").scores


def test_equal_bytes_however_the_run_is_cut_or_killed(damaged: Path, tmp_path: Path) -> None:
    run(damaged, tmp_path / "whole", on_bad_tile="skip")
    wanted = contents(tmp_path / "whole")
    run(damaged, tmp_path / "other", on_bad_tile="skip", block_tiles=5, threads=1)
    assert contents(tmp_path / "other") == wanted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.faults.kills.run", lambda s, o: run(s, o, on_bad_tile="skip"))
        patch.setattr("tests.faults.runs.run", lambda s, o, **k: run(s, o, on_bad_tile="skip", **k))
        for number in (30, 60):
            assert killed_at_change(damaged, tmp_path / "killed", number, wanted).survived


def test_the_choice_is_part_of_the_run(slide: Path, tmp_path: Path) -> None:
    run(slide, tmp_path / "out")
    with pytest.raises(OutputConflict, match="what happens to unreadable tiles differs"):
        run(slide, tmp_path / "out", on_bad_tile="skip")


def test_the_command_finishes_the_slide_and_exits_with_1(damaged: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*COMMAND, str(damaged), "-o", str(out), "--on-bad-tile", "skip"]
    for _ in range(2):  # also when the finished run is met again
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 1, done.stderr
        assert "tiles could not be read" in done.stdout
    assert json.loads((out / "run.json").read_text())["summary"]["unreadable_tiles"] > 0


def test_a_sound_slide_reads_the_same(slide: Path) -> None:
    with open_slide(slide) as plain:
        tolerant = TolerantSlide(plain)
        box = Box(-20, 100, 300, 470)
        assert np.array_equal(tolerant.read_level(0, box), plain.read_level(0, box))
        assert tolerant.fingerprint() == plain.fingerprint()
        assert tolerant.info == plain.info
