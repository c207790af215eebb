"""A run tells nobody about itself, and its outputs say nothing of whom the slide is from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import planted_slides as planted
from wsiengine.cli import main
from wsiengine.geometry import Box, Size

ROOT = Path(__file__).parent.parent
SECRET = "MARGARET-SMITH"
SCORE = """
import socket

def refuse(*arguments, **options):
    raise AssertionError(f"a connection to {arguments}")

socket.socket.connect = socket.socket.connect_ex = socket.create_connection = refuse

import numpy as np
from wsiengine.models.registry import load_model
from wsiengine.models.runtime import Runtime

Runtime(load_model("planted"), device="cpu").scores(np.zeros((64, 64, 3), np.uint8), np.array([[0, 0]]))
"""


def test_a_model_leaves_nothing_in_the_home_folder(tmp_path: Path) -> None:
    home, kernels = tmp_path / "home", tmp_path / "kernels"
    home.mkdir()
    surroundings = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "ORT_", "WSIENGINE_"))}
    surroundings |= {"HOME": str(home), "NUMBA_CACHE_DIR": str(kernels), "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", SCORE], env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path for path in home.rglob("*") if path.is_file()] == []


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    """A slide with a name in its folder, its file name and its metadata."""
    folder = tmp_path / SECRET
    folder.mkdir()
    path = planted.write(
        folder / f"{SECRET}.svs", planted.paint(Size(603, 811), [(planted.A, Box(100, 100, 400, 500))])
    )
    data = path.read_bytes()
    comment = b"Aperio layout, written by wsiengine"
    assert data.count(comment) >= 1
    path.write_bytes(data.replace(comment, f"Aperio {SECRET}".encode().ljust(len(comment))))
    return path


def test_no_output_names_the_slide(slide: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shared = ["--tissue", "none", "--tiles", "--mpp", "0.5", "--quiet"]
    assert main(["infer", str(slide), "--model", "planted", "-o", str(out), *shared]) == 0
    assert main(["export", str(out), "--format", "csv"]) == 0
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {"annotations.geojson", "tiles.geojson", "run.json", "export.csv"} <= {path.name for path in files}
    assert [path.name for path in files if SECRET.encode() in path.read_bytes() or SECRET in path.name] == []
    assert not any(str(tmp_path) in str(value) for value in json.loads((out / "run.json").read_text("utf-8")).values())
