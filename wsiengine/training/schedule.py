"""What decides a training: classes, data, rates, and what happens at which iteration."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from wsiengine.errors import WsiError
from wsiengine.training.data import Field

ALL_STEPS = 1_000
"""Frozen steps that leave nothing but the heads to be trained."""
SCHEDULES = ("cosine", "steps", "constant")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, apart from the data and the version of torch.

    Attributes:
        classes: Names, in the order of the outputs.
        mpp: µm/px of a tile.
        folds: Which folds to train on.
        sources: Which sets to train on; empty: all.
        joins: Labels that are no class of their own, and the class whose output they train.
        shares: For a class, how often it is drawn from each set (or joined label); a set that is not named gets 0.3,
            one that is absent leaves its share to the others.
        small_until: Part of the training that uses the first, smaller of ``sides_px``.
        frozen_blocks: Steps of the backbone that learn nothing.
        stages: (part of the training, frozen steps) pairs, the parts rising to 1: fine-tuning that begins with the
            heads and lets deeper steps follow; empty: ``frozen_blocks`` throughout.
        schedule: How rates fall after the warm-up: along a cosine, by ten at 60 % and 85 %, or not at all.
        class_weights: What a mistake about a class counts; 1 where nothing is said.
        backbone: One of :data:`wsiengine.training.backbones.NAMES`.
        validation_folds: Not trained on, but scored every ``validate_every`` iterations; empty: no validation.
        patience: Validations without a new best after which training stops; 0: never. The best network is kept.
    """

    classes: tuple[str, ...] = ()
    mpp: float = 1.0
    folds: tuple[int, ...] = (1, 2, 3, 4)
    sources: tuple[str, ...] = ()
    joins: Mapping[str, str] = field(default_factory=dict)
    shares: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    seed: int = 0
    iterations: int = 700
    small_until: float = 0.75
    sides_px: tuple[int, int] = (160, 224)
    batches: tuple[int, int] = (32, 24)
    rate: float = 3e-4
    head_rate: float = 1e-3
    weight_decay: float = 0.02
    frozen_blocks: int = 5
    label_smoothing: float = 0.1
    gate_weight: float = 0.7
    ema: float = 0.995
    threads: int = 2
    stages: tuple[tuple[float, int], ...] = ()
    schedule: str = "cosine"
    class_weights: Mapping[str, float] = field(default_factory=dict)
    backbone: str = "mobilenet_v2"
    validation_folds: tuple[int, ...] = ()
    validate_every: int = 50
    patience: int = 0

    @classmethod
    def read(cls, file: Path) -> "Recipe":
        """The recipe of a training, from the ``recipe.json`` in its folder."""
        said: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return replace(cls(), **{name: _frozen(v) for name, v in said.items()})

    def chosen(self, fields: list[Field]) -> list[Field]:
        """The fields to train on.

        Raises:
            WsiError: A class has none.
        """
        found = [f for f in fields if f.fold in self.folds and (not self.sources or f.source in self.sources)]
        found = [f for f in found if self.joins.get(f.label, f.label) in self.classes]
        have = {self.joins.get(f.label, f.label) for f in found}
        if missing := [name for name in self.classes if name not in have]:
            raise WsiError(
                f"there is nothing to train {', '.join(missing)} on in folds {', '.join(map(str, self.folds))}",
                hint="add images of that class, or leave the class out",
            )
        return found

    def frozen_at(self, iteration: int) -> int:
        """Frozen steps of the backbone at an iteration."""
        done = iteration / self.iterations
        return next((frozen for until, frozen in self.stages if done < until), self.frozen_blocks)

    def step(self, iteration: int) -> tuple[int, int]:
        """Batch size and tile side of an iteration: cheap small tiles first, the model's own size at the end."""
        late = iteration >= self.small_until * self.iterations
        return self.batches[late], self.sides_px[late]

    def rate_at(self, iteration: int) -> float:
        """Factor on the learning rates: linear warm-up over 5 %, then as the schedule says."""
        done = iteration / self.iterations
        if done < 0.05:
            return done / 0.05
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "steps":
            return 0.1 ** ((done >= 0.6) + (done >= 0.85))
        return 0.5 * (1 + float(np.cos(np.pi * (done - 0.05) / 0.95)))


def _frozen(value: Any) -> Any:
    """JSON's lists as tuples, inside one another as well."""
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value
