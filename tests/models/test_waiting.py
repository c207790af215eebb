"""How threads wait for a GPU is told to CUDA's driver before a session makes the device's context."""

import ctypes
from typing import Any

import pytest

from tests.models import tiny
from wsiengine.errors import ProviderError
from wsiengine.models import ort, waiting

INVALID = 101  # CUDA_ERROR_INVALID_DEVICE


class Driver:
    """Two devices, numbered from 10; their contexts map memory, and threads turn on the spot."""

    def __init__(self, refuses: str = "") -> None:
        self.flags = {10: 8 | 1, 11: 8 | 1}
        self._refuses, self._ready = refuses, False

    def cuInit(self, flags: int) -> int:  # noqa: N802  (CUDA's names)
        self._ready = True
        return INVALID if self._refuses == "cuInit" else 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        assert self._ready
        if index > 1:
            return INVALID
        device._obj.value = 10 + index
        return 0

    def cuDevicePrimaryCtxGetState(self, device: Any, flags: Any, active: Any) -> int:  # noqa: N802
        flags._obj.value, active._obj.value = self.flags[device.value], 0
        return INVALID if self._refuses == "state" else 0

    def cuDevicePrimaryCtxSetFlags_v2(self, device: Any, flags: ctypes.c_uint) -> int:  # noqa: N802
        if self._refuses == "flags":
            return INVALID
        self.flags[device.value] = flags.value
        return 0


def test_threads_sleep_while_they_wait_for_the_device_named(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(waiting, "_driver", lambda: driver)
    assert waiting.wait_asleep(1)
    assert driver.flags == {10: 8 | 1, 11: 8 | 4}  # whatever else the context does stays


@pytest.mark.parametrize("refuses", ["cuInit", "state", "flags"])
def test_what_the_driver_refuses_stays_as_it_is(monkeypatch: pytest.MonkeyPatch, refuses: str) -> None:
    driver = Driver(refuses)
    monkeypatch.setattr(waiting, "_driver", lambda: driver)
    assert not waiting.wait_asleep(0)
    assert driver.flags[10] == 8 | 1


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_driver", Driver)
    assert not waiting.wait_asleep(2)


def test_without_a_driver_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting.ctypes, "CDLL", _missing)
    assert not waiting.wait_asleep(0)


def _missing(name: str) -> None:
    raise OSError(f"{name}: cannot open shared object file")


def test_it_is_told_before_the_session(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    told: list[Any] = []

    class Library:
        __version__ = "9"

        def get_available_providers(self) -> list[str]:
            return [ort.CUDA, ort.CPU]

        def set_default_logger_severity(self, level: int) -> None:
            pass

    def session(*arguments: Any) -> Any:
        told.append("session")
        raise ProviderError("no device")

    monkeypatch.setattr(ort, "import_onnxruntime", Library)
    monkeypatch.setattr(ort, "wait_asleep", told.append)
    monkeypatch.setattr(ort, "_session", session)
    with pytest.raises(ProviderError):
        ort.open_sessions(tiny.tiny(tmp_path), "cuda:3,1")
    assert told == [3, "session"]
