"""Bad input through the command line: refused in words, with something to try, an exit code, and no traceback."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import tifffile

from tests import planted_slides as planted
from tests.data import slide_path
from tests.models.tiny import Tiny, card_json, graph, tiny, write_card
from wsiengine import journal
from wsiengine.cli import main
from wsiengine.geometry import Box, Size
from wsiengine.models.integrity import file_sha256
from wsiengine.slides.pyramid import PyramidLayout, write_pyramid

SIZE = Size(523, 771)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn tissue in a corner of glass."""
    pixels = planted.paint(SIZE, [(planted.A, Box(64, 96, 300, 300))], tissue=Box(0, 0, 400, 600))
    return planted.write(tmp_path_factory.mktemp("slides") / "good.svs", pixels)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


Refused = Callable[..., str]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Run ``infer`` on bad input → what it says on standard error, after checking how it says it."""

    def run(*arguments: object, model: str = "planted", code: int = 1) -> str:
        assert main(["infer", *map(str, arguments), "-m", model, "-o", str(tmp_path / "out")]) == code
        err = capfd.readouterr().err
        lines = err.splitlines()
        assert [line.split()[0] for line in lines] == ["error", "try"], err
        assert lines[1].removeprefix("try").strip()
        assert "unexpected" not in err
        assert "Traceback" not in err
        assert not list((tmp_path / "out").glob("*.*"))  # nothing that looks like a result, no half-made folder
        return err

    return run


@pytest.fixture
def refused_with_work(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """As ``refused``, for runs that fail midway: finished blocks stay, results do not appear."""

    def run(*arguments: object, model: str = "planted") -> str:
        assert main(["infer", *map(str, arguments), "-m", model, "-o", str(tmp_path / "out")]) == 1
        err = capfd.readouterr().err
        assert "error    " in err
        assert "try      " in err
        assert "Traceback" not in err
        assert {p.name for p in (tmp_path / "out").glob("*")} <= {".work"}
        return err

    return run


# --- slides --------------------------------------------------------------------------------------


def test_no_such_file(refused: Refused) -> None:
    assert "there is no file nowhere.svs" in refused("nowhere.svs")


def test_a_folder_without_slides(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no slide")
    assert "holds no slides" in refused(tmp_path / "empty")
    assert "No file matches" in refused(tmp_path / "empty" / "*.svs")


def test_files_that_are_no_slides(refused: Refused, tmp_path: Path) -> None:
    for name, content, words in (
        ("empty.svs", b"", "is empty (0 bytes)"),
        ("text.svs", b"hello, I am a slide", "text file"),
        ("noise.svs", np.random.default_rng(0).bytes(5000), "noise.svs"),
        ("short.tiff", b"II*\0\x08\0\0\0", "short.tiff"),
    ):
        (tmp_path / name).write_bytes(content)
        assert words in refused(tmp_path / name)


ADVERSARIAL = {
    "highdicom_sm_image.dcm": "no tissue",
    "highdicom_sm_image_dots.dcm": "no tissue",
    "highdicom_sm_image_jpegls.dcm": "Unsupported transfer syntax",
    "histolab_broken.svs": "is a text file, not a slide",
    "ospy_boxes.tiff": "352.8 µm/px",
    "ospy_small.svs": "no tissue",
    "ospy_unopenable.tiff": "compression",
    "ospy_unreadable.svs": "cannot be decoded at x 0, y 0",
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_the_adversarial_files(name: str, refused_with_work: Refused) -> None:
    assert ADVERSARIAL[name] in refused_with_work(slide_path("adversarial") / name)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_the_adversarial_files_taken_whole(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where there are pixels, ``--tissue none --mpp`` analyses them; else words again. Never a traceback."""
    arguments = ["infer", str(slide_path("adversarial") / name), "-m", "planted", "--tissue", "none", "--mpp", "0.5"]
    code = main([*arguments, "-o", str(tmp_path / "out")])
    err = capsys.readouterr().err
    readable = name in ("highdicom_sm_image.dcm", "highdicom_sm_image_dots.dcm", "ospy_boxes.tiff", "ospy_small.svs")
    assert (code == 0) == readable, err
    assert (tmp_path / "out" / "run.json").exists() == readable
    assert "Traceback" not in err
    assert "unexpected" not in err


