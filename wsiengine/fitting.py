"""Fitting a recipe to a slide: from sampled pixels to the numbers of its steps.

:func:`fit_steps` is what :func:`wsiengine.normalise.fit_normaliser` calls; :func:`fit_target` makes a stain step's
target of a reference picture.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wsiengine.errors import PlanError
from wsiengine.geometry import Box, Mpp
from wsiengine.recipe import READING_STEPS, TILE_STEPS, Recipe
from wsiengine.sampling import sample_slide
from wsiengine.slides.base import Slide
from wsiengine.steps import (
    BackgroundStep,
    ClaheStep,
    DensityStep,
    LinearStep,
    Numbers,
    ReinhardStep,
    Step,
    TileClaheStep,
    TileStep,
    TileWhitenStep,
)
from wsikernels.clahe_stain import stain_channel
from wsikernels.lab import lab_of_rgb, levels_of_rgb
from wsikernels.published import GREY_MATRIX, colour_moments, demean_terms, whiten_terms
from wsikernels.reinhard import reinhard_terms
from wsikernels.stain import mixing_matrix
from wsikernels.stain_fit import (
    FEWEST_PIXELS,
    StainFit,
    Unfit,
    fit_macenko,
    fit_reinhard,
    fit_vahadane,
    stained,
    standard_fit,
)

_RATIOS = (0.4, 2.5)  # a stain is made at most so much fainter or stronger: beyond, noise is painted
_FAINTEST = 0.05  # a stain whose strong amount is below is absent
_GLASS_L = 94.0  # L of glass where a slide shows none
_GLASS_LEVELS = (200, 250)  # where glass begins, in levels of L, is believed within these
_SMALLEST_REGION_PX = 8
_WIDEST_HALO_PX = 4096  # around every block: beyond, reading it costs far more than the block
_FITS = {"macenko": fit_macenko, "vahadane": fit_vahadane, "standard": standard_fit}


def fit_steps(
    recipe: Recipe, slide: Slide, tissue: Any, mpp: Mpp
) -> tuple[tuple[Step, ...], dict[str, Any], tuple[str, ...], tuple[TileStep, ...]]:
    """What a :class:`~wsiengine.normalise.Normaliser` is made of: steps, fit, notes, and steps of each tile by itself.

    Arguments and errors are those of :func:`wsiengine.normalise.fit_normaliser`.
    """
    sample = sample_slide(slide, tissue.mask, tissue.mpp)
    fitting = _Fitting(sample.tissue, sample.glass, mpp)
    for step in recipe.steps:
        if step["step"] not in (*READING_STEPS, *TILE_STEPS):
            fitting.add(step)
    tile_steps = tuple(_tile_step(step) for step in recipe.steps if step["step"] in TILE_STEPS)
    return tuple(fitting.steps), fitting.found, tuple(fitting.notes), tile_steps


def _tile_step(step: Mapping[str, Any]) -> TileStep:
    if step["step"] == "tile_clahe":
        return TileClaheStep(float(step["clip"]), step["grid"])
    return TileWhitenStep(step["mode"] == "pca")


class _Fitting:
    """Fits step after step; each sees the sampled pixels as the steps before leave them."""

    def __init__(self, tissue: np.ndarray, glass: np.ndarray, mpp: Mpp) -> None:
        self.tissue, self.glass, self.mpp = tissue, glass, mpp
        self.steps: list[Step] = []
        self.notes: list[str] = []
        self.found: dict[str, Any] = {"tissue_pixels": len(tissue), "glass_pixels": len(glass)}
        self.target_vectors: np.ndarray | None = None

    def add(self, step: Mapping[str, Any]) -> None:
        fit = self._stain if step["step"] in _FITS else getattr(self, f"_{step['step']}")
        made: Step | None = fit(step)
        if made is None:
            return
        if made.halo_px > _WIDEST_HALO_PX:
            raise PlanError(
                f"the step {step['step']} needs {made.halo_px:,} px round every block at {self.mpp}; "
                f"at most {_WIDEST_HALO_PX:,} are possible.",
                hint="set a smaller region_um or sigma_um.",
            )
        self.steps.append(made)
        if made.halo_px == 0:
            self.tissue, self.glass = (
                made.apply(pixels[None], Box(0, 0, 1, len(pixels)))[0] for pixels in (self.tissue, self.glass)
            )

    def _stain(self, step: Mapping[str, Any]) -> Step | None:
        fit = self._believable_fit(step)
        if fit is None:
            return None
        target = step["target"]
        ratios = np.array(target["strengths"]) / fit.strengths
        limited = np.clip(ratios, *_RATIOS)
        if not np.array_equal(ratios, limited):
            self.notes.append(
                f"The stains would have to be changed {ratios[0]:.1f}- and {ratios[1]:.1f}-fold to reach the target; "
                f"this is limited to {_RATIOS[0]}- to {_RATIOS[1]}-fold."
            )
        self.found |= {"vectors": [list(v) for v in fit.vectors], "strengths": list(fit.strengths), "target": target}
        self.target_vectors = np.array(target["vectors"])
        matrix = mixing_matrix(fit.matrix, self.target_vectors, (limited[0], limited[1]), step["residual"])
        return DensityStep(_flat(matrix))

    def _believable_fit(self, step: Mapping[str, Any]) -> StainFit | None:
        """The fit, or the measured vectors where it fails, or None: colours are left as they are."""
        name, stains = step["step"], step["stains"]
        reason, apply_measured = "Too little of the slide is stained", True
        try:
            if name != "standard":
                return _FITS[name](self.tissue, stains)
        except Unfit as unfit:
            reason, apply_measured = f"The stains could not be fitted ({name}): {unfit}", not unfit.other_stain
        enough = int(stained(self.tissue, stains).sum()) >= FEWEST_PIXELS
        fit = standard_fit(self.tissue, stains)
        if not (enough and apply_measured and min(fit.strengths) >= _FAINTEST):
            self.notes.append(f"{reason}. Its colours are left as they are.")
            return None
        if name != "standard":
            self.notes.append(f"{reason}. The vectors of Ruifrok and Johnston are used instead.")
        return fit

    def _reinhard(self, step: Mapping[str, Any]) -> Step | None:
        glass_l = float(np.percentile(lab_of_rgb(self.glass)[:, 0], 5)) if len(self.glass) else _GLASS_L
        colours = lab_of_rgb(self.tissue)
        try:
            fit = fit_reinhard(colours[colours[:, 0] < glass_l - 2])
            target = step["target"]
            gain = np.clip(np.array(target["deviation"]) / np.maximum(fit.deviation, 1e-6), *_RATIOS)
            to = np.array(target["mean"])
            terms = reinhard_terms(np.array(fit.mean), np.array(fit.deviation), to, gain * fit.deviation, glass_l)
        except ValueError as unfit:  # too few pixels, or all of one colour
            self.notes.append(f"The colours could not be fitted (reinhard): {unfit}. They are left as they are.")
            return None
        self.found |= {"mean": list(fit.mean), "deviation": list(fit.deviation), "target": target, "glass_l": glass_l}
        return ReinhardStep(_flat(terms))

    def _grey(self, step: Mapping[str, Any]) -> Step:
        return LinearStep(_flat(GREY_MATRIX), (0.0, 0.0, 0.0))

    def _background(self, step: Mapping[str, Any]) -> Step:
        return BackgroundStep(step["sigma_um"] / self.mpp.mean)

    def _demean(self, step: Mapping[str, Any]) -> Step | None:
        return self._linear(step, lambda mean, covariance: demean_terms(mean))

    def _whiten(self, step: Mapping[str, Any]) -> Step | None:
        return self._linear(step, lambda mean, covariance: whiten_terms(mean, covariance, step["mode"] == "pca"))

    def _linear(self, step: Mapping[str, Any], terms: Any) -> Step | None:
        if len(self.tissue) < FEWEST_PIXELS:
            self.notes.append(f"Too little tissue to fit the step {step['step']}: it is left out.")
            return None
        matrix, offset = terms(*colour_moments(self.tissue))
        return LinearStep(_flat(matrix), _flat(offset))

    def _clahe(self, step: Mapping[str, Any]) -> Step | None:
        region_px = round(step["region_um"] / self.mpp.mean)
        if region_px < _SMALLEST_REGION_PX:
            raise PlanError(
                f"a CLAHE region of {step['region_um']:g} µm is {region_px} px at {self.mpp}; "
                f"at least {_SMALLEST_REGION_PX} px are needed.",
                hint=f"set region_um to {_SMALLEST_REGION_PX * self.mpp.mean:.0f} or more.",
            )
        if any(isinstance(earlier, BackgroundStep) for earlier in self.steps):
            self.notes.append(
                "Without its background bare glass is as grey as tissue: CLAHE cannot spare it and amplifies its noise."
            )
        if step["channel"] == "lab":
            glass = _glass_level(levels_of_rgb(self.glass))
            self.found["glass_level"] = glass
            return ClaheStep(region_px, float(step["clip"]), glass)
        vectors = self.target_vectors
        if vectors is None:
            fit = self._believable_fit({"step": "macenko", "stains": "he"})
            if fit is None:
                return None
            vectors = fit.matrix
        glass = (
            _glass_level(stain_channel(self.glass[None], vectors)[0]) if len(self.glass) else _glass_level(self.glass)
        )
        self.found["glass_level"] = glass
        return ClaheStep(region_px, float(step["clip"]), glass, _flat(vectors))


def _glass_level(levels: np.ndarray) -> int:
    """Where bare glass begins: nearly all glass is brighter. Pure white was filled in and says nothing of the glass."""
    seen = levels[(levels >= _GLASS_LEVELS[0]) & (levels < 255)]
    if len(seen) < FEWEST_PIXELS:
        return 235
    return int(np.clip(np.percentile(seen, 2) - 2, *_GLASS_LEVELS))


def _flat(values: np.ndarray) -> Numbers:
    return tuple(float(v) for v in np.ravel(values))


def fit_target(step: str, picture: Path, stains: str = "he") -> dict[str, Any]:
    """The target that a reference picture of tissue sets for a stain step, as numbers.

    Raises:
        PlanError: The picture cannot be read, or its stains cannot be fitted.
    """
    import cv2

    pixels = cv2.imread(str(picture), cv2.IMREAD_COLOR)
    if pixels is None:
        raise PlanError(f"{picture} cannot be read as a picture.", hint="give a PNG or JPEG of H&E tissue.")
    flat = np.ascontiguousarray(pixels[..., ::-1]).reshape(-1, 3)
    try:
        if step == "reinhard":
            colours = lab_of_rgb(flat)
            found = fit_reinhard(colours[colours[:, 0] < _GLASS_L - 8])
            return {"mean": list(found.mean), "deviation": list(found.deviation)}
        fit = _FITS[step](flat, stains)
    except Unfit as unfit:
        raise PlanError(
            f"{picture} cannot be a target: {unfit}.", hint="take a picture full of stained tissue."
        ) from None
    return {"vectors": [list(v) for v in fit.vectors], "strengths": list(fit.strengths)}
