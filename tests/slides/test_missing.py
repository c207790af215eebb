"""A slide file that is gone when it is opened again."""

from pathlib import Path

import pytest

from wsiengine.errors import SlideNotFound
from wsiengine.slides.sources import LocalSource


def test_a_missing_file_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No second message comes from what was never opened."""
    unraisable: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", unraisable.append)
    with pytest.raises(SlideNotFound, match="there is no file"):
        LocalSource(str(tmp_path / "gone.svs"))
    assert not unraisable
