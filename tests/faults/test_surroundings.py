"""Bad surroundings: no home, odd names, few file handles, one core, other starts of processes, missing libraries."""

import concurrent.futures
import multiprocessing
import os
import resource
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.faults.crashes import plant, planted_environment
from tests.faults.runs import COMMAND, TILES, contents, environment, run

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # later Pythons, of forking

NOWHERE = "/proc/nowhere"  # nobody can write there, not even root


def _infer(slide: Path | bytes, out: Path, *more: str, **options) -> "subprocess.CompletedProcess[str]":  # type: ignore[no-untyped-def]
    command = [*COMMAND, "-o", str(out), *more, "--", slide]
    options = {"env": environment(), "check": False, **options}
    return subprocess.run(command, capture_output=True, text=True, errors="replace", **options)


def test_no_home_and_no_cache(slide: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    bare = {name: environment()[name] for name in ("PATH", "PYTHONPATH")}
    homeless = {"HOME": NOWHERE, "XDG_CACHE_HOME": NOWHERE, "XDG_CONFIG_HOME": NOWHERE, "TMPDIR": NOWHERE}
    done = _infer(slide, tmp_path / "out", env={**bare, **homeless})
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == wanted


ODD_NAMES = [
    b"with spaces and 'quotes'.svs",
    b"-leading-dash.svs",
    b"not utf-8 \xff\xfe.svs",
    b"line\nbreak\tand tab.svs",
    "Schnitt Ä µ 片 😀.svs".encode(),
    b"%s{0}*[a].svs",
    b"n" * 240 + b".svs",
]


@pytest.mark.parametrize("name", ODD_NAMES, ids=range(len(ODD_NAMES)))
def test_odd_names(slide: Path, wanted: dict[str, bytes], tmp_path: Path, name: bytes) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    shutil.copy(slide, odd)
    out = tmp_path / os.fsdecode(b"out " + name[:100])
    run(odd, out)
    assert contents(out) == wanted


def test_odd_names_on_the_command_line(slide: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    for name in ODD_NAMES[1:4]:
        shutil.copy(slide, os.fsencode(tmp_path) + b"/" + name)
        done = _infer(name, tmp_path / "out", "--overwrite", *(["--json"] if b"\n" in name else []), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert contents(tmp_path / "out") == wanted


def test_very_long_paths_are_read_or_refused_in_words(slide: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    deep = tmp_path / Path(*["d" * 200] * 10)
    deep.mkdir(parents=True)
    shutil.copy(slide, deep / "slide.svs")
    run(deep / "slide.svs", deep / "out")
    assert contents(deep / "out") == wanted
    done = _infer(slide, tmp_path / ("x" * 300))
    assert done.returncode == 1
    assert "File name too long" in done.stderr
    assert "unexpected" not in done.stderr


def test_many_slides_with_few_file_handles(slide: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    for k in range(24):
        shutil.copy(slide, folder / f"{k}.svs")

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))

    done = _infer(folder, tmp_path / "out", preexec_fn=few)
    assert done.returncode == 0, done.stderr
    assert "24 of 24 slides finished" in done.stdout
    for k in (0, 23):
        assert contents(tmp_path / "out" / str(k)) == wanted


def test_one_bad_slide_does_not_stop_the_others(slide: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    shutil.copy(slide, folder / "a.svs")
    (folder / "b.svs").write_bytes(slide.read_bytes()[:3000])
    (folder / "c.svs").write_bytes(b"")
    shutil.copy(slide, folder / "d.svs")
    done = _infer(folder, tmp_path / "out")
    assert done.returncode == 1
    assert "2 of 4 slides finished" in done.stdout
    assert "c.svs is empty" in done.stderr
    for name in "ad":
        assert contents(tmp_path / "out" / name) == wanted


def test_one_core(slide: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    done = _infer(slide, tmp_path / "out", preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}))
    assert done.returncode == 0, done.stderr
    assert "1 thread" in done.stdout
    assert contents(tmp_path / "out") == wanted


def _tiles(slide: Path, out: Path) -> int:
    return int(run(slide, out).summary["tiles"])


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_runs_inside_worker_processes(slide: Path, wanted: dict[str, bytes], tmp_path: Path, method: str) -> None:
    run(slide, tmp_path / "before")  # a session and threads have been used here before a fork
    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
        futures = [pool.submit(_tiles, slide, tmp_path / f"out{k}") for k in range(2)]
        assert [future.result(timeout=120) for future in futures] == [TILES, TILES]
    assert contents(tmp_path / "out1") == wanted


@pytest.mark.parametrize("library", ["onnxruntime", "openslide", "zarr"])
def test_a_missing_library_is_named(slide: Path, tmp_path: Path, library: str) -> None:
    site = plant(tmp_path / "site", f"import sys; sys.modules[{library!r}] = None")
    done = _infer(slide, tmp_path / "out", env=planted_environment(site))
    assert done.returncode == 1
    assert library in done.stderr.lower().replace(" ", "")
    assert "Traceback" not in done.stderr
    assert "unexpected" not in done.stderr


def test_the_clock_may_go_back(
    slide: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = time.time()
    ticks = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: first - 3600 * next(ticks))
    run(slide, tmp_path / "out")
    assert contents(tmp_path / "out") == wanted
