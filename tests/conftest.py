"""Settings of the whole suite: no deadlines (machines differ), and nothing of the user's configuration is touched."""

import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A script in the background has SIGINT ignored, and so would have every process that a test starts and then interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("suite", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _own_config(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Registered models and first-use notices live in a folder of the test's own."""
    folder = tmp_path_factory.mktemp("config")
    monkeypatch.setenv("WSIENGINE_CONFIG", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _one_slide_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """``main(["infer", …])`` with one slide stays here: faster, and open to patches. The command itself does not."""
    monkeypatch.setattr("wsiengine.commands.infer._in_own_process", lambda args, slides: len(slides) > 1)
