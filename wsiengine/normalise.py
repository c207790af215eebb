"""The stain and contrast recipe: fitted once per slide, applied to every block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wsiengine.geometry import Box, Mpp


@dataclass(frozen=True, slots=True)
class Recipe:
    steps: tuple[Mapping[str, Any], ...] = ()

    def __str__(self) -> str:
        return "+".join(s["step"] for s in self.steps) or "none"


def parse_recipe(steps: Sequence[Mapping[str, Any]] | str) -> Recipe:
    return Recipe()


@dataclass(frozen=True, slots=True)
class Normaliser:
    recipe: Recipe = Recipe()
    halo_px: int = 0
    notes: tuple[str, ...] = ()

    def apply(self, pixels: np.ndarray, box_px: Box) -> np.ndarray:
        return pixels

    def to_json(self) -> str:
        return "{}"

    @classmethod
    def from_json(cls, text: str) -> "Normaliser":
        return cls()


def fit_normaliser(recipe: Recipe, slide: Any, tissue: Any, mpp: Mpp) -> Normaliser:
    return Normaliser(recipe)
