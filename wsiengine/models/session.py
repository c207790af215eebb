"""A model's runtime in the number format that was asked for, or that fits the device."""

import threading
from contextlib import suppress

from wsiengine.errors import WsiError
from wsiengine.models.card import Card
from wsiengine.models.mnn import DEVICE
from wsiengine.models.ort import import_onnxruntime
from wsiengine.models.precision import REFERENCE, choose_precision
from wsiengine.models.registry import load_model
from wsiengine.models.runtime import Runtime, shared_runtime


def open_runtime(
    card: Card, precision: str = REFERENCE, *, device: str = "auto", threads: int = 1, batch_size: int | None = None
) -> Runtime:
    """The runtime, shared by all slides of the process; its ``card`` says which number format it has.

    Args:
        card: The model.
        precision: ``fp32``, ``fp16``, ``int8`` or ``auto``.
        device, threads, batch_size: As for :class:`~wsiengine.models.runtime.Runtime`.

    Raises:
        PlanError: The model does not come in that format, or the device only imitates it.
        ModelError: As for :class:`~wsiengine.models.runtime.Runtime`.
    """
    if device == DEVICE and precision == "auto":
        precision = REFERENCE  # MNN's 8 bits take longer than its 32
    runtime = shared_runtime(card, device=device, threads=threads, batch_size=batch_size)
    chosen = choose_precision(precision, card.variants, card.name, gpu=not runtime.on_cpu)
    if chosen == REFERENCE:
        return runtime
    return shared_runtime(card.at(chosen), device=device, threads=threads, batch_size=batch_size)


def open_early(model: str, precision: str, *, device: str, batch_size: int | None) -> None:
    """Begin to open a runtime that a run will soon ask for, on a thread of its own: ONNX Runtime needs a tenth of a
    second for it, and lets go of the interpreter meanwhile. What is wrong with the model that run will say.

    Args: as for :func:`wsiengine.models.registry.load_model` and :func:`open_runtime`.
    """

    def open_it() -> None:
        with suppress(WsiError, OSError):
            card = load_model(model)
            if card.task != "detect":  # which imports more: no two threads should import at once
                open_runtime(card, precision, device=device, batch_size=batch_size)

    with suppress(WsiError):
        import_onnxruntime()
        threading.Thread(target=open_it, name="wsiengine-early", daemon=True).start()
