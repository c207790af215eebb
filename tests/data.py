"""Where the shared real data is: the folder named by ``WSIENGINE_DATA``; tests that need it skip without."""

import os
from pathlib import Path

import pytest


def data_dir() -> Path:
    """The data folder; skips the calling test, with the reason, where it is not set."""
    root = os.environ.get("WSIENGINE_DATA")
    if not root:
        pytest.skip("WSIENGINE_DATA is not set: real slides and tissue are not at hand")
    return Path(root)


def slide_path(name: str) -> Path:
    """A file under ``wsi/`` of the data folder."""
    return data_dir() / "wsi" / name
