"""A reader that crashes or hangs costs its own slide; the others are finished and the exit code tells."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.crashes import plant, planted_environment
from tests.faults.runs import COMMAND, contents, environment
from wsiengine.cli import main


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(plant(tmp_path / "site"))


def slides(slide: Path, folder: Path, *names: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.svs").write_bytes(slide.read_bytes())
    return [str(folder / f"{name}.svs") for name in names]


def infer(*arguments: object) -> int:
    return main(["infer", *map(str, arguments), "-m", "planted", "--threads", "1"])


def same(folder: Path, wanted: dict[str, bytes]) -> bool:
    return contents(folder) == wanted


@pytest.mark.usefixtures("planted")
def test_a_crash_is_an_error_of_that_slide(
    slide: Path, wanted: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    named = slides(slide, tmp_path / "in", "a", "crash", "once", "z")
    assert infer(*named, "-o", tmp_path / "out") == 1
    seen = capfd.readouterr()
    assert "error    crash.svs: The process that read the slide ended by SIGSEGV." in seen.err
    assert "try      the file is damaged" in seen.err
    assert "note     crash.svs: The process that read the slide ended by SIGSEGV. It is tried again." in seen.out
    assert "note     once.svs: The process that read the slide ended by SIGKILL. It is tried again." in seen.out
    assert "summary  3 of 4 slides finished" in seen.out
    for name in ("a", "once", "z"):
        assert same(tmp_path / "out" / name, wanted)
    assert not (tmp_path / "out" / "crash" / "run.json").exists()


@pytest.mark.usefixtures("planted")
def test_a_hang_is_given_up(
    slide: Path, wanted: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    named = slides(slide, tmp_path / "in", "hang", "z")
    assert infer(*named, "-o", tmp_path / "out", "--patience", "15", "--json") == 1
    records = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    [error] = [r for r in records if r["event"] == "error"]
    assert error["message"] == "There was no progress for 15 s: the slide was given up."
    assert [slide["ok"] for slide in records[-1]["slides"]] == [False, True]
    assert same(tmp_path / "out" / "z", wanted)


def command(folder: Path, *named: str) -> "subprocess.Popen[str]":
    """The command in a process of its own, with the faults planted in it and in its child."""
    return subprocess.Popen(
        [*COMMAND, *named, "-o", str(folder / "out")],
        env=planted_environment(plant(folder / "site")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def await_lock(folder: Path, process: "subprocess.Popen[str]") -> None:
    until = time.monotonic() + 60
    while not (folder / ".work" / "lock").exists():
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.05)


def test_a_crash_on_the_only_slide_is_said_in_words(slide: Path, tmp_path: Path) -> None:
    process = command(tmp_path, *slides(slide, tmp_path / "in", "crash"))
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.splitlines() == [
        "error    crash.svs: The process that read the slide ended by SIGSEGV.",
        "try      the file is damaged in a way that its reader does not survive: convert it anew, or leave it out.",
    ]
    assert "note     crash.svs: The process that read the slide ended by SIGSEGV. It is tried again." in said
    assert not (tmp_path / "out" / "run.json").exists()


def test_the_only_slide_goes_on_after_its_process_was_killed(
    slide: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    process = command(tmp_path, *slides(slide, tmp_path / "in", "once"))
    said, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert "ended by SIGKILL. It is tried again." in said
    assert same(tmp_path / "out", wanted)


def test_a_hang_on_the_only_slide_is_given_up(slide: Path, tmp_path: Path) -> None:
    process = command(tmp_path, *slides(slide, tmp_path / "in", "hold"), "--patience", "8")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.startswith("error    hold.svs: There was no progress for 8 s: the slide was given up.\n")
    assert "--patience" in errors


def test_a_pause_of_the_command_pauses_its_process(slide: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    """Ctrl-Z, then ``fg``."""
    process = command(tmp_path, *slides(slide, tmp_path / "in", "a"))
    await_lock(tmp_path / "out", process)
    both = [process.pid, *_children(process.pid)]
    process.send_signal(signal.SIGTSTP)
    until = time.monotonic() + 20
    while any(_state(pid) != "T" for pid in both):
        assert time.monotonic() < until, [_state(pid) for pid in both]
        time.sleep(0.05)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert same(tmp_path / "out", wanted)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("names", [("hang", "z"), ("hang",), ("hold",)], ids=["of two", "alone", "holding on"])
def test_stopping_the_command_stops_its_process(
    slide: Path, tmp_path: Path, number: signal.Signals, names: tuple[str, ...]
) -> None:
    process = command(tmp_path, *slides(slide, tmp_path / "in", *names))
    await_lock(tmp_path / "out" / names[0] if len(names) > 1 else tmp_path / "out", process)
    children = _children(process.pid)
    assert len(children) == 1
    assert _program(children[0]) == _program(process.pid)  # forked
    if names == ("hold",):
        time.sleep(1)  # into the call that does not come back
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    if number == signal.SIGKILL:
        assert process.returncode == -9
    else:
        assert process.returncode == 130
        assert errors == "\nstopped  finished blocks are kept: run the same command again to go on.\n"
    until = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < until, "the child outlived the command"
        time.sleep(0.05)


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _program(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def test_without_a_fault_it_is_one_process_and_the_same_bytes(
    slide: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    original = subprocess.Popen

    def popen(command: list[str], *args: object, **kwargs: object) -> object:
        started.append(command)
        return original(command, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr("wsiengine.isolation.subprocess.Popen", popen)
    assert infer(*slides(slide, tmp_path / "in", "a", "b", "c"), "-o", tmp_path / "out") == 0
    assert len(started) == 1
    assert all(same(tmp_path / "out" / name, wanted) for name in "abc")


def test_looking_on_costs_no_libraries(slide: Path, tmp_path: Path) -> None:
    """What the child loads, the command need not: its process is ready in a moment."""
    named = slides(slide, tmp_path / "in", "a", "b")
    code = (
        "import sys\nimport wsiengine.isolation as isolation\n"
        "def look(*rest):\n"
        "    print(sorted({'numpy', 'dask', 'zarr', 'cv2', 'numba', 'shapely', 'scipy', 'rich'} & set(sys.modules)))\n"
        "    sys.exit(0)\n"
        "isolation.run_isolated = look\n"
        "from wsiengine.cli import main\nmain(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "infer", *named, "-o", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("names", ["ab", "a"])
def test_nobody_listens_any_more(slide: Path, tmp_path: Path, names: str) -> None:
    named = slides(slide, tmp_path / "in", *names)
    line = " ".join(f"'{word}'" for word in [*COMMAND, *named, "-o", str(tmp_path / "out")])
    done = subprocess.run(
        ["bash", "-c", f"{line} | true; exit ${{PIPESTATUS[0]}}"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == ""


@pytest.mark.parametrize("streams", ["sys.stdout = None", "sys.stdout.close()", ""])
def test_a_child_ends_with_its_code_whatever_its_output_is(streams: str) -> None:
    code = f"import sys; from wsiengine.stopping import leave; print('told'); {streams}\nleave(3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (3, "")
    assert streams == "sys.stdout = None" or done.stdout == "told\n"
