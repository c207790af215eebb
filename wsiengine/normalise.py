"""The stain and contrast recipe: fitted once per slide (:mod:`wsiengine.fitting`), applied to every block by kernels.

A :class:`Normaliser` holds numbers only; what its steps (:mod:`wsiengine.steps`) need round a block adds up to
:attr:`Normaliser.halo_px`. Order: resample (the slide's reader) → stain → CLAHE.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from wsiengine.geometry import Box, Mpp
from wsiengine.recipe import Recipe, parse_recipe
from wsiengine.slides.base import Slide
from wsiengine.steps import KINDS, Step, TileStep

__all__ = ["Normaliser", "Recipe", "fit_normaliser", "parse_recipe"]


@dataclass(frozen=True)
class Normaliser:
    """A recipe, fitted to one slide. Picklable; equal if it does the same.

    Attributes:
        recipe: What was asked for.
        steps: What is done to every block.
        fit: What was found: stain vectors and strengths, glass, number of sampled pixels.
        notes: What a person should know, in sentences: what could not be fitted and what was done instead.
    """

    recipe: Recipe = field(default_factory=Recipe)
    steps: tuple[Step, ...] = ()
    fit: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tile_steps: tuple[TileStep, ...] = ()

    @property
    def halo_px(self) -> int:
        """Working pixels that :meth:`apply` needs on every side of a box."""
        return sum(step.halo_px for step in self.steps)

    def apply(self, pixels: np.ndarray, box_px: Box) -> np.ndarray:
        """The normalised pixels of ``box_px``.

        Args:
            pixels: (h + 2 halo, w + 2 halo, 3) uint8 RGB, read from ``box_px.grow(halo_px)``.
            box_px: The wanted box, in absolute working pixels.

        Returns:
            (h, w, 3) uint8; ``pixels`` itself where there is nothing to do.

        Raises:
            ValueError: The pixels are not uint8 RGB or do not have that shape.
        """
        remaining = self.halo_px
        expected = (box_px.height + 2 * remaining, box_px.width + 2 * remaining, 3)
        if pixels.shape != expected or pixels.dtype != np.uint8:
            raise ValueError(f"this box needs uint8 pixels of shape {expected}, not {pixels.dtype} {pixels.shape}")
        for step in self.steps:
            remaining -= step.halo_px
            pixels = step.apply(pixels, box_px.grow(remaining))
        return pixels

    def apply_to_tile(self, tile: np.ndarray) -> np.ndarray:
        """What the recipe does to each tile by itself, after :meth:`apply`: (side, side, 3) uint8 → the same."""
        for step in self.tile_steps:
            tile = step.apply(np.ascontiguousarray(tile))
        return tile

    def to_json(self) -> str:
        """Everything, as one line of JSON; the same text for the same normaliser."""
        facts = {
            "version": 1,
            "recipe": [dict(step) for step in self.recipe.steps],
            "steps": [_facts(step) for step in (*self.steps, *self.tile_steps)],
            "fit": dict(self.fit),
            "notes": list(self.notes),
        }
        return json.dumps(facts, sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Normaliser":
        """What :meth:`to_json` wrote, to the last bit."""
        facts = json.loads(text)
        if facts.get("version") != 1:
            raise ValueError(f"a normaliser of version 1 is needed, not {facts.get('version')!r}")
        steps = []
        for stored in facts["steps"]:
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k != "kind"}
            steps.append(KINDS[stored["kind"]](**values))
        slide_steps = tuple(step for step in steps if not isinstance(step, TileStep))
        tile_steps = tuple(step for step in steps if isinstance(step, TileStep))
        recipe = Recipe(tuple(facts["recipe"]))
        return cls(recipe, slide_steps, facts["fit"], tuple(facts["notes"]), tile_steps)


def _facts(step: Any) -> dict[str, Any]:
    return {"kind": step.kind, **asdict(step)}


def fit_normaliser(recipe: Recipe, slide: Slide, tissue: Any, mpp: Mpp) -> Normaliser:
    """Fit a recipe to a slide.

    Args:
        recipe: What to do.
        slide: Read at few places on a slide-fixed lattice (about 1 µm/px); no random numbers.
        tissue: Has ``mask`` (rows, cols) bool with its corner at the slide's, and ``mpp`` of that mask.
        mpp: µm per working pixel, on which the normaliser will be applied.

    Raises:
        PlanError: A CLAHE region is smaller than 8 working pixels, or a step needs more than 4096 round a block.
        UnreadableSlide: A sampled place cannot be decoded.
    """
    if not recipe:
        return Normaliser(recipe)
    from wsiengine.fitting import fit_steps  # its kernels are slow to load, and most runs need none

    return Normaliser(recipe, *fit_steps(recipe, slide, tissue, mpp))
