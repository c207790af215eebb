"""Memory locked for the device: for as long as it lives, and never more than a wish."""

import gc
from typing import Any

import numpy as np
import pytest

from wsiengine.models import pinned
from wsiengine.models.packing import aligned


class Cuda:
    def __init__(self, code: int = 0) -> None:
        self.locked: dict[int, int] = {}
        self.last_error = code
        self._code = code

    def cudaHostRegister(self, start: Any, size: Any, flags: int) -> int:  # noqa: N802  (CUDA's name)
        if not self._code:
            self.locked[start.value] = size.value
        return self._code

    def cudaGetLastError(self) -> int:  # noqa: N802
        last, self.last_error = self.last_error, 0
        return last

    def cudaHostUnregister(self, start: Any) -> int:  # noqa: N802
        del self.locked[start.value]
        return 0


def test_memory_is_locked_until_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    monkeypatch.setattr(pinned, "_runtime", lambda: cuda)
    batch = aligned((4, 8, 8, 3), np.dtype(np.uint8))
    assert pinned.pin(batch)
    assert cuda.locked == {batch.ctypes.data: batch.nbytes}
    part = batch[1:]
    del batch
    gc.collect()
    assert cuda.locked  # a view still shows it
    del part
    gc.collect()
    assert not cuda.locked


def test_without_cuda_nothing_is_locked() -> None:
    assert not pinned.pin(np.zeros(8, np.uint8))


def test_what_the_system_refuses_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(code=2)
    monkeypatch.setattr(pinned, "_runtime", lambda: cuda)
    memory = np.zeros(8, np.uint8)
    assert not pinned.pin(memory)
    assert not cuda.last_error  # ONNX Runtime's next call would take it for its own
    del memory
    gc.collect()  # nothing is unlocked that was not locked
