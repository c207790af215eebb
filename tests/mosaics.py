"""Slides of any size made of real labelled fields, whose true classes are known everywhere; and position-coded slides.

A mosaic is a grid of zones, each of one class, touching left and right, with glass between rows and all round. A zone
is filled with fields of its class, each laid down with its mirror images (2 × 2): hard edges are as few as can be.
"""

import csv
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from tests.fakes import position_pixels
from wsiengine.geometry import Box, Mpp, Size
from wsiengine.slides.pyramid import PyramidLayout, write_pyramid

CLASSES = ("glass", "normal", "adenoma", "adenocarcinoma")
GLASS_COLOUR = 244  # real glass is not 255
_CLASS_OF = {
    "Normal": "normal",
    "healthy": "normal",
    "Low-grade IN": "adenoma",
    "High-grade IN": "adenoma",
    "Serrated adenoma": "adenoma",
    "adenomatous": "adenoma",
    "Adenocarcinoma": "adenocarcinoma",
    "moderately differentiated": "adenocarcinoma",
    "moderately-to-poorly differentiated": "adenocarcinoma",
    "poorly differentiated": "adenocarcinoma",
}
_FRAME_PX = 2  # cut off: many EBHI crops have a dark frame
# EBHI's crops are 4:3 fields squashed to a square. LC25000 states nothing: 1.0 is a guess, good for looking only.
_SOURCE_MPP = {"ebhi": Mpp(y=0.99, x=1.29), "glas": Mpp.square(0.62), "lc25000": Mpp.square(1.0)}


@dataclass(frozen=True)
class Zone:
    """A rectangle of one class."""

    box_l0: Box
    label: str


@dataclass(frozen=True)
class Truth:
    """What is where: zones in level-0 pixels; glass everywhere else."""

    size_l0: Size
    mpp: float
    zones: tuple[Zone, ...]

    def raster(self, mpp: float) -> np.ndarray:
        """(rows, cols) uint8, indices into :data:`CLASSES`, at ``mpp``; a pixel has its centre's class."""
        step = mpp / self.mpp
        labels = np.zeros((int(np.ceil(self.size_l0.height / step)), int(np.ceil(self.size_l0.width / step))), np.uint8)
        for zone in self.zones:
            y0, x0, y1, x1 = (
                int(np.ceil(edge / step - 0.5))
                for edge in (zone.box_l0.y0, zone.box_l0.x0, zone.box_l0.y1, zone.box_l0.x1)
            )
            labels[y0:y1, x0:x1] = CLASSES.index(zone.label)
        return labels

    def save(self, path: Path) -> None:
        """As npz: size_l0 (h, w), mpp, boxes_l0 (n, 4: y0, x0, y1, x1), labels (n,), classes."""
        boxes = [(z.box_l0.y0, z.box_l0.x0, z.box_l0.y1, z.box_l0.x1) for z in self.zones]
        np.savez(
            path,
            size_l0=self.size_l0.shape,
            mpp=self.mpp,
            boxes_l0=np.array(boxes, np.int64).reshape(-1, 4),
            labels=np.array([CLASSES.index(z.label) for z in self.zones], np.uint8),
            classes=np.array(CLASSES),
        )

    @classmethod
    def load(cls, path: Path) -> "Truth":
        with np.load(path) as stored:
            zones = tuple(
                Zone(Box(*map(int, box)), CLASSES[label])
                for box, label in zip(stored["boxes_l0"], stored["labels"], strict=True)
            )
            return cls(Size(*map(int, stored["size_l0"])), float(stored["mpp"]), zones)


@dataclass(frozen=True)
class MosaicPlan:
    """What a mosaic is made of.

    Args:
        source: "ebhi", "glas" or "lc25000" (which has no adenoma).
        mpp: µm per level-0 pixel of the mosaic.
        fold: Whose fields are used; 0 is the one that no shipped model has seen.
        zone_um: Least side of a zone: eight tiles of 224 px at 1 µm/px.
        margin_um: Glass round the zones and between their rows.
        seed: Decides which field lies where.
    """

    source: str = "ebhi"
    mpp: float = 0.5
    fold: int = 0
    zone_um: float = 8 * 224.0
    margin_um: float = 300.0
    seed: int = 0


def mosaic_size(plan: MosaicPlan, zone_rows: int, zone_cols: int) -> Size:
    """The smallest slide that holds so many zones."""
    height = zone_rows * (plan.zone_um + plan.margin_um) + plan.margin_um
    width = zone_cols * plan.zone_um + 2 * plan.margin_um
    return Size(int(np.ceil(height / plan.mpp)), int(np.ceil(width / plan.mpp)))


def mosaic_slide(path: Path, size: Size, plan: MosaicPlan, data: Path, layout: PyramidLayout | None = None) -> Truth:
    """Write a mosaic of ``size`` (level-0 px) and return its truth; ``data`` is the folder of the shared data."""
    fields = _Fields(data / "crc" / plan.source, plan)
    truth = Truth(size, plan.mpp, tuple(_zones(size, plan, fields.labels)))
    painter = _Painter(truth, plan, fields)
    write_pyramid(path, painter.rows, size, plan.mpp, layout or PyramidLayout())
    return truth


