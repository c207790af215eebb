"""A runtime that is opened early is the one that the run gets."""

import threading
from pathlib import Path
from typing import Any

import pytest

from wsiengine.models import runtime as runtime_module
from wsiengine.models.registry import load_model
from wsiengine.models.session import open_early, open_runtime

ASKED: dict[str, Any] = {"device": "cpu", "batch_size": None}


def wait() -> None:
    for thread in threading.enumerate():
        if thread.name == "wsiengine-early":
            thread.join()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models for which a session is opened, as it is."""
    original, names = runtime_module.open_sessions, list[str]()

    def open_sessions(card: Any, device: str) -> Any:
        names.append(card.name)
        return original(card, device)

    monkeypatch.setattr(runtime_module, "open_sessions", open_sessions)
    monkeypatch.setattr(runtime_module, "_shared_runtimes", type(runtime_module._shared_runtimes)())
    return names


def test_the_session_is_opened_once(opened: list[str]) -> None:
    open_early("planted", "fp32", **ASKED)
    open_runtime(load_model("planted"), "fp32", **ASKED)  # even while it is still being opened
    wait()
    assert opened == ["planted"]


def test_what_is_wrong_with_a_model_the_run_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unheard: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", unheard.append)
    (tmp_path / "card.json").write_text("{}")
    open_early(str(tmp_path), "fp32", **ASKED)
    open_early("no such model", "fp32", **ASKED)
    open_early("planted", "int8", **ASKED)  # it has no such file
    open_early("planted", "fp32", device="cuda:x", batch_size=None)
    wait()
    assert unheard == []
