"""A batch in memory of its own, bound to a session: uploaded once, outputs fetched once, buffers used again."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from wsiengine.errors import DeviceMemoryError, ModelError

_FULL = ("out of memory", "failed to allocate", "bad_alloc", "cudaerrormemoryallocation")  # as libraries say it


class BoundSlot:
    """See :class:`wsiengine.models.feeding.Slot`. The session may be on any device; memory here is the host's.

    Args:
        session: An ONNX Runtime session.
        batch: The input: rows of tiles. Kept; what it holds when :meth:`run` is called is what runs.
        outputs: Names of the outputs that are rows of scores, the gate last if there is one.
        errors: What the session may raise.
    """

    def __init__(
        self, session: Any, batch: np.ndarray, outputs: Sequence[str], errors: tuple[type[Exception], ...]
    ) -> None:
        self.batch = batch
        self._session, self._outputs, self._errors = session, outputs, errors
        self._name = session.get_inputs()[0].name
        self._binding = session.io_binding()

    def run(self) -> np.ndarray:
        """Scores of all rows: (batch size, channels) float32.

        Raises:
            DeviceMemoryError: The device has no room for the batch.
            ModelError: The session failed otherwise.
        """
        binding = self._binding
        try:
            binding.bind_cpu_input(self._name, self.batch)  # binding is what uploads
            for name in self._outputs:
                binding.bind_output(name, "cpu")
            self._session.run_with_iobinding(binding)
            found = binding.copy_outputs_to_cpu()
        except self._errors as error:
            raise _in_words(error, len(self.batch)) from error
        return np.concatenate([np.asarray(part, np.float32).reshape(len(self.batch), -1) for part in found], axis=1)


def _in_words(error: Exception, tiles: int) -> ModelError:
    line = str(error).strip().split("\n", 1)[0][:300]
    if any(sign in str(error).lower() for sign in _FULL):
        return DeviceMemoryError(
            f"The device has no room for batches of {tiles} tiles: {line}",
            hint=f"--batch-size {max(1, tiles // 2)}, or close what else uses the device.",
        )
    return ModelError(f"ONNX Runtime failed on a batch of {tiles} tiles: {line}", hint="try --device cpu.")
