"""The command line as a user calls it: flags, words, files, exit codes."""

import csv
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import planted_slides as planted
from tests.models.tiny import tiny
from tests.qupath_rules import check
from wsiengine.cli import COMMANDS, main
from wsiengine.geometry import Box, Size

SIZE = Size(803, 1111)
MARKS = [(planted.A, Box(100, 100, 420, 500)), (planted.C, Box(450, 600, 803, 1000))]
RESULTS = {"annotations.geojson", "probability.zarr", "overlay.png", "run.json"}
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.write(tmp_path_factory.mktemp("slides") / "marks.svs", planted.paint(SIZE, MARKS))


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _infer(*arguments: object) -> int:
    return main(["infer", "--model", "planted", "--tissue", "none", *map(str, arguments)])


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def _process(*arguments: object) -> "subprocess.Popen[str]":
    paths = f"{ROOT}:{ROOT / 'kernels'}"
    return subprocess.Popen(
        [sys.executable, "-m", "wsiengine", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONUTF8": "1"},
    )


# --- help and usage ------------------------------------------------------------------------------


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom wsiengine.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'numpy', 'numba', 'scipy', 'cv2', 'dask', 'zarr', 'shapely', 'onnxruntime', 'rich', 'torch'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"\n    {name} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "--debug" in capsys.readouterr().out


def test_help_of_infer_tells_of_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["infer", "--help"])
    out = capsys.readouterr().out
    wanted = "--overlap --batch-size --threshold --region --tissue --mpp --device --tiles --overwrite --memory-limit"
    for option in (wanted + " --quiet --json --debug --output --model").split():
        assert option in out, option


