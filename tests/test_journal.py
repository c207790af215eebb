"""The journal: what was appended is there, a torn tail is not, and nobody else's file is taken for one."""

import errno
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest

from wsiengine import journal as journal_module
from wsiengine.errors import OutputError, OutputInUse
from wsiengine.geometry import Box
from wsiengine.journal import FolderLock, Journal, read_journal

HEADER = {"slide": "abc", "parameters": {"overlap": 0.3}}


def _scores(seed: int) -> np.ndarray:
    scores = np.random.default_rng(seed).normal(size=(2, 3, 4)).astype(np.float32)
    scores[0, 1] = np.nan
    return scores


def _filled(path: Path) -> list[int]:
    """A journal with two records → file size after header and after each record."""
    sizes = []
    with Journal.create(path, HEADER) as journal:
        sizes.append(path.stat().st_size)
        journal.add_blob("tissue", b"\x00\x01mask")
        sizes.append(path.stat().st_size)
        for k in range(2):
            journal.add_tiles(Box(2 * k, 0, 2 * k + 2, 3), _scores(k))
            sizes.append(path.stat().st_size)
    return sizes


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    _filled(tmp_path / "journal")
    journal, found = Journal.resume(tmp_path / "journal")
    journal.close()
    assert found.header == HEADER
    assert found.blobs == {"tissue": b"\x00\x01mask"}
    assert [box for box, _ in found.tiles] == [Box(0, 0, 2, 3), Box(2, 0, 4, 3)]
    np.testing.assert_array_equal(found.tiles[1][1], _scores(1))


def test_blocks_of_other_tasks_come_back(tmp_path: Path) -> None:
    ran = np.array([[True, False, False], [True, True, False], [False, True, True]])
    with Journal.create(tmp_path / "journal", HEADER) as journal:
        journal.add_block(Box(2, 5, 5, 8), ran, b"its own")
        journal.add_block(Box(0, 0, 1, 1), np.array([[True]]), b"")
    found = read_journal(tmp_path / "journal")
    assert found.begun
    assert not found.tiles
    (box, there, payload), (_, _, empty) = found.blocks
    assert (box, payload, empty) == (Box(2, 5, 5, 8), b"its own", b"")
    np.testing.assert_array_equal(there, ran)


def test_every_torn_tail_is_cut_and_the_journal_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    sizes = _filled(path)
    whole = path.read_bytes()
    for length in range(sizes[0], len(whole)):
        path.write_bytes(whole[:length])
        journal, found = Journal.resume(path)
        with journal:
            records = len(found.blobs) + len(found.tiles)
            assert records == sum(size <= length for size in sizes[1:])
            journal.add_tiles(Box(8, 0, 10, 3), _scores(9))
        journal, again = Journal.resume(path)
        journal.close()
        assert again.tiles[-1][0] == Box(8, 0, 10, 3)
        assert len(again.blobs) + len(again.tiles) == records + 1


def test_no_flipped_bit_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    sizes = _filled(path)
    whole = bytearray(path.read_bytes())
    for at in range(sizes[1], sizes[2], 5):  # inside the first record of tiles
        whole[at] ^= 4
        path.write_bytes(whole)
        journal, found = Journal.resume(path)
        journal.close()
        assert not found.tiles
        assert "tissue" in found.blobs
        whole[at] ^= 4


def test_a_journal_without_its_header_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    for content in (b"", b"WSIJRNL1", b"not a journal at all", b"WSIJRNL1" + b"\x00" * 100):
        path.write_bytes(content)
        with pytest.raises(OutputError, match="not a journal"):
            read_journal(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_said_in_words(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Cannot write"):
        Journal.create(tmp_path / "journal", HEADER)


def test_a_full_disk_leaves_a_journal_that_goes_on(tmp_path: Path) -> None:
    import resource
    import signal

    path = tmp_path / "journal"
    sizes = _filled(path)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    journal, _ = Journal.resume(path)
    with journal:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[-1] + 40, limit[1]))
            with pytest.raises(OutputError, match="Finished blocks are kept"):
                journal.add_tiles(Box(4, 0, 6, 3), _scores(5))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            signal.signal(signal.SIGXFSZ, old_handler)
        assert path.stat().st_size == sizes[-1]
        journal.add_tiles(Box(4, 0, 6, 3), _scores(6))
    journal, found = Journal.resume(path)
    journal.close()
    np.testing.assert_array_equal(found.tiles[2][1], _scores(6))


