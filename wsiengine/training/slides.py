"""Slides with QuPath annotations as labels: tiles are cut by the engine's own reader, on its own grid.

Either every slide has its annotations beside it (``a.svs`` and ``a.geojson``), or a ``slides.csv`` says more: the
columns ``slide`` and ``annotations``, and, where wanted, ``case`` (or ``patient``), ``fold`` (0–4) and ``mpp``. Without
a case every slide is one.

A tile belongs to a class if at least half of it is tissue inside annotations of the class. Neighbours lie at an IoU of
0.3, which is 46 % overlap (Kim et al. 2021); as many tiles again are cut at random places.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from wsiengine.errors import WsiError
from wsiengine.geometry import Box, Lattice, Mpp, Size
from wsiengine.grid import TileGrid
from wsiengine.regions import load_classified, rasterise
from wsiengine.slides import open_slide
from wsiengine.slides.reading import require_mpp
from wsiengine.tissue import find_tissue
from wsiengine.training.data import Field
from wsiengine.training.tables import NO_FOLD, Labels, check_folds, fold_and_mpp, read_table, split_by_case

TABLE = "slides.csv"
CELL_PX = 32
_FINE_PX = 8  # of the raster on which annotations and tissue are compared
_GLASS_LIMIT = 0.5
_TRIES = 40


@dataclass(frozen=True)
class Cutting:
    """How tiles are cut.

    Attributes:
        mpp: µm/px of a tile.
        tile_px: Its side.
        overlap: Linear, of neighbours on the grid; it is rounded to whole cells of 32 px.
        inside: Least part of a tile that is tissue of the class.
        most: Tiles of one class from one slide, at most: half on the grid, evenly spread, half at random places.
        seed: Decides the random places.
    """

    mpp: float = 1.0
    tile_px: int = 224
    overlap: float = 0.46
    inside: float = 0.5
    most: int = 400
    seed: int = 0


@dataclass(frozen=True)
class SlideLabels:
    """One slide with its annotations."""

    slide: Path
    annotations: Path
    case: str
    fold: int = NO_FOLD
    mpp: float | None = None


def has_slides(data: Path) -> bool:
    """Whether a folder holds annotated slides rather than labelled images."""
    return data.is_dir() and ((data / TABLE).is_file() or any(data.glob("*.geojson")))


def find_slides(data: Path) -> list[SlideLabels]:
    """The annotated slides of a folder.

    Raises:
        WsiError: A file is missing, annotations have no slide, or a table is wrong.
    """
    table = data / TABLE
    return _rows_of_table(table) if table.is_file() else list(_pairs(data))


def _pairs(data: Path) -> Iterator[SlideLabels]:
    for annotations in sorted(data.glob("*.geojson")):
        beside = [p for p in sorted(data.iterdir()) if p.stem == annotations.stem and p.suffix != ".geojson"]
        if len(beside) != 1:
            found = ", ".join(p.name for p in beside) or "no file"
            raise WsiError(
                f"{annotations.name} belongs to {found}: needed one slide of that name beside it",
                hint=f"name them alike (a.svs and a.geojson), or write a {TABLE}",
            )
        yield SlideLabels(beside[0], annotations, annotations.stem)


def _rows_of_table(table: Path) -> list[SlideLabels]:
    found = []
    for row in read_table(table, ("slide", "annotations"), "slide"):
        for column in ("slide", "annotations"):
            if not (table.parent / row[column]).is_file():
                raise WsiError(f"{table} names {row[column]}, which is not there", hint="correct the row")
        fold, mpp = fold_and_mpp(row, f"{table}: {row['slide']}")
        case = row.get("case") or Path(row["slide"]).stem
        found.append(SlideLabels(table.parent / row["slide"], table.parent / row["annotations"], case, fold, mpp))
    return found


def cut_slides(slides: Sequence[SlideLabels], labels: Labels, how: Cutting, out: Path) -> list[Field]:
    """Cut the tiles of all slides and write them as images, once; a folder that holds the very same is taken as it is.

    Args:
        slides: What is annotated.
        labels: Which classes are wanted, merged and left out.
        how: Size, place and number of the tiles.
        out: Folder of the images.

    Raises:
        WsiError: A slide or its annotations cannot be used, a class is unknown, or no tile was found.
    """
    wanted = _identity(slides, labels, how)
    list_file = out / "tiles.json"
    rows = json.loads(list_file.read_text(encoding="utf-8")) if list_file.is_file() else {}
    if rows.get("identity") != wanted:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        tiles = [tile for index, slide in enumerate(slides) for tile in _cut_slide(index, slide, labels, how, out)]
        if not tiles:
            raise WsiError(
                "the annotations gave no tile",
                hint=f"tiles of {how.tile_px * how.mpp:g} µm must lie at least {how.inside:.0%} inside an annotation "
                "that has a class: set the classes, draw larger ones, or train with smaller mpp",
            )
        rows = {"identity": wanted, "tiles": tiles}
        list_file.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    fields = [
        Field(
            image=out / tile["file"],
            mask=None,
            source="slides",
            label=tile["class"],
            finding=tile["class"],
            case=tile["case"],
            fold=tile["fold"],
            mpp_yx=(how.mpp, how.mpp),
        )
        for tile in rows["tiles"]
    ]
    check_folds(fields, "the table of slides")
    return split_by_case(fields) if fields[0].fold == NO_FOLD else fields


def _identity(slides: Sequence[SlideLabels], labels: Labels, how: Cutting) -> str:
    """sha256 of all that decides the tiles."""
    parts: list[Any] = [asdict(how), asdict(labels)]
    for row in slides:
        digest = sha256(row.annotations.read_bytes()).hexdigest()
        parts.append([row.slide.name, row.slide.stat().st_size, digest, row.case, row.fold, row.mpp])
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _cut_slide(index: int, row: SlideLabels, labels: Labels, how: Cutting, out: Path) -> Iterator[dict[str, Any]]:
    slide = open_slide(row.slide, mpp=row.mpp)
    try:
        lattice = Lattice(slide.info.size_l0, require_mpp(slide.info), Mpp.square(how.mpp), CELL_PX)
        fine = replace(lattice, cell_px=_FINE_PX)
        size, bounds = slide.info.size_l0, slide.info.bounds_l0
        found = load_classified(row.annotations, size_l0=size, bounds_l0=bounds, name="the annotations")
        tissue = find_tissue(slide).cell_fraction(fine) >= _GLASS_LIMIT
        for label, areas in _by_label(row, found, labels).items():
            cells = np.logical_or.reduce([rasterise(area, fine) for area in areas]) & tissue
            rng = np.random.default_rng([how.seed, index, *label.encode()])
            for box in _places(cells, TileGrid.cover(lattice, how.tile_px, how.overlap), how, rng):
                name = f"{index:03d}-{_plain(label)}-{box.y0}-{box.x0}.png"
                _write(out / name, slide.read(box, lattice.mpp))
                yield {"file": name, "class": label, "case": row.case, "fold": row.fold}
    finally:
        slide.close()


def _by_label(row: SlideLabels, found: Mapping[str | None, Any], labels: Labels) -> dict[str, list[Any]]:
    """Geometries by the class that they train; QuPath itself leaves out classes whose names end with an asterisk."""
    by_label: dict[str, list[Any]] = {}
    for name, area in found.items():
        if name is None or name.endswith("*"):
            continue
        label = labels.label_of(name, f"an annotation of {row.annotations.name}")
        if label is not None:
            by_label.setdefault(label, []).append(area)
    return by_label


def _places(cells: np.ndarray, grid: TileGrid, how: Cutting, rng: np.random.Generator) -> list[Box]:
    """Tiles of one class on one slide: those on the grid, evenly thinned, then as many at random places.

    Args:
        cells: (rows, cols) bool, on a raster of 8 working pixels: tissue of the class.
        grid: The tile grid.
        how: Size and number.
        rng: Where chance comes from.
    """
    sums = np.pad(cells.cumsum(0, dtype=np.int64).cumsum(1), ((1, 0), (1, 0)))
    boxes = (grid.tile_box_px(i, j) for i in range(grid.shape[0]) for j in range(grid.shape[1]))
    found = [box for box in boxes if _covered(sums, box) >= how.inside]
    half = max(1, how.most // 2)
    if len(found) > half:
        found = [found[k] for k in np.linspace(0, len(found) - 1, half).round().astype(int)]
    return found + list(islice(_random_places(cells, sums, how, rng), max(1, len(found))))


def _random_places(cells: np.ndarray, sums: np.ndarray, how: Cutting, rng: np.random.Generator) -> Iterator[Box]:
    """Tiles around random spots of a class."""
    spots = np.argwhere(cells)
    half = how.tile_px // 2 // _FINE_PX
    for _ in range(_TRIES * how.most if len(spots) else 0):
        y, x = (max(0, int(v) - half) * _FINE_PX for v in spots[rng.integers(len(spots))])
        box = Box.of(Size(how.tile_px, how.tile_px), y, x)
        if _covered(sums, box) >= how.inside:
            yield box


def _covered(sums: np.ndarray, box: Box) -> float:
    """Part of a tile that is tissue of the class; beyond the slide there is none."""
    (y0, y1), (x0, x1) = (
        (min(a // _FINE_PX, limit - 1), min(b // _FINE_PX, limit - 1))
        for a, b, limit in ((box.y0, box.y1, sums.shape[0]), (box.x0, box.x1, sums.shape[1]))
    )
    return float(sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]) * _FINE_PX**2 / box.area


def _write(file: Path, pixels: np.ndarray) -> None:
    done, coded = cv2.imencode(".png", pixels[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])
    assert done
    file.write_bytes(coded.tobytes())


def _plain(label: str) -> str:
    """A class's name, fit for a file's."""
    return "".join(c if c.isalnum() else "_" for c in label)[:40]
