"""Nothing of the patient leaves the slide, nothing leaves the machine, and nobody else may read what the user hides."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

from tests.faults.crashes import plant, planted_environment
from tests.faults.runs import MARKS, SIZE, environment, run
from tests.planted_slides import paint
from tests.qupath_rules import check

SECRETS = ("DOE^JANE", "19570313", "ACC-4711-77", "St Elsewhere", "scanner-of-ward-9", "Dr. Strange")
LABEL_COLOUR = (0, 250, 10)  # nowhere else in the slide

NO_NETWORK = """
import os, sys
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind", "socket.sendto",
                 "urllib.Request", "http.client.connect"):
        os.write(2, f"NETWORK {event} {args}".encode())
        os._exit(99)
sys.addaudithook(refuse)
"""


@pytest.fixture(scope="module")
def identified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide whose tags, description and label name the patient, as scanners write them."""
    path = tmp_path_factory.mktemp("identified") / "DOE_JANE.svs"
    pixels = paint(SIZE, MARKS)
    description = (
        f"Aperio Image Library v11\r\n{SIZE.width}x{SIZE.height} [0,0 {SIZE.width}x{SIZE.height}] (256x256) |MPP = 0.5"
        "|AppMag = 20|Patient = DOE^JANE|DOB = 19570313|User = Dr. Strange|Filename = ACC-4711-77"
        "|Hospital = St Elsewhere"
    )
    tags = [
        (315, "s", 0, "Dr. Strange", True),
        (316, "s", 0, "scanner-of-ward-9", True),
        (269, "s", 0, "DOE^JANE", True),
    ]
    label = np.full((200, 300, 3), LABEL_COLOUR, np.uint8)
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(
            pixels,
            tile=(256, 256),
            photometric="rgb",
            compression="zlib",
            description=description,
            extratags=tags,
            metadata=None,
        )
        tiff.write(pixels[::4, ::4].copy(), photometric="rgb", description=description, metadata=None)
        tiff.write(label, photometric="rgb", description="Aperio\r\nlabel 300x200", subfiletype=1, metadata=None)
    return path


def test_no_identifier_and_no_label_in_any_output(identified: Path, tmp_path: Path) -> None:
    assert all(secret.encode() in identified.read_bytes() for secret in SECRETS)
    out = tmp_path / "out"
    result = run(identified, out)
    assert result.run["slide"]["reader"] == "direct"
    for path in out.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for secret in (*SECRETS, "DOE_JANE", str(identified.parent)):
            assert secret.encode() not in content, (path.name, secret)
            assert secret not in path.name
    picture = cv2.imread(str(out / "overlay.png"))[..., ::-1].astype(int)
    assert picture.shape[0] > 200
    assert np.abs(picture - LABEL_COLOUR).sum(axis=2).min() > 60
    chunks = (out / "overlay.png").read_bytes()
    assert not any(kind in chunks for kind in (b"tEXt", b"iTXt", b"zTXt", b"eXIf", b"tIME"))


def test_what_the_commands_print_names_the_file_but_not_its_tags(identified: Path, tmp_path: Path) -> None:
    for command in (["info", str(identified)], ["info", "--json", str(identified)]):
        done = subprocess.run(
            [sys.executable, "-m", "wsiengine", *command], env=environment(), capture_output=True, text=True, check=True
        )
        told = done.stdout.replace(str(identified), "")
        assert not any(secret in told for secret in SECRETS), told


def test_no_network_during_a_run(slide: Path, tmp_path: Path) -> None:
    commands = (
        ["infer", str(slide), "-m", "planted", "-o", str(tmp_path / "out")],
        ["export", str(tmp_path / "out"), "--threshold", "0.6"],
        ["info", str(slide)],
        ["models"],
    )
    watched = planted_environment(plant(tmp_path / "site", NO_NETWORK))  # in every process that a command starts
    for command in commands:
        words = [sys.executable, "-m", "wsiengine", *command]
        done = subprocess.run(words, env=watched, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    talks = "import socket; socket.create_connection(('127.0.0.1', 9), 1)"
    done = subprocess.run([sys.executable, "-c", talks], env=watched, capture_output=True, check=False)
    assert done.returncode == 99


@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o077, 0o600, 0o700), (0o022, 0o644, 0o755)])
def test_outputs_follow_the_users_umask(
    slide: Path, tmp_path: Path, umask: int, file_mode: int, folder_mode: int
) -> None:
    before = os.umask(umask)
    try:
        run(slide, tmp_path / "out")
    finally:
        os.umask(before)
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (folder_mode if path.is_dir() else file_mode), (path.name, oct(mode))


def test_names_are_never_markup(slide: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "<script>alert(1)<" / "<img src=x onerror=alert(1)>.svs"
    hostile.parent.mkdir()
    hostile.write_bytes(slide.read_bytes())
    out = tmp_path / "<b>out"
    run(hostile, out)
    assert check(out / "annotations.geojson") == []
    assert b"<" not in (out / "annotations.geojson").read_bytes()
    for path in out.rglob("*.json"):
        assert "<" not in json.dumps(json.loads(path.read_text())), path.name