def test_all_adversarial_files_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = slide_path("adversarial")
    assert main(["infer", str(folder), "-m", "planted", "-o", str(tmp_path / "out")]) == 1
    out, err = capfd.readouterr()
    assert f"0 of {len(ADVERSARIAL)} slides finished" in out
    assert err.count("error    ") == err.count("try      ") == len(ADVERSARIAL)
    assert not list((tmp_path / "out").rglob("run.json"))


@pytest.mark.parametrize("part", [0.02, 0.5, 0.99])
def test_a_truncated_slide(part: float, refused: Refused, tmp_path: Path) -> None:
    whole = slide_path("CMU-1-Small-Region.svs").read_bytes()
    (tmp_path / "cut.svs").write_bytes(whole[: int(part * len(whole))])
    assert "cut.svs" in refused(tmp_path / "cut.svs")


def test_a_damaged_tile_stops_the_run_and_names_the_place(refused_with_work: Refused, tmp_path: Path) -> None:
    path = planted.write(tmp_path / "damaged.svs", planted.paint(Size(1100, 1500), []), compression="jpeg")
    with tifffile.TiffFile(path) as tiff:
        offset, length = tiff.pages[0].dataoffsets[8], tiff.pages[0].databytecounts[8]  # type: ignore[union-attr]
    with path.open("r+b") as file:
        file.seek(offset + length // 2)
        file.write(bytes(length - length // 2))
    words = refused_with_work(path, "--tissue", "none")
    assert "cannot be decoded at x 512, y 256" in words


def test_fluorescence(refused: Refused) -> None:
    words = refused(slide_path("multi-channel-z-series.ome.tif"))
    assert "not a brightfield slide" in words
    assert "fluorescence" in words


def test_empty_tissue(refused: Refused, tmp_path: Path) -> None:
    glass = planted.write(tmp_path / "glass.svs", planted.paint(SIZE, [], tissue=Box(0, 0, 0, 0)))
    words = refused(glass)
    assert "no tissue was found" in words
    assert "--tissue none" in words
    # The advice can be followed: the refused run left nothing that stands in the way.
    assert main(["infer", str(glass), "-m", "planted", "-o", str(tmp_path / "out"), "--tissue", "none"]) == 0


# --- µm/px ---------------------------------------------------------------------------------------


def _with_mpp(path: Path, mpp: float) -> Path:
    return planted.write(path, planted.paint(SIZE, []), mpp)


def test_no_mpp(refused: Refused, tmp_path: Path) -> None:
    import cv2

    cv2.imwrite(str(tmp_path / "picture.png"), planted.paint(SIZE, [])[..., ::-1])
    words = refused(tmp_path / "picture.png")
    assert "does not state its µm/px" in words
    assert "--mpp" in words
    assert "--mpp" in refused(slide_path("tcga-cr-7395-01a-01-ts1.svs"))


def test_absurd_mpp_in_the_file(refused: Refused, tmp_path: Path) -> None:
    pixels = planted.paint(SIZE, [])
    write_pyramid(tmp_path / "absurd.tiff", pixels, SIZE, 352.8, PyramidLayout(compression="deflate", svs=False))
    words = refused(tmp_path / "absurd.tiff")
    assert "352.8" in words
    assert "0.03 to 20" in words
    assert "--mpp" in words


@pytest.mark.parametrize("given", ["300", "0.001", "1e-300"])
def test_absurd_mpp_from_the_user(slide: Path, refused: Refused, given: str) -> None:
    assert "cannot be the resolution" in refused(slide, "--mpp", given)


def test_a_slide_too_coarse_for_the_model(refused: Refused, tmp_path: Path, slide: Path) -> None:
    words = refused(_with_mpp(tmp_path / "coarse.svs", 4.0))
    assert "4.0 µm/px" in words
    assert "1.0 µm/px" in words
    assert "too coarse" in words
    assert "too coarse" in refused(slide, "--mpp", "2")


# --- models --------------------------------------------------------------------------------------


def test_an_unknown_model(slide: Path, refused: Refused) -> None:
    words = refused(slide, model="plantet")
    assert "no model 'plantet'" in words
    assert "did you mean planted?" in words
    assert "wsiengine models" in refused(slide, model="zzz")


def test_a_model_file_of_another_sha256(slide: Path, refused: Refused, tmp_path: Path) -> None:
    card = tiny(tmp_path / "model")
    with card.model_path.open("ab") as file:
        file.write(b"\0")
    assert "sha256" in refused(slide, model=str(card.folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"score_count": 5}, "5"),
        ({"score_name": "other"}, "other"),
        ({"side": 48}, "48"),
        ({"layout": "NCHW"}, "shape"),
        ({"dtype": "float32"}, "float"),
    ],
)
def test_a_card_that_disagrees_with_its_model(
    slide: Path, refused: Refused, tmp_path: Path, changes: dict, words: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    onnx.save(graph(Tiny(**changes)), folder / "tiny.onnx")
    write_card(folder, card_json(Tiny(), file_sha256(folder / "tiny.onnx")))
    said = refused(slide, model=str(folder))
    assert "tiny" in said
    assert words in said


def test_a_card_without_its_model(slide: Path, refused: Refused, tmp_path: Path) -> None:
    card = tiny(tmp_path / "model")
    card.model_path.unlink()
    assert "tiny.onnx" in refused(slide, model=str(card.folder))
    (tmp_path / "model" / "card.json").write_text("{")
    assert "card.json" in refused(slide, model=str(card.folder))


def test_a_pickle_is_never_opened(slide: Path, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"\x80\x04.")
    assert "model.pt" in refused(slide, model=str(tmp_path / "model.pt"))


def test_a_model_that_returns_nan_names_the_place(refused_with_work: Refused, tmp_path: Path) -> None:
    pixels = planted.paint(SIZE, [])
    pixels[256, 512] = (255, 0, 0)  # the first pixel of a tile, at 0.5 µm/px twice as large
    pixels[256:258, 512:514] = (255, 0, 0)
    slide = planted.write(tmp_path / "poison.svs", pixels)
    card = tiny(tmp_path / "model", poison=True)
    words = refused_with_work(slide, "--tissue", "none", "--overlap", "0", model=str(card.folder))
    assert "NaN" in words
    assert "level-0 pixels" in words


def test_tiles_without_a_number_are_left_out_where_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from wsiengine import Result
    from wsiengine.truth import Truth

    pixels = planted.paint(SIZE, [])
    pixels[256:258, 512:514] = (255, 0, 0)
    slides = {"poison": planted.write(tmp_path / "poison.svs", pixels), "good": tmp_path / "good.svs"}
    planted.write(slides["good"], planted.paint(SIZE, []))
    card = tiny(tmp_path / "model", poison=True)
    scores = {}
    for name, slide in slides.items():
        out = tmp_path / name
        options = (
            "--tissue",
            "none",
            "--overlap",
            "0",
            "--on-bad-tile",
            "skip",
            "-m",
            str(card.folder),
            "-o",
            str(out),
        )
        assert main(["infer", str(slide), *options]) == (1 if name == "poison" else 0)
        scores[name] = Truth.load(out / "probability.zarr").scores
    assert "1 tile could not be read or scored" in capfd.readouterr().out
    assert Result(tmp_path / "poison").summary["unreadable_tiles"] == 1
    missing = np.isnan(scores["poison"]).any(axis=-1)
    assert np.argwhere(missing).tolist() == [[4, 8]]  # tiles of 32 px at 1 µm/px: 64 of the slide's
    assert not np.isnan(scores["good"]).any()


# --- regions -------------------------------------------------------------------------------------


def _polygon(x0: int, y0: int, x1: int, y1: int) -> dict:
    ring = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
    return {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [ring]}}


@pytest.mark.parametrize("option", ["--region", "--tissue"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (_polygon(5000, 5000, 6000, 6000), "lies outside the slide: it spans x 5,000 to 6,000"),
        ({"type": "FeatureCollection", "features": []}, "no polygon with an area"),
        (_polygon(10, 10, 10, 10), "no polygon with an area"),
        ({"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": None}]}, "no polygon"),
        ({"hello": "world"}, "not GeoJSON"),
        ("not json", "not GeoJSON"),
        (None, "cannot be read"),
    ],
)
def test_regions_that_are_none(
    slide: Path, refused: Refused, tmp_path: Path, option: str, content: object, words: str
) -> None:
    path = tmp_path / "roi.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    said = refused(slide, option, path)
    assert words in said
    assert option in said


