"""The same model on all devices and in all number formats that this machine has, compared on drawn tiles.

For ``wsiengine doctor --check MODEL``. The reference is float32 on the CPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from wsiengine.errors import DependencyError, ProviderError
from wsiengine.models.card import Card
from wsiengine.models.ort import CPU
from wsiengine.models.probe import answers
from wsiengine.models.runtime import Runtime

DEVICES = ("cpu", "cuda", "tensorrt", "mnn")
# Largest difference of a probability (of other outputs: in parts of their largest value) that is no fault.
TOLERANCES = {"fp32": 1e-3, "fp16": 2e-2, "int8": 2e-1}
_IDENTICAL = 0.0  # on one device, whatever the threads: part of what runs promise


@dataclass(frozen=True, slots=True)
class Comparison:
    """One way of running the model.

    Attributes:
        way: Device, number format and threads, in words.
        chosen: What ran it; where it is missing, why.
        difference: From the reference; None where it is missing, infinity where the outputs have other shapes.
        tolerance: What is allowed.
    """

    way: str
    chosen: str
    difference: float | None
    tolerance: float

    @property
    def faulty(self) -> bool:
        return self.difference is not None and not self.difference <= self.tolerance


def compare(card: Card) -> Iterator[Comparison]:
    """Each way of running the model against float32 on the CPU.

    Raises:
        ModelError: The reference itself cannot be run.
    """
    reference = Runtime(card, device="cpu")
    wanted = answers(reference, card)
    yield Comparison("cpu, fp32", f"{reference.chosen}: the reference", 0.0, _IDENTICAL)
    yield _against(wanted, card, "cpu", "fp32", threads=2)
    for device in DEVICES:
        for precision in ("fp32", *card.variants):
            if (device, precision) == ("cpu", "fp32"):
                continue
            if (device, precision) == ("cpu", "fp16"):
                why = "a CPU would compute it in float32"
                yield Comparison("cpu, fp16", why, None, TOLERANCES["fp16"])
                continue
            yield _against(wanted, card.at(precision), device, precision)


def _against(wanted: list[np.ndarray], card: Card, device: str, precision: str, threads: int = 1) -> Comparison:
    way = f"{device}, {precision}" + (f", {threads} threads" if threads > 1 else "")
    tolerance = TOLERANCES[precision]
    try:
        runtime = Runtime(card, device=device, threads=threads)
    except (ProviderError, DependencyError) as error:
        return Comparison(way, f"missing: {error.message}", None, tolerance)
    if precision == "fp32" and runtime.provider == CPU:
        tolerance = _IDENTICAL
    return Comparison(way, runtime.chosen, difference(wanted, answers(runtime, card)), tolerance)


def difference(wanted: list[np.ndarray], found: list[np.ndarray]) -> float:
    """The largest, in parts of the largest value wanted where that is above 1; infinity for other shapes or NaN."""
    if [a.shape for a in wanted] != [a.shape for a in found]:
        return float("inf")
    largest = 0.0
    for a, b in zip(wanted, found, strict=True):
        if a.size:
            scale = max(1.0, float(np.abs(a).max()))
            gap = float(np.abs(a.astype(np.float64) - b).max()) / scale
            largest = max(largest, gap if gap == gap else float("inf"))
    return largest
