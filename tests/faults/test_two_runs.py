"""Two runs on one folder, a dead process's lock, another run's settings, a worker that dies."""

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import COMMAND, contents, environment, fork, kill, run, wait
from wsiengine import output
from wsiengine.errors import OutputConflict, OutputInUse
from wsiengine.events import Event
from wsiengine.inference import Outputs
from wsiengine.journal import FolderLock


def _wait_for(path: Path) -> None:
    until = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_second_run_is_refused_while_the_first_lives_and_only_then(
    slide: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    out, ready = tmp_path / "out", tmp_path / "ready"

    def first() -> None:
        def listener(event: Event) -> None:
            if event.kind == "progress" and event.data["done"] > 30:
                ready.touch()
                time.sleep(60)

        run(slide, out, listener=listener)

    pid = fork(first)
    _wait_for(ready)
    with pytest.raises(OutputInUse, match="Another run is writing to"):
        run(slide, out)
    with pytest.raises(OutputInUse):
        run(slide, out, overwrite=True)
    again = subprocess.run(
        [*COMMAND, str(slide), "-o", str(out)], env=environment(), capture_output=True, text=True, check=False
    )
    assert again.returncode == 1
    assert "error    slide.svs: Another run is writing to" in again.stderr
    kill(pid)
    assert (out / ".work" / "lock").exists()  # of a dead process
    run(slide, out)
    assert contents(out) == wanted


def test_a_run_that_begins_as_another_ends(
    slide: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which takes away the folder in which the lock was about to be made."""
    out, making, times = tmp_path / "out", output.make_folder, []

    def make_folder(folder: Path) -> None:
        making(folder)
        times.append(folder)
        if len(times) == 1:
            run(slide, out)

    monkeypatch.setattr(output, "make_folder", make_folder)
    told: list[str] = []
    run(slide, out, listener=lambda event: told.append(str(event.data.get("text", ""))))
    assert any("Already finished" in text for text in told)
    assert contents(out) == wanted
    assert not (out / ".work").exists()


def test_many_runs_begun_at_once_make_one_result(slide: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"

    def work() -> None:
        try:
            run(slide, out)
        except OutputInUse:
            os._exit(7)

    codes = [wait(pid) for pid in [fork(work) for _ in range(6)]]
    assert set(codes) <= {0, 7}
    assert 0 in codes
    assert contents(out) == wanted


def test_a_lock_on_a_file_that_was_taken_away_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends removes its lock file; who had opened it just before must not believe to be alone."""
    path = tmp_path / "out" / "lock"
    path.parent.mkdir()
    original = os.open

    def opened(*args, **kwargs):  # type: ignore[no-untyped-def]
        fd = original(*args, **kwargs)
        path.unlink()
        return fd

    monkeypatch.setattr(os, "open", opened)
    with pytest.raises(OutputInUse):
        FolderLock(path)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"threshold": 0.9}, r"the threshold differs \(0.0 there, 0.9 now\)"),
        ({"outputs": Outputs(smoothing_um=50.0)}, r"the smoothing differs \(0.0 there, 50.0 now\)"),
        ({"outputs": Outputs(tiles=True)}, "the wish for tile objects differs"),
    ],
)
def test_another_drawing_of_a_finished_run_is_not_passed_over_in_silence(
    slide: Path, tmp_path_factory: pytest.TempPathFactory, options: dict, difference: str
) -> None:
    out = tmp_path_factory.getbasetemp() / "drawn"
    if not out.exists():
        run(slide, out)
    with pytest.raises(OutputConflict, match=difference) as refused:
        run(slide, out, **options)
    assert "wsiengine export" in str(refused.value.hint)
    run(slide, out)


def test_files_of_a_killed_publishing_do_not_stay_beside_another_wish(
    slide: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when tiles.geojson was in place and run.json was not; then asked for without tiles."""
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "run.json":
            raise KeyboardInterrupt
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            run(slide, tmp_path / "out", outputs=Outputs(tiles=True))
    assert (tmp_path / "out" / "tiles.geojson").exists()
    run(slide, tmp_path / "out")
    assert contents(tmp_path / "out") == wanted


def test_a_slide_that_changes_while_it_is_read(slide: Path, tmp_path: Path) -> None:
    from wsiengine.errors import UnreadableSlide

    growing = tmp_path / "growing.svs"
    growing.write_bytes(slide.read_bytes())

    def listener(event: Event) -> None:
        if event.kind == "progress" and event.data["done"] == 117:
            with growing.open("ab") as file:
                file.write(b"more")

    with pytest.raises(UnreadableSlide, match="was changed while it was read"):
        run(growing, tmp_path / "out", listener=listener)
    assert list((tmp_path / "out").iterdir()) == []
    run(growing, tmp_path / "out")


def _drop_other_copies(kept: str, dask_scheduler: Any = None) -> None:
    """Have every worker but ``kept`` forget the job."""
    jobs = [key for key in dask_scheduler.tasks if str(key).startswith("Job-")]
    for address in dask_scheduler.workers:
        if address != kept:
            dask_scheduler.request_remove_replicas(address, jobs, stimulus_id="test")


@pytest.mark.parametrize("last_copy", [False, True])
def test_a_worker_that_is_killed_costs_its_blocks_only(
    slide: Path, wanted: dict[str, bytes], tmp_path: Path, last_copy: bool
) -> None:
    """``last_copy``: the job lay on that worker alone, as the scheduler drops copies that it thinks needless."""
    distributed = pytest.importorskip("distributed")
    killed = []
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=":0", silence_logs=50, memory_limit=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        victims = list(client.run(os.getpid).values())

        def listener(event: Event) -> None:
            if event.kind == "progress" and event.data["done"] > 20 and not killed:
                killed.append(victims[0])
                if last_copy:
                    client.run_on_scheduler(_drop_other_copies, next(iter(client.run(os.getpid))))
                    time.sleep(0.3)
                os.kill(victims[0], signal.SIGKILL)

        run(slide, tmp_path / "out", client=client, listener=listener)
        with suppress(TimeoutError):  # closing a cluster in the middle of a restart is its own source of errors
            client.wait_for_workers(2, timeout=20)
    assert killed
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["host"]["threads"] == 2  # of the cluster, not of this process
    assert contents(tmp_path / "out") == wanted