def test_a_region_smaller_than_the_grid(slide: Path, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "roi.json").write_text(json.dumps(_polygon(101, 101, 103, 103)))
    assert "draw a larger region" in refused(slide, "--region", tmp_path / "roi.json")


def test_a_region_on_glass(slide: Path, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "roi.json").write_text(json.dumps(_polygon(640, 430, 770, 520)))
    words = refused(slide, "--region", tmp_path / "roi.json")
    assert "inside the region" in words
    assert "--tissue none" in words


# --- output --------------------------------------------------------------------------------------


def _code_and_words(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main(["infer", "-m", "planted", *map(str, arguments)])
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "unexpected" not in err
    assert "try      " in err
    return code, err


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_where_the_folder_should_be(
    slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    (tmp_path / "file").write_text("mine")
    code, words = _code_and_words(capsys, slide, "-o", tmp_path / place)
    assert code == 1
    assert "file" in words
    assert "-o" in words
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("problem", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written(
    slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, problem: int
) -> None:
    def refuse(self: Path, *arguments: object, **named: object) -> None:
        raise OSError(problem, os.strerror(problem), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    code, words = _code_and_words(capsys, slide, "-o", tmp_path / "out")
    assert code == 1
    assert os.strerror(problem) in words
    assert "-o" in words


def test_a_disk_that_fills_up_in_the_middle(
    slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [slide, "-o", tmp_path / "out", "--tissue", "none", "--threads", "1"]
    calls = 0

    def write(descriptor: int, data: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls > 6:  # header, tissue, normalisation and some blocks fit
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_write(descriptor, data)

    real_write = journal._write_all
    with monkeypatch.context() as patch:
        patch.setattr(journal, "_write_all", write)
        code, words = _code_and_words(capsys, *arguments)
    assert code == 1
    assert os.strerror(errno.ENOSPC) in words
    assert "resume" in words
    assert {p.name for p in (tmp_path / "out").iterdir()} == {".work"}
    assert main(["infer", "-m", "planted", *map(str, arguments)]) == 0
    assert "\nresume " in capsys.readouterr().out


def test_the_folder_of_another_slide(slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["infer", "-m", "planted", str(slide), "-o", str(out), "--quiet"]) == 0
    before = (out / "run.json").read_bytes()
    other = planted.write(tmp_path / "other.svs", planted.paint(Size(401, 607), [], seed=3))
    code, words = _code_and_words(capsys, other, "-o", out)
    assert code == 1
    assert "the slide differs" in words
    assert "--overwrite" in words
    assert (out / "run.json").read_bytes() == before
    shutil.rmtree(out / "probability.zarr")
    (out / "run.json").write_text("{")
    code, words = _code_and_words(capsys, slide, "-o", out)
    assert code == 1
    assert "run.json cannot be read" in words


# --- values of options ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--mpp", "0"),
        ("--mpp", "nonsense"),
        ("--mpp", "-1"),
        ("--mpp", "nan"),
        ("--mpp", "inf"),
        ("--batch-size", "0"),
        ("--batch-size", "2.5"),
        ("--threshold", "2"),
        ("--threshold", "-0.1"),
        ("--threshold", "nan"),
        ("--overlap", "1.5"),
        ("--overlap", "a lot"),
        ("--memory-limit", "lots"),
        ("--memory-limit", "0"),
        ("--memory-limit", "-4GB"),
        ("--memory-limit", "1e999"),
        ("--threads", "0"),
        ("--smoothing", "-3"),
        ("--min-area", "x"),
    ],
)
def test_values_that_are_none(
    slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["infer", str(slide), "-m", "planted", "-o", str(tmp_path / "out"), f"{option}={value}"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert f"argument {option}" in err
    assert repr(value) in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--overlap", "1.0", "below 1"),
        ("--device", "tpu", "needed auto, cpu, cuda"),
        ("--device", "cuda:x", "needed auto, cpu, cuda"),
        ("--memory-limit", "1MB", "the limit is 1 MiB"),
        ("--normalise", "beautify", "'beautify'"),
    ],
)
def test_values_that_cannot_be(slide: Path, refused: Refused, option: str, value: str, words: str) -> None:
    assert words in refused(slide, option, value)


def test_cuda_where_there_is_none(slide: Path, refused: Refused) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime can do CUDA")
    words = refused(slide, "--device", "cuda")
    assert "CUDA" in words
    assert "--device cpu" in words


def test_the_memory_limit_names_the_largest_part(slide: Path, refused: Refused) -> None:
    assert "Largest part: the libraries" in refused(slide, "--memory-limit", "100MB")


@pytest.mark.parametrize("command", ["info", "tissue"])
def test_the_other_commands_refuse_in_words_too(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.svs").write_text("hello")
    for name in ("nowhere.svs", "text.svs"):
        assert main([command, name]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error    ")
        assert "\ntry      " in err
        assert "Traceback" not in err
