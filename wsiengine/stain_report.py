"""What a slide's stain is and what a recipe makes of it: the pictures and lines of ``wsiengine stain``."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np

from wsiengine.geometry import Box, Mpp
from wsiengine.normalise import Normaliser, fit_normaliser
from wsiengine.recipe import Recipe
from wsiengine.sampling import sample_slide
from wsiengine.slides.base import Slide
from wsiengine.slides.reading import require_mpp
from wsiengine.tissue import TissueMask, find_tissue
from wsikernels.stain import optical_density
from wsikernels.stain_fit import stained

_FIELD_PX = 768
_PLOT_PX = 512
_MOST_OD = 2.5


def stain_report(slide: Slide, recipe: Recipe, out_dir: Path) -> dict[str, Any]:
    """Fit a recipe to a slide and show it.

    Args:
        slide: An open slide with known µm/px.
        recipe: What to fit.
        out_dir: An existing folder; gets ``stain.json`` (the fitted normaliser), ``stain.png`` (before | after, the
            field of 768 px at 1 µm/px with the most tissue) and ``density.png`` (optical densities of sampled pixels,
            red against blue, with the fitted and the target vectors).

    Returns:
        ``recipe``, ``fit``, ``notes``, ``files`` (names) and ``lines`` (pairs of a name and a text for a person).
    """
    slide_mpp = require_mpp(slide.info)
    mpp = Mpp(max(1.0, slide_mpp.y), max(1.0, slide_mpp.x))
    tissue = find_tissue(slide)
    normaliser = fit_normaliser(recipe, slide, tissue, mpp)
    box = _richest_field(tissue, mpp)
    before = slide.read(box, mpp)
    after = normaliser.apply(slide.read(box.grow(normaliser.halo_px), mpp), box)
    gap = np.full((box.height, 8, 3), 255, np.uint8)
    _write(out_dir / "stain.png", np.hstack([before, gap, after]))
    _write(out_dir / "density.png", _scatter(sample_slide(slide, tissue.mask, tissue.mpp).tissue, normaliser))
    (out_dir / "stain.json").write_text(normaliser.to_json() + "\n", encoding="utf-8")
    return {
        "recipe": str(recipe),
        "fit": dict(normaliser.fit),
        "notes": list(normaliser.notes),
        "files": ["stain.png", "density.png", "stain.json"],
        "lines": _lines(normaliser),
    }


def _richest_field(tissue: TissueMask, mpp: Mpp) -> Box:
    """The field with the most tissue; of equal ones the first in reading order. Inside the slide where it fits."""
    ratio = tissue.mpp.y / mpp.y, tissue.mpp.x / mpp.x
    rows, cols = tissue.mask.shape
    height, width = (min(_FIELD_PX, int(n * r)) for n, r in zip((rows, cols), ratio, strict=True))
    side = max(1, round(height / ratio[0])), max(1, round(width / ratio[1]))
    table = np.pad(tissue.mask.cumsum(0, dtype=np.int64).cumsum(1), ((1, 0), (1, 0)))
    amount = table[side[0] :, side[1] :] - table[: -side[0], side[1] :] - table[side[0] :, : -side[1]]
    amount = amount + table[: -side[0], : -side[1]]
    y, x = np.unravel_index(int(np.argmax(amount)), amount.shape)
    return Box(0, 0, max(height, 1), max(width, 1)).shift(int(y * ratio[0]), int(x * ratio[1]))


def _scatter(pixels: np.ndarray, normaliser: Normaliser) -> np.ndarray:
    """Densities in blue over red light, in the pixels' own mean colours; fitted vectors black, target vectors grey."""
    shown = pixels[stained(pixels) | stained(pixels, "hdab")]
    plot = np.full((_PLOT_PX, _PLOT_PX, 3), 255, np.uint8)
    scale = (_PLOT_PX - 40) / _MOST_OD
    at = np.minimum(optical_density(shown), _MOST_OD)
    x, y = (40 + at[:, 0] * scale).astype(int), (_PLOT_PX - 40 - at[:, 2] * scale).astype(int)
    inside = (x < _PLOT_PX) & (y >= 0)
    plot[y[inside], x[inside]] = shown[inside]
    for vectors, colour in (
        (normaliser.fit.get("target", {}).get("vectors", []), (170, 170, 170)),
        (normaliser.fit.get("vectors", []), (0, 0, 0)),
    ):
        for r, _, b in vectors:
            end = (int(40 + 2 * r * scale), int(_PLOT_PX - 40 - 2 * b * scale))
            cv2.line(plot, (40, _PLOT_PX - 40), end, colour, 2, cv2.LINE_AA)
    cv2.line(plot, (40, _PLOT_PX - 40), (_PLOT_PX - 1, _PLOT_PX - 40), (0, 0, 0), 1)
    cv2.line(plot, (40, _PLOT_PX - 40), (40, 0), (0, 0, 0), 1)
    text = {"fontFace": cv2.FONT_HERSHEY_SIMPLEX, "fontScale": 0.45, "color": (0, 0, 0), "lineType": cv2.LINE_AA}
    for tick in (0.5, 1.0, 1.5, 2.0):
        cv2.putText(plot, f"{tick}", (int(32 + tick * scale), _PLOT_PX - 22), **text)  # type: ignore[call-overload]
        cv2.putText(plot, f"{tick}", (6, int(_PLOT_PX - 35 - tick * scale)), **text)  # type: ignore[call-overload]
    cv2.putText(plot, "density in red light", (190, _PLOT_PX - 5), **text)  # type: ignore[call-overload]
    cv2.putText(plot, "blue", (4, 14), **text)  # type: ignore[call-overload]
    return plot


def _lines(normaliser: Normaliser) -> list[tuple[str, str]]:
    fit = normaliser.fit
    lines = [("recipe", str(normaliser.recipe))]
    if "tissue_pixels" in fit:
        lines.append(("sampled", f"{fit['tissue_pixels']:,} tissue pixels, {fit['glass_pixels']:,} of glass"))
    for name, values in (("fitted", fit), ("target", fit.get("target", {}))):
        if "vectors" in values:
            vectors = " and ".join("(" + ", ".join(f"{v:.2f}" for v in row) + ")" for row in values["vectors"])
            strengths = " and ".join(f"{v:.2f}" for v in values["strengths"])
            lines.append((name, f"vectors {vectors}, strengths {strengths}"))
        elif "mean" in values:
            pairs = zip("Lab", values["mean"], values["deviation"], strict=True)
            lines.append((name, ", ".join(f"{c} {m:.0f} ± {d:.0f}" for c, m, d in pairs)))
    if "glass_level" in fit:
        lines.append(("glass", f"from level {fit['glass_level']} of 255"))
    return lines + [("note", note) for note in normaliser.notes]


def _write(path: Path, rgb: np.ndarray) -> None:
    encoded = cv2.imencode(".png", rgb[..., ::-1])[1]
    path.write_bytes(encoded.tobytes())
