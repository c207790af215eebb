"""The card's part for ``task: segment``: what the maps of a segmenter mean, and how objects come out of them.

``outputs.scores`` is (N, channels, rows, cols), rows = cols = ``input.size_px`` / ``output_stride_px``: one map for
each entry of ``channels``, in that order, before the card's ``activation``.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from wsiengine.errors import CardError
from wsiengine.models.fields import Fields

CONTOUR, BACKGROUND = "contour", "background"


@dataclass(frozen=True, slots=True)
class Segmentation:
    """What the maps mean.

    Attributes:
        channels: For each map a class of the card, ``contour`` (the band along borders, which keeps touching objects
            apart) or ``background`` (softmax needs it).
        threshold: A cell belongs to a class from this probability on.
        contour_above: A cell is a border above this probability of ``contour`` (1: never); objects are what is left
            without borders, grown back.
        grow_um: How far they are grown back at most.
        holes_um2: Holes in objects are filled up to this area.
        min_area_um2: Smaller objects are left out.
        bright_above: A pixel whose darkest channel is above this level counts as lumen (empty, or clear mucus): adds
            the map ``lumen`` and the measurement of its share. None: no such map.
        object_type: What objects are to QuPath: ``annotation`` or ``detection``.
    """

    channels: tuple[str, ...]
    threshold: float = 0.5
    contour_above: float = 0.5
    grow_um: float = 10.0
    holes_um2: float = 0.0
    min_area_um2: float = 0.0
    bright_above: int | None = None
    object_type: str = "annotation"


def read_segmentation(entry: Fields) -> Segmentation:
    """The card's ``segmentation``.

    Raises:
        CardError: An entry is missing, unknown or wrong.
    """
    bright = (
        entry.integer("bright_above", at_least=0) if entry.has("bright_above") else entry.take("bright_above", None)
    )
    found = Segmentation(
        channels=_names(entry, "channels"),
        threshold=entry.number("threshold", low=0, high=1, default=0.5),
        contour_above=entry.number("contour_above", low=0, high=1, default=0.5),
        grow_um=entry.number("grow_um", low=0, high=1e4, default=10.0),
        holes_um2=entry.number("holes_um2", low=0, high=1e12, default=0.0),
        min_area_um2=entry.number("min_area_um2", low=0, high=1e12, default=0.0),
        bright_above=bright,
        object_type=entry.choice("object_type", ("annotation", "detection"), default="annotation"),
    )
    entry.finish()
    return found


def _names(entry: Fields, key: str) -> tuple[str, ...]:
    given = entry.take(key)
    if not isinstance(given, list) or not given or not all(isinstance(name, str) and name for name in given):
        raise CardError(f"{entry.where}.{key} is {given!r}, needed a list of names, one for each map")
    return tuple(given)


def check_segmentation(found: Segmentation, classes: Sequence[str], activation: str, where: str) -> None:
    """Refuse channels that are not the card's classes.

    Raises:
        CardError: Says which.
    """
    channels = found.channels
    unknown = [name for name in channels if name not in (*classes, CONTOUR, BACKGROUND)]
    wrong = None
    if unknown:
        wrong = f"segmentation.channels names {', '.join(unknown)}, which is no class, nor contour or background"
    elif len(set(channels)) < len(channels):
        wrong = "segmentation.channels names a channel twice"
    elif missing := [name for name in classes if name not in channels]:
        wrong = f"segmentation.channels lacks {', '.join(missing)}"
    elif activation == "softmax" and (BACKGROUND not in channels or CONTOUR in channels):
        wrong = "softmax shares 1 among background and classes: channels need background, and no contour"
    if wrong:
        raise CardError(f"{where}: {wrong}", hint="see docs/cards.md")


def segmentation_json(found: Segmentation | None) -> dict[str, Any] | None:
    """As :func:`read_segmentation` reads it."""
    return None if found is None else {**asdict(found), "channels": list(found.channels)}
