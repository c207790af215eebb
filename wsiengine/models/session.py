"""A model's runtime in the number format that was asked for, or that fits the device."""

from wsiengine.models.card import Card
from wsiengine.models.mnn import DEVICE
from wsiengine.models.precision import REFERENCE, choose_precision
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
