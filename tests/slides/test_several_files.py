"""Slides in several files: one of a DICOM series stands for all, and a change in any file is another slide."""

import shutil
import struct
from pathlib import Path

import pytest

from tests.data import data_dir
from wsiengine.commands.infer import find_slides
from wsiengine.geometry import Size
from wsiengine.slides import open_slide
from wsiengine.slides.base import SlideInfo, levels_of
from wsiengine.slides.companions import files_of
from wsiengine.slides.dicom import series_uid
from wsiengine.slides.fingerprint import fingerprint

INFO = SlideInfo("made up", "openslide", Size(70, 90), levels_of([Size(70, 90)]), None)
ENDLESS = 0xFFFFFFFF


def element(
    group: int, number: int, kind: bytes, value: bytes, *, explicit: bool = True, endless: bool = False
) -> bytes:
    length = ENDLESS if endless else len(value)
    tag = struct.pack("<HH", group, number)
    if not explicit:
        return tag + struct.pack("<I", length) + value
    if kind in (b"SQ", b"OB", b"UN"):
        return tag + kind + b"\0\0" + struct.pack("<I", length) + value
    return tag + kind + struct.pack("<H", length) + value


def item(value: bytes, *, endless: bool = False) -> bytes:
    end = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) if endless else b""
    return struct.pack("<HHI", 0xFFFE, 0xE000, ENDLESS if endless else len(value)) + value + end


SEQUENCE_END = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)


def dicom(uid: bytes, *, explicit: bool = True, endless: bool = False) -> bytes:
    """A head with a sequence before the series' name that holds another series' name, itself within a sequence."""
    syntax = b"1.2.840.10008.1.2.1\0" if explicit else b"1.2.840.10008.1.2\0"
    other = element(0x20, 0x0E, b"UI", b"9.9.9\0", explicit=explicit)
    tail = SEQUENCE_END if endless else b""
    inner = element(8, 0x1140, b"SQ", item(other, endless=endless) + tail, explicit=explicit, endless=endless)
    outer = element(8, 0x1115, b"SQ", item(inner + other, endless=endless) + tail, explicit=explicit, endless=endless)
    names = element(8, 0x60, b"CS", b"SM", explicit=explicit) + outer
    names += element(0x20, 0x0D, b"UI", b"1.1\0", explicit=explicit)
    return (
        bytes(128)
        + b"DICM"
        + element(2, 0x10, b"UI", syntax)
        + names
        + element(0x20, 0x0E, b"UI", uid, explicit=explicit)
    )


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("endless", [True, False])
def test_the_series_is_found_behind_sequences(explicit: bool, endless: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    whole = dicom(b"1.2.3\0", explicit=explicit, endless=endless)
    path.write_bytes(whole)
    assert series_uid(path) == "1.2.3"
    for length in range(0, len(whole) - 6):
        path.write_bytes(whole[:length])
        assert series_uid(path) in (None, "")
    path.write_bytes(b"no DICOM" * 30)
    assert series_uid(path) is None
    assert series_uid(tmp_path / "nothing.dcm") is None


def test_a_folder_lists_each_series_once(tmp_path: Path) -> None:
    sizes = {"a0": (b"1.1\0", 10), "a1": (b"1.1\0", 5000), "b0": (b"2.2\0", 30), "a2": (b"1.1\0", 90)}
    for name, (uid, extra) in sizes.items():
        (tmp_path / f"{name}.dcm").write_bytes(dicom(uid) + bytes(extra))
    (tmp_path / "odd.dcm").write_bytes(b"no DICOM")
    (tmp_path / "s.svs").write_bytes(b"x")
    wanted = [str(tmp_path / name) for name in ("a1.dcm", "b0.dcm", "odd.dcm", "s.svs")]
    assert find_slides([str(tmp_path)], []) == wanted
    assert find_slides([str(tmp_path / "*.dcm")], []) == wanted[:3]
    named = [str(tmp_path / "a0.dcm"), str(tmp_path / "a2.dcm")]
    assert find_slides(named, []) == named  # who names files gets them


def test_a_real_series_is_one_slide_by_whichever_file(tmp_path: Path) -> None:
    source = data_dir() / "wsi" / "adversarial" / "ospy_boxes_dcm"
    for path in source.glob("*.dcm"):
        shutil.copyfile(path, tmp_path / path.name)
    assert len(find_slides([str(tmp_path)], [])) == 1
    paths = sorted(tmp_path.iterdir())
    assert files_of(paths[0]) == paths
    known = set()
    for path in paths:
        with open_slide(path) as slide:
            known.add(slide.fingerprint())
    assert len(known) == 1
    renamed = tmp_path / "sub"
    renamed.mkdir()
    for number, path in enumerate(reversed(paths)):
        shutil.copyfile(path, renamed / f"{number}.dcm")
    with open_slide(renamed / "0.dcm") as slide:
        assert slide.fingerprint() in known  # never of a name or place
    data = bytearray(paths[1].read_bytes())
    data[-5] ^= 1
    paths[1].write_bytes(data)
    assert fingerprint(str(paths[0]), INFO) != fingerprint(str(renamed / "1.dcm"), INFO)


def mirax(folder: Path) -> Path:
    (folder / "slide").mkdir(parents=True)
    (folder / "slide.mrxs").write_bytes(b"the label, a picture")
    for name in ("Slidedat.ini", "Index.dat", "Data0000.dat", "Data0001.dat"):
        (folder / "slide" / name).write_bytes(name.encode() * 50)
    return folder / "slide.mrxs"


def test_mirax_is_known_by_all_its_files(tmp_path: Path) -> None:
    path = mirax(tmp_path / "a")
    first = fingerprint(str(path), INFO)
    assert fingerprint(str(mirax(tmp_path / "b")), INFO) == first
    for name in ("Slidedat.ini", "Data0001.dat"):
        other = mirax(tmp_path / name)
        with (other.parent / "slide" / name).open("r+b") as file:
            file.seek(7)
            file.write(b"!")
        assert fingerprint(str(other), INFO) != first


def test_vms_names_its_images(tmp_path: Path) -> None:
    (tmp_path / "s.vms").write_text("[Virtual Microscope Specimen]\nNoLayers=1\nImageFile=s.jpg\nMapFile=m.jpg\n")
    for name in ("s.jpg", "m.jpg", "stranger.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    assert files_of(tmp_path / "s.vms") == [tmp_path / n for n in ("s.vms", "m.jpg", "s.jpg")]
    before = fingerprint(str(tmp_path / "s.vms"), INFO)
    (tmp_path / "m.jpg").write_bytes(b"other")
    assert fingerprint(str(tmp_path / "s.vms"), INFO) != before
