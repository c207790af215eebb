"""The overlay picture: the whole slide, the outline of every region, a legend and a scale bar."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from wsiengine.errors import OutputError
from wsiengine.geometry import Mpp, Size
from wsiengine.object_outputs import ObjectAnnotations
from wsiengine.object_overlay import draw_objects
from wsiengine.qupath import Annotation, replacing
from wsiengine.slides.base import Slide
from wsiengine.tissue import read_whole, require_mpp
from wsiengine.wording import area_words

Colour = tuple[int, int, int]

NOTICE = "Research use only. Not for diagnosis."
INK, MUTED, PAPER = (34, 34, 34), (110, 110, 110), (255, 255, 255)
LEAST_SIDE_PX = 640  # a smaller slide is enlarged, so that its legend can be read
_SHIFT = 4  # polygons are drawn to 1/16 px
_FILL = 0.28  # how much of the class colour lies over the tissue


@dataclass(frozen=True, slots=True)
class Style:
    """Sizes in pixels of the picture, from its width."""

    text: int
    margin: int
    line: int

    @classmethod
    def of(cls, width: int) -> "Style":
        text = int(np.clip(round(width / 70), 14, 28))
        return cls(text, text, max(2, round(width / 800)))


@dataclass(frozen=True, slots=True)
class LegendEntry:
    """One class that occurs: its area and number of regions, or of objects (``counted``)."""

    name: str
    colour: Colour
    area_mm2: float
    regions: int
    counted: bool = False

    def __str__(self) -> str:
        if self.counted:
            return f"{self.name}   {self.regions:,}"
        return f"{self.name}   {area_words(self.area_mm2)}"


def thumbnail(slide: Slide, max_side_px: int = 2048, *, over: Callable[[], bool] = lambda: False) -> np.ndarray:
    """The whole slide, its longer side at most ``max_side_px`` → (rows, cols, 3) uint8 RGB.

    Read in pieces from the coarsest level that is fine enough, averaged by area; never enlarged; given up once
    ``over`` says so.

    Raises:
        ResolutionError: The slide states no µm/px.
    """
    mpp = require_mpp(slide.info)
    shrink = max(1.0, max(slide.info.size_l0.shape) / max_side_px)
    return read_whole(slide, Mpp(mpp.y * shrink, mpp.x * shrink), over=over)


def draw_overlay(
    slide: Slide,
    annotations: Sequence[Annotation],
    path: Path,
    *,
    title: str = "",
    picture: np.ndarray | None = None,
    max_side_px: int = 2048,
    calibrated: bool = True,
) -> None:
    """Write a PNG: the slide with its regions or objects, title, legend, scale bar and notice.

    Equal input gives equal bytes; the file holds no metadata.

    Args:
        slide: What lies under the regions.
        annotations: Regions in level-0 pixels. The legend lists the classes that occur, in this order.
        path: Where to write.
        title: A line above the picture.
        picture: The slide's thumbnail (rows, cols, 3) uint8, if it is at hand already.
        max_side_px: Longer side of the picture of the slide.
        calibrated: Whether µm/px are known; else lengths are pixels.

    Raises:
        OutputError: The file cannot be written.
    """
    base = thumbnail(slide, max_side_px) if picture is None else picture
    enlarge = max(1, LEAST_SIDE_PX // max(base.shape[:2]))
    canvas = cv2.resize(base, None, fx=enlarge, fy=enlarge, interpolation=cv2.INTER_NEAREST)
    style = Style.of(canvas.shape[1])
    mpp = require_mpp(slide.info)
    if isinstance(annotations, ObjectAnnotations):
        draw_objects(canvas, annotations, slide.info.size_l0, style.line)
        entries = [LegendEntry(name, colour, 0.0, count, counted=True) for name, colour, count in annotations.counts()]
    else:
        draw_regions(canvas, annotations, slide.info.size_l0, style.line)
        entries = legend(annotations, mpp)
    page = compose(canvas, title, entries, style)
    draw_scale_bar(page, mpp.x * slide.info.size_l0.width / canvas.shape[1], style, calibrated=calibrated)
    data = cv2.imencode(".png", page[..., ::-1])[1].tobytes()
    try:
        with replacing(Path(path)) as file:
            file.write(data)
    except OSError as error:
        raise OutputError(
            f"Could not write {Path(path).name}: {error.strerror or error}.",
            hint="check that the folder is writable and the disk has room.",
        ) from error


def legend(annotations: Iterable[Annotation], mpp: Mpp) -> list[LegendEntry]:
    """The classes that occur, in order of appearance, with area and number of regions."""
    found: dict[str, LegendEntry] = {}
    for annotation in annotations:
        name = annotation.class_name or "Unclassified"
        area_mm2 = annotation.geometry.area * mpp.pixel_um2 / 1e6
        known = found.get(name, LegendEntry(name, annotation.colour, 0.0, 0))
        found[name] = LegendEntry(name, known.colour, known.area_mm2 + area_mm2, known.regions + 1)
    return list(found.values())


def draw_regions(canvas: np.ndarray, annotations: Sequence[Annotation], size_l0: Size, line_px: int) -> None:
    """Tint and outline regions on ``canvas``, a picture of the whole slide, in place.

    Outlines lie inside their region, so that of two neighbours both are seen.
    """
    scale = np.array([canvas.shape[1] / size_l0.width, canvas.shape[0] / size_l0.height]) * 2**_SHIFT
    kinds: dict[tuple[str | None, Colour], list[list[np.ndarray]]] = {}
    for annotation in annotations:
        kinds.setdefault((annotation.class_name, annotation.colour), []).append(_rings(annotation.geometry, scale))
    for (_, colour), regions in kinds.items():
        inside = np.zeros(canvas.shape[:2], np.uint8)
        for rings in regions:
            cv2.fillPoly(inside, rings, 255, cv2.LINE_AA, _SHIFT)
        drawn = cv2.LUT(canvas, _tint(colour))
        for rings in regions:
            cv2.polylines(drawn, rings, True, colour, 2 * line_px, cv2.LINE_AA, _SHIFT)
        x, y, width, height = cv2.boundingRect(inside)  # most regions are far smaller than the slide
        part = slice(y, y + height), slice(x, x + width)
        _lay_over(canvas[part], drawn[part], inside[part])


def _tint(colour: Colour) -> np.ndarray:
    """What each value of each channel becomes under a colour: (1, 256, 3) uint8."""
    values = np.arange(256)[:, None] * (1 - _FILL) + np.array(colour) * _FILL
    return np.rint(values).astype(np.uint8)[None]


def _lay_over(canvas: np.ndarray, drawn: np.ndarray, opacity: np.ndarray) -> None:
    """Blend ``drawn`` into ``canvas`` by ``opacity`` (rows, cols) 0–255, in place."""
    cv2.copyTo(drawn, (opacity == 255).view(np.uint8), canvas)
    rows, cols = np.nonzero((opacity > 0) & (opacity < 255))  # the edges alone need arithmetic
    share = opacity[rows, cols, None].astype(np.uint16)
    canvas[rows, cols] = (canvas[rows, cols] * (255 - share) + drawn[rows, cols] * share + 127) // 255


def _rings(geometry: object, scale: np.ndarray) -> list[np.ndarray]:
    """All rings of a polygon in fixed-point pixels; half a pixel off, as OpenCV counts from pixel centres."""
    parts = getattr(geometry, "geoms", [geometry])
    rings = [ring for part in parts for ring in (part.exterior, *part.interiors)]
    return [np.rint(np.asarray(ring.coords)[:-1] * scale - 2 ** (_SHIFT - 1)).astype(np.int32) for ring in rings]


def scale_bar_um(um_per_px: float, width_px: int) -> float:
    """The longest of 1, 2, 5 × 10ⁿ µm that takes at most a fifth of the width.

    >>> scale_bar_um(10.0, 2000), scale_bar_um(0.5, 700)
    (2000.0, 50.0)
    """
    most = um_per_px * width_px / 5
    power = 10.0 ** np.floor(np.log10(most))
    return float(max(step * power for step in (1, 2, 5) if step * power <= most * (1 + 1e-9)))


def draw_scale_bar(page: np.ndarray, um_per_px: float, style: Style, *, calibrated: bool = True) -> None:
    """A bar with its length at the bottom right of the page, in place: there it hides no tissue.

    Where nobody knows the µm/px (``calibrated``), lengths are pixels of the slide.
    """
    width = page.shape[1] - 2 * style.margin
    length_um = scale_bar_um(um_per_px, width)
    label = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"
    label = label if calibrated else f"{length_um:g} px"
    bar = round(length_um / um_per_px)
    x1, y1 = style.margin + width, page.shape[0] - style.margin
    page[y1 - style.text // 3 : y1, x1 - bar : x1] = INK
    _write(page, label, (y1, x1 - bar - style.text // 2 - _text_width(label, style.text)), style.text, INK)


def compose(canvas: np.ndarray, title: str, entries: Sequence[LegendEntry], style: Style) -> np.ndarray:
    """The page: title, picture, legend in as many rows as it needs, notice; the last line has room for a scale bar."""
    width = max(canvas.shape[1], LEAST_SIDE_PX)
    columns = _legend_columns(entries, width, style)
    rows = -(-len(entries) // columns)
    line = round(style.text * 1.8)
    top = style.margin + (line if title else 0)
    height = top + canvas.shape[0] + line * (rows + 1) + style.margin
    page = np.full((height, width + 2 * style.margin, 3), PAPER, np.uint8)
    if title:
        size = min(round(style.text * 1.2), width * style.text // max(1, _text_width(title, style.text)))
        _write(page, title, (style.margin + style.text, style.margin), max(9, size), INK, weight=600)
    page[top : top + canvas.shape[0], style.margin : style.margin + canvas.shape[1]] = canvas
    cv2.rectangle(page, (style.margin - 1, top - 1), (style.margin + canvas.shape[1], top + canvas.shape[0]), MUTED, 1)
    first = top + canvas.shape[0] + line
    for k, entry in enumerate(entries):
        row, column = divmod(k, columns)
        _draw_entry(page, entry, (first + row * line, style.margin + column * width // columns), style)
    _write(page, NOTICE, (first + rows * line, style.margin), round(style.text * 0.85), MUTED)
    return page


def _legend_columns(entries: Sequence[LegendEntry], width: int, style: Style) -> int:
    """How many columns of equal width the legend has room for."""
    widest = max((_text_width(str(entry), style.text) for entry in entries), default=0) + 3 * style.text
    return max(1, min(width // widest, len(entries)))


def _draw_entry(page: np.ndarray, entry: LegendEntry, at: tuple[int, int], style: Style) -> None:
    y, x = at
    side = style.text
    cv2.rectangle(page, (x, y - side + 2), (x + side, y + 2), entry.colour, cv2.FILLED)
    cv2.rectangle(page, (x, y - side + 2), (x + side, y + 2), INK, 1)
    _write(page, str(entry), (y, x + side + side // 2), style.text, INK)


def _write(page: np.ndarray, text: str, at: tuple[int, int], size: int, colour: Colour, *, weight: int = 400) -> None:
    """One line of text, its baseline beginning at (y, x)."""
    cv2.putText(page, text, (at[1], at[0]), colour, cv2.FontFace("uni"), size, weight)


def _text_width(text: str, size: int) -> int:
    _, _, width, _ = cv2.getTextSize((0, 0), text, (0, 0), cv2.FontFace("uni"), size, 400)
    return int(width)