def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    for arguments in (["infer"], ["nonsense"], ["infer", "x.svs", "--no-such-option"], ["infer", "x.svs", "--over"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    assert "usage: wsiengine" in capsys.readouterr().err


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    from wsiengine import __version__

    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == f"wsiengine {__version__}"


# --- infer ---------------------------------------------------------------------------------------


def test_one_slide_in_plain_lines(slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _infer(slide) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert list(lines) == ["terms", "slide", "model", "tissue", "plan", "run", "result", "files"]
    assert "marks.svs · Aperio SVS" in lines["slide"]
    assert "1,111 × 803 px" in lines["slide"]
    assert "0.5 µm/px" in lines["slide"]
    assert "overlap 30 % → stride 48 px (25 %)" in lines["tissue"]
    assert "100 %" in lines["run"]
    assert "Mark A" in lines["result"] or "mark a" in lines["result"]
    assert "\x1b" not in out  # no colours, no bars, when piped
    assert "\r" not in out
    assert _names(tmp_path / "marks.wsiengine") == RESULTS
    assert check(tmp_path / "marks.wsiengine" / "annotations.geojson") == []


def test_the_terms_of_a_model_are_shown_once(slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _infer(slide, "-o", tmp_path / "silent", "--quiet") == 0  # shows nothing: it is not the first use yet
    assert capsys.readouterr().out == ""
    assert _infer(slide, "-o", tmp_path / "a") == 0
    assert "\nterms " in "\n" + capsys.readouterr().out
    assert _infer(slide, "-o", tmp_path / "b") == 0
    assert "terms " not in capsys.readouterr().out


def test_quiet_prints_nothing(slide: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _infer(slide, "--quiet", "-o", tmp_path / "out") == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""
    assert _names(tmp_path / "out") == RESULTS


def test_json_is_one_object_per_line(slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _infer(slide, "--json", "-o", tmp_path / "out") == 0
    events = _json_lines(capsys.readouterr().out)
    kinds = [event["event"] for event in events]
    assert kinds[0] == "start"
    assert kinds[-2:] == ["result", "summary"]
    plan, result = events[kinds.index("plan")], events[-2]
    assert plan["tiles"] == result["summary"]["tiles"] > 0
    assert plan["slide"]["size_l0"] == {"width": 1111, "height": 803}
    assert {Path(name).name for name in result["files"]} == RESULTS
    progress = [event for event in events if event["event"] == "progress"]
    assert [event["done"] for event in progress] == sorted(event["done"] for event in progress)
    assert progress[-1]["done"] == progress[-1]["total"] == plan["tiles"]
    assert events[-1]["slides"] == [{"slide": str(slide), "output": str(tmp_path / "out"), "ok": True}]


def test_options_reach_the_run(slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = "--overlap 50% --threshold 0.4 --smoothing 3 --min-area 100 --tiles --threads 1 --memory-limit 4GB"
    assert _infer(slide, "-o", out, *options.split(), "--device", "cpu", "--mpp", "0.49", "--batch-size", "3") == 0
    assert "warning  µm/px taken from --mpp: 0.49" in capsys.readouterr().out
    run = json.loads((out / "run.json").read_text())
    assert run["plan"]["overlap_used"] == 0.5
    assert run["slide"]["mpp"] == {"y": 0.49, "x": 0.49}
    assert run["host"]["threads"] == 1
    finish = {"threshold": 0.4, "smoothing_um": 3.0, "tolerance_um": None, "min_area_um2": 100.0, "tiles": True}
    assert run["finish"] == finish
    assert "tiles.geojson" in run["files"]
    assert check(out / "tiles.geojson") == []


def test_many_slides_folders_and_globs(slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lone, folder, globbed = tmp_path / "lone.svs", tmp_path / "folder", tmp_path / "globbed"
    lone.write_bytes(slide.read_bytes())
    for name in (folder, globbed):
        name.mkdir()
        (name / "same.svs").write_bytes(slide.read_bytes())
    (folder / "other.tiff").write_bytes(slide.read_bytes())
    (folder / "notes.txt").write_text("no slide")
    (folder / "._same.svs").write_bytes(b"what macOS leaves")
    assert _infer(lone, folder, globbed / "*.svs", lone, "-o", tmp_path / "out") == 0
    assert _names(tmp_path / "out") == {"lone", "other", "same.svs", "same.svs.2"}
    for results in (tmp_path / "out").iterdir():
        assert _names(results) == RESULTS
    out = capsys.readouterr().out
    assert out.count("\ndone ") == 4
    assert "summary  4 of 4 slides finished" in out


def test_a_folder_without_slides_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _infer(tmp_path, "--json") == 1
    [event] = _json_lines(capsys.readouterr().out)
    assert event["event"] == "error"
    assert "holds no slides" in event["message"]
    assert event["try"]


def test_the_folder_of_a_run_is_not_taken_for_slides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "probability.zarr").mkdir()
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "overlay.png").write_bytes(b"a picture")
    assert main(["infer", str(tmp_path), "--model", "planted", "-o", str(tmp_path / "out")]) == 1
    assert "holds the results of a run" in capsys.readouterr().err


def test_a_second_stage_is_shown_with_its_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "show", "rbc"]) == 0
    shown = capsys.readouterr().out
    assert "Macrocyte" in shown
    assert "verdict    Abnormal red cells" in shown


def test_names_with_spaces_and_letters_of_others(slide: Path, tmp_path: Path) -> None:
    odd = tmp_path / "Größe 1 – Fall №7 (β).svs"
    odd.write_bytes(slide.read_bytes())
    assert _infer(odd, "--quiet") == 0
    assert _names(tmp_path / "Größe 1 – Fall №7 (β).wsiengine") == RESULTS


def test_without_output_folder_each_slide_gets_one_here(slide: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.svs"
    second.write_bytes(slide.read_bytes())
    assert _infer(slide, second, "--quiet") == 0
    assert _names(tmp_path) == {"second.svs", "marks.wsiengine", "second.wsiengine"}


@pytest.mark.parametrize("as_json", [False, True])
def test_a_bad_slide_does_not_stop_the_others(
    slide: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], as_json: bool
) -> None:
    bad = tmp_path / "bad.svs"
    bad.write_bytes(b"not a slide at all")
    assert _infer(bad, tmp_path / "missing.svs", slide, "-o", tmp_path / "out", *["--json"] * as_json) == 1
    out, err = capfd.readouterr()
    assert _names(tmp_path / "out" / "marks") == RESULTS
    assert not (tmp_path / "out" / "bad").exists()
    if as_json:
        events = _json_lines(out)
        errors = [event for event in events if event["event"] == "error"]
        assert [(e["slide"], e["kind"]) for e in errors] == [
            ("bad.svs", "UnsupportedSlide"),
            ("missing.svs", "SlideNotFound"),
        ]
        assert all(e["message"] and e["try"] for e in errors)
        assert [s["ok"] for s in events[-1]["slides"]] == [False, False, True]
        assert err == ""
        return
    assert err.count("error    ") == 2
    assert err.count("try      ") == 2
    assert "Traceback" not in err
    table = out[out.index("failed") :].splitlines()
    assert [line.split()[:2] for line in table[:3]] == [
        ["failed", "bad.svs"],
        ["failed", "missing.svs"],
        ["done", "marks.svs"],
    ]
    assert "1 of 3 slides finished" in table[3]


def test_a_finished_run_says_so(slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _infer(slide, "-o", tmp_path / "out") == 0
    before = (tmp_path / "out" / "run.json").stat().st_mtime_ns
    capsys.readouterr()
    assert _infer(slide, "-o", tmp_path / "out") == 0
    assert "Already finished" in capsys.readouterr().out
    assert (tmp_path / "out" / "run.json").stat().st_mtime_ns == before
    assert _infer(slide, "-o", tmp_path / "out", "--overlap", 0) == 1
    assert "the overlap differs (0.25 there, 0.0 now)" in capsys.readouterr().err
    assert _infer(slide, "-o", tmp_path / "out", "--overlap", 0, "--overwrite") == 0


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    from wsiengine.errors import SlideNotFound

    with pytest.raises(SlideNotFound):
        _infer(tmp_path / "missing.svs", "--debug")


def test_ctrl_c_keeps_what_is_done(slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("infer", slide, "-m", "planted", "--tissue", "none", "--overlap", "0.75", "--threads", "1")
    arguments = (*command, "-o", tmp_path / "out")
    run = _process(*arguments, "--json")
    assert run.stdout
    assert run.stderr
    for line in run.stdout:
        event = json.loads(line)
        if event["event"] == "progress" and event["done"] > 0:
            run.send_signal(signal.SIGINT)
            break
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "run the same command again to go on" in err
    assert "Traceback" not in err
    assert _names(tmp_path / "out") == {".work"}
    assert main([*map(str, arguments)]) == 0
    out = capsys.readouterr().out
    assert "\nresume " in out
    assert _names(tmp_path / "out") == RESULTS


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(slide: Path, tmp_path: Path, closed: str) -> None:
    line = f"'{sys.executable}' -m wsiengine infer '{slide}' -m planted --tissue none -o '{tmp_path / 'out'}' {closed}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", ["models", "infer"])
def test_output_into_a_closed_pipe_is_no_error_message(slide: Path, tmp_path: Path, command: str) -> None:
    arguments = {"models": ("--json",), "infer": (slide, slide, "-m", "planted", "-o", tmp_path / "out")}[command]
    run = _process(command, *arguments)
    assert run.stdout
    assert run.stderr
    run.stdout.close()
    assert run.wait(timeout=60) in (0, 1)
    assert run.stderr.read() == ""
    run.stderr.close()


def test_a_terminal_gets_a_bar(slide: Path, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    lead, follow = pty.openpty()
    arguments = ["infer", slide, "-m", "planted", "--tissue", "none", "-o", tmp_path / "out"]
    run = subprocess.Popen(
        [sys.executable, "-m", "wsiengine", *map(str, arguments)],
        stdout=follow,
        stderr=follow,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(follow)
    shown = _read_all(lead, run)
    assert run.wait() == 0, shown
    assert "100 %" in shown
    assert "━" in shown
    assert "result" in shown


def _read_all(descriptor: int, run: "subprocess.Popen[bytes]") -> str:
    """What a pseudo-terminal shows until its program ends."""
    found = b""
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        if select.select([descriptor], [], [], 0.1)[0]:
            try:
                part = os.read(descriptor, 65536)
            except OSError:  # the other side is closed
                break
            found += part
        elif run.poll() is not None:
            break
    os.close(descriptor)
    return found.decode()


# --- the other commands --------------------------------------------------------------------------


def test_info_in_words_and_as_json(slide: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(slide)]) == 0
    out = capsys.readouterr().out
    for words in ("Aperio SVS", "1,111 × 803 px", "0.5 × 0.5", "level 1", "objective", "20×"):
        assert words in out, words
    assert main(["info", str(slide), "--json", "--mpp", "0.25"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["size_l0"] == {"width": 1111, "height": 803}
    assert facts["mpp"] == {"x": 0.25, "y": 0.25}
    assert facts["stated_mpp"] == {"x": 0.5, "y": 0.5}
    assert [level["downsample"] for level in facts["levels"]] == [1.0, 4.0]


def test_tissue_writes_a_mask_that_infer_takes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import cv2

    box = Box(128, 256, 640, 896)
    slide = planted.write(tmp_path / "s.svs", planted.paint(SIZE, [], tissue=box))
    assert main(["tissue", str(slide)]) == 0
    assert "mm²" in capsys.readouterr().out
    folder = tmp_path / "s.tissue"
    assert check(folder / "tissue.geojson") == []
    assert cv2.imread(str(folder / "tissue.png")) is not None
    assert main(["tissue", str(slide), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["area_mm2"] == pytest.approx(box.area * 0.25e-6, rel=0.15)
    taken = ["infer", str(slide), "-m", "planted", "--tissue", str(folder / "tissue.geojson"), "-o", "out"]
    assert main([*taken, "--quiet"]) == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["summary"]["tissue_mm2"] == pytest.approx(facts["area_mm2"], rel=0.05)


def test_models_are_listed_shown_and_added(slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = tiny(tmp_path / "mine")
    for arguments in (["models"], ["models", "list"]):
        assert main(arguments) == 0
        assert "planted" in capsys.readouterr().out
    assert main(["models", "add", str(card.folder)]) == 0
    assert "tiny 1.0" in capsys.readouterr().out
    assert main(["models", "list", "--json"]) == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert entries["tiny"]["source"] == "registered"
    assert entries["planted"]["problem"] is None
    assert main(["models", "show", "tiny"]) == 0
    assert "32 px at 1.0 µm/px" in capsys.readouterr().out
    assert main(["models", "show", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "tiny"
    assert main(["infer", str(slide), "-m", "tiny", "--tissue", "none", "-o", "out", "--quiet"]) == 0


def test_export_draws_again_without_slide_or_model(
    slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.svs"
    copy.write_bytes(slide.read_bytes())
    assert _infer(copy, "-o", tmp_path / "out", "--quiet") == 0
    copy.unlink()
    assert main(["export", "out"]) == 0
    assert "result" in capsys.readouterr().out
    again = tmp_path / "out" / "export.geojson"
    assert again.read_bytes() == (tmp_path / "out" / "annotations.geojson").read_bytes()
    assert main(["export", "out"]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["export", "out", "--threshold", "0.95", "--overwrite", "--json", "--tiles"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert again.read_bytes() != (tmp_path / "out" / "annotations.geojson").read_bytes()
    assert check(again) == []
    kinds = {f["properties"]["objectType"] for f in json.loads(again.read_text())["features"]}
    assert kinds == {"annotation", "tile"}
    assert facts["files"] == [str(Path("out") / "export.geojson")]
    assert "Uncertain" in facts["summary"]["area_mm2"]
    assert main(["export", "out", "-o", "packed.geojson.gz"]) == 0
    assert check(tmp_path / "packed.geojson.gz") == []
    assert main(["export", "out", "-o", "table.csv", "--smoothing", "0.00"]) == 0
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    areas = run["summary"]["area_mm2"]
    assert sum(float(row["Area mm^2"]) for row in rows) == pytest.approx(sum(areas.values()), rel=1e-4)


@pytest.mark.parametrize("name", ["table.csv", "regions.geojson"])
def test_export_into_a_folder_that_is_not_there(
    slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert _infer(slide, "-o", tmp_path / "out", "--quiet") == 0
    assert main(["export", "out", "-o", f"nowhere/{name}"]) == 1
    err = capsys.readouterr().err
    assert "Could not write" in err
    assert "unexpected" not in err


def test_export_of_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "holds no finished run" in err
    assert "try      " in err


def test_doctor_tells_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for words in ("ONNX Runtime", "threads", "CPUExecutionProvider", "problem     none"):
        assert words in out, words
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["problems"] == []
    assert "planted" in facts["models"]


@pytest.mark.slow
def test_demo_finds_its_marks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert out.count("in place") == 3
    assert "means nothing" in out
    assert _names(tmp_path / "wsiengine-demo" / "planted") >= RESULTS
    assert _names(tmp_path / "wsiengine-demo" / "crc5") >= RESULTS


def test_an_empty_folder_does_not_stop_the_other_slides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests import planted_slides
    from wsiengine.geometry import Size

    (tmp_path / "empty").mkdir()
    slide = planted_slides.write(tmp_path / "s.svs", planted_slides.paint(Size(300, 400), []))
    out = tmp_path / "out"
    arguments = [str(tmp_path / "empty"), str(tmp_path / "*.ndpi"), str(slide)]
    assert main(["infer", *arguments, "-m", "planted", "--tissue", "none", "-o", str(out)]) == 1
    told = capsys.readouterr().err
    assert "holds no slides" in told
    assert "No file matches" in told
    assert (out / "run.json").exists()
