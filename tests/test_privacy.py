"""A run tells nobody about itself: not even the libraries it uses may collect or send anything."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
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