def _zones(size: Size, plan: MosaicPlan, labels: tuple[str, ...]) -> Iterator[Zone]:
    """As many zones as fit, stretched to fill the slide; neighbours left and right differ in class."""
    margin = round(plan.margin_um / plan.mpp)
    side = plan.zone_um / plan.mpp
    rows = int((size.height - margin) // (side + margin))
    cols = int((size.width - 2 * margin) // side)
    if rows < 1 or cols < 1:
        raise ValueError(f"{size} px at {plan.mpp} µm/px hold no zone of {plan.zone_um:g} µm")
    tops = np.linspace(margin, size.height, rows + 1).astype(int)
    lefts = np.linspace(margin, size.width - margin, cols + 1).astype(int)
    for row in range(rows):
        for col in range(cols):
            box = Box(int(tops[row]), int(lefts[col]), int(tops[row + 1]) - margin, int(lefts[col + 1]))
            yield Zone(box, labels[(col + row) % len(labels)])


class _Fields:
    """The labelled fields of one source and fold, at the mosaic's µm/px."""

    def __init__(self, folder: Path, plan: MosaicPlan) -> None:
        self._folder, self._mpp = folder, plan.mpp
        self._source_mpp = _SOURCE_MPP[plan.source]
        self._files: dict[str, list[str]] = {}
        with (folder / "labels.csv").open(newline="") as rows:
            for row in csv.DictReader(rows):
                label = _CLASS_OF.get((row.get("class") or row.get("grade") or "").strip())
                if label and int(row["fold"]) == plan.fold:
                    self._files.setdefault(label, []).append(row["file"])
        shuffle = np.random.default_rng(plan.seed)
        for label in sorted(self._files):
            shuffle.shuffle(self._files[label])
        self.labels = tuple(label for label in CLASSES if label in self._files)
        self.pixels = functools.lru_cache(maxsize=128)(self._pixels)

    def name(self, label: str, index: int) -> str:
        files = self._files[label]
        return files[index % len(files)]

    def _pixels(self, name: str) -> np.ndarray:
        """(h, w, 3) uint8 RGB at the mosaic's µm/px, square pixels."""
        crop = self._crop(name)
        size = self._scaled(crop)
        interpolation = cv2.INTER_AREA if size.area < crop.shape[0] * crop.shape[1] else cv2.INTER_CUBIC
        return cv2.resize(crop, (size.width, size.height), interpolation=interpolation)

    def _crop(self, name: str) -> np.ndarray:
        crop = cv2.imread(str(self._folder / name), cv2.IMREAD_COLOR)[_FRAME_PX:-_FRAME_PX, _FRAME_PX:-_FRAME_PX]
        return cv2.cvtColor(crop, cv2.COLOR_BGR2RGB)

    def _scaled(self, crop: np.ndarray) -> Size:
        return Size(
            round(crop.shape[0] * self._source_mpp.y / self._mpp), round(crop.shape[1] * self._source_mpp.x / self._mpp)
        )

    @functools.cached_property
    def pitch(self) -> Size:
        """Of the grid on which fields are laid: the smallest field, so that none falls short."""
        sizes = [self._scaled(self._crop(name)) for names in self._files.values() for name in names]
        return Size(min(size.height for size in sizes), min(size.width for size in sizes))


class _Painter:
    """Paints rows of a mosaic."""

    def __init__(self, truth: Truth, plan: MosaicPlan, fields: _Fields) -> None:
        self._truth, self._fields = truth, fields
        self._firsts = np.random.default_rng(plan.seed).integers(0, 1 << 16, len(truth.zones))

    def rows(self, y0: int, y1: int) -> np.ndarray:
        band = Box(y0, 0, y1, self._truth.size_l0.width)
        canvas = np.full((*band.shape, 3), GLASS_COLOUR, np.uint8)
        for zone, first in zip(self._truth.zones, self._firsts, strict=True):
            if zone.box_l0.intersect(band):
                self._paint(canvas, band, zone, int(first))
        return canvas

    def _paint(self, canvas: np.ndarray, band: Box, zone: Zone, first: int) -> None:
        pitch = self._fields.pitch
        across = -(-zone.box_l0.width // pitch.width)
        for index, cell in enumerate(zone.box_l0.pieces(pitch.height, pitch.width)):
            part = cell.intersect(band)
            if not part:
                continue
            row, col = divmod(index, across)
            # two rows and two columns share a field, mirrored at their common edges
            name = self._fields.name(zone.label, first + row // 2 * ((across + 1) // 2) + col // 2)
            field = self._fields.pixels(name)[: pitch.height, : pitch.width]
            field = field[:: -1 if row % 2 else 1, :: -1 if col % 2 else 1]
            canvas[part.relative_to(band).slices] = field[part.relative_to(cell).slices]


def position_slide(path: Path, size: Size, mpp: float | Mpp = 0.5, layout: PyramidLayout | None = None) -> np.ndarray:
    """Write a slide whose pixels tell their place (:func:`tests.fakes.position_pixels`) → level 0, (h, w, 3) uint8.

    Lossless unless ``layout`` says otherwise.
    """
    pixels = position_pixels(size.height, size.width)
    svs = not isinstance(mpp, Mpp) or mpp.y == mpp.x
    write_pyramid(path, pixels, size, mpp, layout or PyramidLayout(compression="deflate", downsamples=(1, 4), svs=svs))
    return pixels
