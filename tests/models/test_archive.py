"""Archives: what they hold comes out, and nothing else happens."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from wsiengine.errors import IntegrityError
from wsiengine.models import archive
from wsiengine.models.archive import is_archive, unpack


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, data in files.items():
            out.writestr(name, data)
    return path


def tarred(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w:gz") as out:
        for info, data in members:
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.fixture
def goal(tmp_path: Path) -> Path:
    (tmp_path / "goal").mkdir()
    return tmp_path / "goal"


def test_both_kinds_come_out_whole(tmp_path: Path, goal: Path) -> None:
    path = zipped(tmp_path / "a.zip", {"m/card.json": b"{}", "m/sub/w.bin": b"123"})
    assert unpack(path, goal) == goal / "m"
    assert (goal / "m" / "sub" / "w.bin").read_bytes() == b"123"
    other = tmp_path / "other"
    other.mkdir()
    made = tarred(tmp_path / "a.tar.gz", [(member("card.json"), b"{}"), (member("w.bin"), b"45")])
    assert unpack(made, other) == other
    assert (other / "w.bin").read_bytes() == b"45"


NAMES = ["../out.txt", "/tmp/out.txt", "a/../../out.txt", "..\\out.txt", "C:\\out.txt", "a:stream"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_outside(name: str, tmp_path: Path, goal: Path) -> None:
    with pytest.raises(IntegrityError, match="outside the model's folder"):
        unpack(zipped(tmp_path / "a.zip", {name: b"x"}), goal)
    with pytest.raises(IntegrityError, match="outside the model's folder"):
        unpack(tarred(tmp_path / "a.tgz", [(member(name), b"x")]), goal)
    assert not (tmp_path / "out.txt").exists()
    assert list(goal.iterdir()) == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices(kind: bytes, tmp_path: Path, goal: Path) -> None:
    path = tarred(tmp_path / "a.tar.gz", [(member("sub", kind, "/etc"), b""), (member("sub/passwd"), b"x")])
    with pytest.raises(IntegrityError, match="is a link or a device"):
        unpack(path, goal)


def test_a_link_in_a_zip(tmp_path: Path, goal: Path) -> None:
    path = tmp_path / "a.zip"
    info = zipfile.ZipInfo("sub")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "w") as out:
        out.writestr(info, "/etc")
    with pytest.raises(IntegrityError, match="is a link"):
        unpack(path, goal)


def test_a_bomb_and_a_crowd(tmp_path: Path, goal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "_MOST_BYTES", 5 << 20)
    with pytest.raises(IntegrityError, match="unpacks to more than"):
        unpack(zipped(tmp_path / "a.zip", {"a": bytes(4 << 20), "b": bytes(4 << 20)}), goal)
    with pytest.raises(IntegrityError, match="more than 1,000 files"):
        unpack(zipped(tmp_path / "b.zip", {f"{k}.txt": b"" for k in range(1002)}), goal)


def test_two_files_of_one_name(tmp_path: Path, goal: Path) -> None:
    path = tarred(tmp_path / "a.tar.gz", [(member("a"), b"1"), (member("a"), b"2")])
    with pytest.raises(IntegrityError, match="two files of one name"):
        unpack(path, goal)


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tar.xz", "a.tar"])
def test_no_archive_and_a_torn_one(name: str, tmp_path: Path, goal: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"hello, this is no archive" * 40)
    with pytest.raises(IntegrityError, match="damaged, or no archive"):
        unpack(path, goal)
    files = {f"f{k}": bytes(range(256)) * 100 for k in range(3)}
    whole = (
        zipped(path, files)
        if name.endswith("zip")
        else tarred(tmp_path / "a.tar.gz", [(member(k), v) for k, v in files.items()])
    )
    whole.write_bytes(whole.read_bytes()[:-90])
    with pytest.raises(IntegrityError, match="damaged, or no archive"):
        unpack(whole, goal)


def test_torchscript_is_no_archive() -> None:
    assert is_archive("m.TAR.GZ")
    assert not is_archive("torchscript_model.pt")