def test_nothing_is_appended_behind_a_record_that_could_not_be_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    _filled(path)

    def gone(*_: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    journal, _ = Journal.resume(path)
    with journal:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", gone)
            patch.setattr(os, "ftruncate", gone)
            with pytest.raises(OutputError):
                journal.add_tiles(Box(4, 0, 6, 3), _scores(5))
        with pytest.raises(OutputError):
            journal.add_tiles(Box(6, 0, 8, 3), _scores(6))


def test_two_runs_exclude_each_other(tmp_path: Path) -> None:
    folder = tmp_path / "out" / ".work"
    folder.mkdir(parents=True)
    with FolderLock(folder / "lock"), pytest.raises(OutputInUse, match=r"Another run is writing to .*out"):
        FolderLock(folder / "lock")
    FolderLock(folder / "lock").release()


def test_who_still_writes_to_a_draft_does_no_harm(tmp_path: Path) -> None:
    """A run that slept while it began."""
    with (tmp_path / "journal.new").open("wb", buffering=0) as draft:
        with Journal.create(tmp_path / "journal", {"of": "another"}):
            draft.write(b"too late, and longer than a header, which it would come to lie over")
        assert read_journal(tmp_path / "journal").header == {"of": "another"}


@pytest.mark.parametrize("since", ["nobody came", "another is there", "another came and went"])
def test_a_lock_that_the_server_forgot_while_the_machine_slept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, since: str
) -> None:
    folder = tmp_path / "out" / ".work"
    folder.mkdir(parents=True)
    clock = [1000.0]
    monkeypatch.setattr(journal_module, "now_s", lambda: clock[0])
    with FolderLock(folder / "lock") as lock:
        fcntl.flock(lock._fd, fcntl.LOCK_UN)  # by the server: nobody tells
        lock.check()
        clock[0] += 60
        if since == "another is there":
            with FolderLock(folder / "lock") as other:
                with pytest.raises(OutputInUse, match=r"out was taken over by another run while this one, or its"):
                    lock.check()
                clock[0] += 60
                other.check()
        elif since == "another came and went":
            (folder / "lock").unlink()
            with pytest.raises(OutputInUse, match="taken over"):
                lock.check()
        else:
            lock.check()
            with pytest.raises(OutputInUse, match="Another run is writing"):  # it is locked again
                FolderLock(folder / "lock")


def _add_together(journal: Journal, rows: range) -> None:
    with journal.together():
        for k in rows:
            journal.add_tiles(Box(2 * k, 0, 2 * k + 2, 3), _scores(k))


def test_records_of_one_moment_cost_one_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs: list[int] = []
    whole = os.fdatasync
    with Journal.create(tmp_path / "journal", HEADER) as journal:
        monkeypatch.setattr(os, "fdatasync", lambda fd: (syncs.append(fd), whole(fd)))
        _add_together(journal, range(3))
        assert len(syncs) == 1
        journal.add_blob("after", b"")
        assert len(syncs) == 2
    assert len(read_journal(tmp_path / "journal").tiles) == 3


def test_a_disk_that_fills_up_between_them_keeps_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write, calls = tmp_path / "journal", os.write, []

    def full(fd: int, data: bytes) -> int:
        calls.append(fd)
        if len(calls) == 2:
            write(fd, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    with Journal.create(path, HEADER) as journal:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(OutputError, match="No space left"):
                _add_together(journal, range(3))
        journal.add_tiles(Box(6, 0, 8, 3), _scores(4))
    assert [box.y0 for box, _ in read_journal(path).tiles] == [0, 6]


def test_a_record_that_is_broken_off_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "journal", os.write

    def interrupted(fd: int, data: bytes) -> int:
        write(fd, data[:10])
        raise KeyboardInterrupt

    with Journal.create(path, HEADER) as journal:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                _add_together(journal, range(1))
        _add_together(journal, range(1, 3))  # what was finished meanwhile
    assert [box.y0 for box, _ in read_journal(path).tiles] == [2, 4]


def test_a_journal_that_is_closed_says_so_in_words(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "journal", HEADER)
    journal.close()
    with pytest.raises(OutputError, match="Cannot write"):
        _add_together(journal, range(1))


def test_what_cannot_be_synced_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with Journal.create(tmp_path / "journal", HEADER) as journal:
        journal.add_tiles(Box(0, 0, 2, 3), _scores(0))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", broken)
            with pytest.raises(OutputError, match="Input/output"):
                _add_together(journal, range(1, 3))
    assert [box.y0 for box, _ in read_journal(tmp_path / "journal").tiles] == [0]
