"""The number formats that a model comes in, what each costs, and which one a run takes.

A card names further files of the same network under ``precision``::

    "precision": {"int8": {"file": "mine.int8.onnx", "agreement": 0.987, "loss_points": 0.2, "tiles": 812}}

``agreement`` is the part of held-out tiles that get the same answer as in float32, ``loss_points`` how much balanced
accuracy is lost, in points of a hundred. fp32 is the card's own file. Pure.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wsiengine.errors import CardError, PlanError
from wsiengine.models.fields import Fields, kind_of

REFERENCE = "fp32"
PRECISIONS = (REFERENCE, "fp16", "int8")
ASKED = (*PRECISIONS, "auto")
LEAST_AGREEMENT = 0.98
MOST_LOSS_POINTS = 1.0
LEAST_TILES = 100


@dataclass(frozen=True, slots=True)
class Variant:
    """Another file of the network, and what was measured on it; ``facts`` are for readers."""

    file: str
    agreement: float
    loss_points: float
    facts: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def faithful(self) -> bool:
        """Whether ``auto`` may take it: the same answer on 98 % of 100 tiles or more, and at most one point lost."""
        measured = self.facts.get("tiles", 0) >= LEAST_TILES
        return measured and self.agreement >= LEAST_AGREEMENT and self.loss_points <= MOST_LOSS_POINTS


def read_variants(precision: Mapping[str, Any], where: str) -> dict[str, Variant]:
    """The other files among a card's facts about precision, by their number format.

    Raises:
        CardError: An entry fp16 or int8 that is no file with its measured agreement and loss.
    """
    found = {}
    for name in PRECISIONS[1:]:
        said = precision.get(name)
        if isinstance(said, Mapping):
            entry = Fields(dict(said), f"{where}: precision: {name}")
            file = entry.text("file")
            agreement, loss = entry.number("agreement", low=0, high=1), entry.number("loss_points")
            found[name] = Variant(file, agreement, loss, entry.mapping())
        elif said is not None and not isinstance(said, str):
            raise CardError(f"{where}: precision: {name} is {kind_of(said)}, needed a file and what it costs, or text")
    return found


def choose_precision(asked: str, variants: Mapping[str, Variant], model: str, *, gpu: bool) -> str:
    """The number format of a run.

    ``auto`` takes the fastest that keeps the answers: fp16 on a GPU, int8 on a CPU; else fp32.

    Args:
        asked: One of :data:`ASKED`.
        variants: The card's.
        model: Its name.
        gpu: Whether a GPU runs it.

    Raises:
        PlanError: No such format, the model does not come in it, or the device only imitates it.
    """
    if asked not in ASKED:
        raise PlanError(f"There is no precision {asked!r}.", hint=f"use {', '.join(ASKED)}.")
    if asked == "auto":
        fast = "fp16" if gpu else "int8"
        return fast if fast in variants and variants[fast].faithful else REFERENCE
    if asked == "fp16" and not gpu:
        raise PlanError(
            "fp16 on a CPU would be a cast: every layer would be computed in float32, and nothing gained.",
            hint="--precision int8 or fp32, or run it on a GPU.",
        )
    if asked != REFERENCE and asked not in variants:
        has = ", ".join((REFERENCE, *variants))
        raise PlanError(
            f"The model {model} does not come in {asked}; it has {has}.",
            hint=f"`wsiengine quantise` makes {asked} from your own tissue, and measures what it costs.",
        )
    return asked
