"""One small slide and its undisturbed results, for all tests of faults."""

from pathlib import Path

import pytest

from tests.faults.runs import contents, run, write_slide


@pytest.fixture(scope="session")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slide(tmp_path_factory.mktemp("faults") / "slide.svs")


@pytest.fixture(scope="session")
def wanted(slide: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of a run that nothing happens to."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run(slide, out)
    return contents(out)
