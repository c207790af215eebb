"""kill -9 at any point: finished blocks stay, and the same command ends with the same bytes."""

import itertools
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.faults.kills import changes, journalled_tiles, killed_after, killed_at_change
from tests.faults.runs import COMMAND, contents, environment, fork, run, visible, wait
from tests.faults.syscalls import FaultAt, crash
from wsiengine.grid import Block
from wsiengine.job import BlockScores, Job, score_block
from wsiengine.journal import _records

FEW = 10  # of the changes; benchmarks/faults.py takes them all


def test_a_crash_before_any_change_of_the_disk_loses_nothing(
    slide: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    whole = changes(slide, out)
    assert len(whole) > 100
    results = sorted({name.split("/")[0] for name in wanted})
    publishing = next(k for k, change in enumerate(whole) if change == "os.rename /.work/results/annotations.geojson")
    some = set(range(publishing, len(whole))) | set(range(5, len(whole), len(whole) // FEW))
    for number in sorted(some):
        outcome = killed_at_change(slide, out, number, wanted)
        assert outcome.survived, (whole[number], outcome)
        assert "run.json" not in outcome.shown or outcome.shown == results, whole[number]
        assert outcome.shown == [] or number > publishing, whole[number]
        assert visible(out) == results, whole[number]
        assert not (out / ".work").exists(), whole[number]


@pytest.mark.parametrize("seed", range(12))
def test_kill_at_random_moments(slide: Path, wanted: dict[str, bytes], tmp_path: Path, seed: int) -> None:
    moment_s = random.Random(seed).uniform(0.02, 0.6)
    outcome = killed_after(slide, tmp_path / "out", moment_s, wanted)
    assert outcome.survived, outcome


def test_killed_twice_in_a_row(slide: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number in (30, 25, 20, 15):
        killed_at_change(slide, out, number, wanted)
    assert contents(out) == wanted


def test_the_command_itself_killed_and_repeated(slide: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*COMMAND, str(slide), "-o", str(out)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = out / ".work" / "journal"
    until = time.monotonic() + 60
    while (not journal.exists() or journal.stat().st_size < 2000) and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = journalled_tiles(out)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if kept:
        assert f"{kept} of 117 tiles were done before" in done.stdout
    assert contents(out) == wanted


def test_a_run_that_overwrites_goes_on_where_it_was_killed(
    slide: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(slide, out, overlap=0.5)

    def work() -> None:
        with FaultAt(out, 60, crash):
            run(slide, out, overwrite=True)

    assert wait(fork(work)) == 9
    kept = journalled_tiles(out)
    assert kept
    found = []
    run(slide, out, overwrite=True, listener=lambda e: found.append(e.data["done"]) if e.kind == "resume" else None)
    assert found == [kept]
    assert contents(out) == wanted
    # Another version may have mended what was wrong: then everything is done again.
    wait(fork(work))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wsiengine.output.__version__", "0.0.0")
        run(slide, out, overwrite=True, listener=lambda e: found.append(e.data["done"]) if e.kind == "resume" else None)
    assert found == [kept]


def test_lost_blocks_and_other_scores_would_be_seen(slide: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    """The test of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wsiengine.journal._records", lambda data: itertools.islice(_records(data), 5))
        outcome = killed_at_change(slide, tmp_path / "out", 45, wanted)
    assert outcome.resumed.equal
    assert not outcome.survived
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wsiengine.graph.score_block", _other_scores)
        killed_at_change(slide, tmp_path / "out", 45, {})
    assert contents(tmp_path / "out") != wanted


def _other_scores(job: Job, block: Block) -> BlockScores:
    right = score_block(job, block)
    return BlockScores(right.tiles, right.scores * 1.01, right.seconds)
