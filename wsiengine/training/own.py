"""The recipe file of one's own training: a JSON object in which every entry may be left out.

``docs/training.md`` explains the entries to those who write one.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from wsiengine.errors import WsiError
from wsiengine.models.fields import SLUG, SLUG_WORDS
from wsiengine.models.precision import PRECISIONS
from wsiengine.training.backbones import NAMES
from wsiengine.training.schedule import ALL_STEPS, SCHEDULES
from wsiengine.training.slides import CELL_PX
from wsiengine.training.tables import FOLDS

FEATURES = "features"
_DEFAULT_FREEZE = 0.26  # of the steps of a backbone that comes with weights: its first layers see edges and colours


@dataclass(frozen=True)
class OwnRecipe:
    """What the recipe file says.

    ``freeze`` is ``features`` (only the heads learn), a number of steps of the backbone, or stages: pairs of a part of
    the training and what is frozen until then. ``class_weights`` is ``balanced`` or a number for each class.
    """

    name: str = "model"
    classes: tuple[str, ...] = ()
    merge: dict[str, str] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    mpp: float = 1.0
    source_mpp: float | None = None
    tile_px: int = 224
    test_fold: int = 0
    validation_fold: int | None = None
    patience: int = 0
    iterations: int = 600
    batch: int = 32
    rate: float = 3e-4
    head_rate: float = 1e-3
    schedule: str = "cosine"
    freeze: Any = None
    class_weights: Any = None
    label_smoothing: float = 0.1
    backbone: str = "mobilenet_v2"
    weights: str | None = None
    precision: tuple[str, ...] = ()
    tiles_per_slide: int = 400
    tile_overlap: float = 0.46
    seed: int = 0
    threads: int = 2
    licence: str = "Not stated by those who trained it"
    intended_use: str = "Research. Not a medical device, not for diagnosis."

    @classmethod
    def read(cls, recipe: Path | str) -> "OwnRecipe":
        """From a JSON file, or ``default``.

        Raises:
            WsiError: No such file, no JSON, an unknown entry or one of another kind.
        """
        if str(recipe) == "default":
            return cls()
        file = Path(recipe)
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise WsiError(f"the recipe {file} cannot be read: {error}", hint="give a JSON file, or default") from error
        known = {f.name for f in fields(cls)}
        if not isinstance(said, dict) or (unknown := sorted(said.keys() - known)):
            what = f"unknown entries {', '.join(unknown)}" if isinstance(said, dict) else "no entries"
            raise WsiError(f"the recipe {file} has {what}", hint=f"entries are {', '.join(sorted(known))}")
        for name, value in said.items():
            needed, fits = _RULES[name]
            if not fits(value):
                raise WsiError(f"the recipe {file}: {name} is {json.dumps(value)}, needed {needed}")
        entries: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in said.items()}
        return cls(**entries)

    @property
    def validated(self) -> tuple[int, ...]:
        """The fold that decides when to stop, where one does: the recipe's, or the one after the test fold."""
        if self.validation_fold is not None:
            return (self.validation_fold,)
        return ((self.test_fold + 1) % FOLDS,) if self.patience else ()

    def frozen(self, steps: int, *, pretrained: bool) -> tuple[int, tuple[tuple[float, int], ...]]:
        """Frozen steps of a backbone of so many, and the stages of the training."""
        if self.freeze is None:
            return (round(_DEFAULT_FREEZE * steps) if pretrained else 0), ()
        if isinstance(self.freeze, str | int):
            return _steps(self.freeze), ()
        stages = tuple((float(until), _steps(frozen)) for until, frozen in self.freeze)
        return stages[-1][1], stages

    def weights_of(self, counts: dict[str, int]) -> dict[str, float]:
        """What a mistake about each class counts; ``balanced``: the rarer in images, the more, 1 on average."""
        if self.class_weights != "balanced":
            return dict(self.class_weights or {})
        inverse = {name: 1 / count for name, count in counts.items()}
        mean = sum(inverse.values()) / len(inverse)
        return {name: round(value / mean, 4) for name, value in inverse.items()}


def _steps(frozen: str | int) -> int:
    return ALL_STEPS if frozen == FEATURES else int(frozen)


def _number(low: float, high: float, *, whole: bool = False) -> Callable[[Any], bool]:
    kinds = (int,) if whole else (int, float)
    return lambda v: isinstance(v, kinds) and not isinstance(v, bool) and low <= v <= high


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _freeze(value: Any) -> bool:
    if isinstance(value, list):
        pairs = [v for v in value if isinstance(v, list) and len(v) == 2 and _number(0, 1)(v[0]) and _freeze(v[1])]
        parts = [until for until, _ in pairs]
        return (
            len(pairs) == len(value) > 0 and parts == sorted(parts) and not any(isinstance(f, list) for _, f in pairs)
        )
    return value is None or value == FEATURES or _number(0, ALL_STEPS, whole=True)(value)


def _class_weights(value: Any) -> bool:
    numbers = isinstance(value, dict) and all(_number(1e-3, 1e3)(v) for v in value.values())
    return value is None or value == "balanced" or numbers


_TEXT = ("text", lambda v: isinstance(v, str))
_TEXTS = ("a list of names", _texts)
_FOLD = (f"a fold, 0 to {FOLDS - 1}", _number(0, FOLDS - 1, whole=True))
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": (SLUG_WORDS, lambda v: isinstance(v, str) and SLUG.fullmatch(v) is not None),
    "licence": _TEXT,
    "intended_use": _TEXT,
    "classes": _TEXTS,
    "ignore": _TEXTS,
    "merge": ("an object, label to class", lambda v: isinstance(v, dict) and _texts(list(v.values()))),
    "mpp": ("µm/px, 0.05 to 20", _number(0.05, 20)),
    "source_mpp": ("µm/px, 0.05 to 20", lambda v: v is None or _number(0.05, 20)(v)),
    "tile_px": (
        f"a multiple of {CELL_PX} px, 64 to 1024",
        lambda v: _number(64, 1024, whole=True)(v) and v % CELL_PX == 0,
    ),
    "test_fold": _FOLD,
    "validation_fold": (_FOLD[0], lambda v: v is None or _FOLD[1](v)),
    "patience": ("a whole number from 0", _number(0, 1e6, whole=True)),
    "iterations": ("a whole number from 1", _number(1, 1e7, whole=True)),
    "batch": ("a whole number from 2", _number(2, 4096, whole=True)),
    "rate": ("a number above 0, at most 1", _number(1e-9, 1)),
    "head_rate": ("a number above 0, at most 1", _number(1e-9, 1)),
    "schedule": (" or ".join(SCHEDULES), lambda v: v in SCHEDULES),
    "freeze": ('"features", a number of steps, or stages as [[0.3, "features"], [1, 5]]', _freeze),
    "class_weights": ('"balanced", or a number for each class', _class_weights),
    "label_smoothing": ("a number from 0 to 0.5", _number(0, 0.5)),
    "backbone": (" or ".join(NAMES), lambda v: v in NAMES),
    "weights": ("the path of a file", lambda v: v is None or isinstance(v, str)),
    "precision": (
        f"a list of {' and '.join(PRECISIONS[1:])}",
        lambda v: _texts(v) and set(v) <= set(PRECISIONS[1:]),
    ),
    "tiles_per_slide": ("a whole number from 2", _number(2, 1e6, whole=True)),
    "tile_overlap": ("a number from 0 to 0.9", _number(0, 0.9)),
    "seed": ("a whole number from 0", _number(0, 2**31, whole=True)),
    "threads": ("a whole number from 1", _number(1, 1024, whole=True)),
}
