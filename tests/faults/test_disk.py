"""A disk that is full, read-only or gone: said in words, nothing half-written, and the run goes on afterwards."""

import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.disks import FINISHED, IN_WORDS, failing_disk
from tests.faults.kills import changes
from tests.faults.runs import COMMAND, environment, fork, resume, run, visible, wait
from tests.faults.syscalls import FaultAt, disk_full, read_only, share_gone
from wsiengine.errors import OutputError
from wsiengine.scratch import Scratch


@pytest.mark.parametrize("fault", [disk_full, read_only, share_gone])
def test_a_failing_disk_is_said_in_words_and_the_run_goes_on(
    slide: Path, wanted: dict[str, bytes], tmp_path: Path, fault: Callable[[str], None]
) -> None:
    out = tmp_path / "out"
    whole = changes(slide, out)
    renamed = next(k for k, change in enumerate(whole) if change == "os.rename /.work/results/run.json")
    some = random.Random(fault.__name__).sample(range(1, renamed), 12)
    for number in [*some, renamed - 3, renamed]:
        code = failing_disk(slide, out, number, fault)
        assert code == IN_WORDS or (code == FINISHED and fault is disk_full and number >= renamed - 5), whole[number]
        assert "run.json" not in visible(out) or len(visible(out)) == 4, whole[number]
        assert resume(slide, out, wanted).equal, whole[number]


def _limited(slide: Path, out: Path, size_bytes: int) -> "subprocess.CompletedProcess[str]":
    """The command with a limit on the size of any file that it writes: a quota."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, size_bytes))  # noqa: E731
    command = [*COMMAND, str(slide), "-o", str(out)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, preexec_fn=limit)


def test_a_quota_met_by_the_command(slide: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    done = _limited(slide, tmp_path / "out", 2_500)
    assert done.returncode == 1
    assert "Cannot write" in done.stderr
    assert "File too large" in done.stderr
    assert "try      free some space" in done.stderr
    assert "Traceback" not in done.stderr
    assert visible(tmp_path / "out") == []
    resumed = resume(slide, tmp_path / "out", wanted)
    assert resumed.equal


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for next to nothing."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs the right to mount a tmpfs")
def test_a_small_disk_fills_up(slide: Path, wanted: dict[str, bytes], small_disk: Path) -> None:
    out = small_disk / "out"
    with pytest.raises(OutputError, match="No space left on device"):
        run(slide, out)
    assert visible(out) == []
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    resumed = resume(slide, out, wanted)
    assert resumed.equal
    assert resumed.tiles > 0


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs the right to mount a tmpfs")
def test_scratch_files_take_their_room_when_they_are_made(small_disk: Path) -> None:
    """Where it is lacking is said then: a mapping without its space would end the process by SIGBUS."""
    make = Scratch(small_disk, 0)
    make.zeros((32 << 10,), "u1")[:] = 1
    with pytest.raises(OutputError, match="No space left on device") as refused:
        make.zeros((1 << 20,), "u1")
    assert "free some space" in str(refused.value.hint)
    with pytest.raises(OutputError, match="1 MiB are needed"):
        make.require(1 << 20)
    assert not list(small_disk.iterdir())


def test_a_folder_that_may_only_be_read(slide: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="Cannot make the folder"):
        run(slide, tmp_path / "locked" / "out")


def test_finished_results_can_be_read_where_nothing_can_be_written(slide: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(slide, out)

    def work() -> None:
        with FaultAt(tmp_path, 0, read_only, lasting=True):
            run(slide, out)

    assert wait(fork(work)) == 0
