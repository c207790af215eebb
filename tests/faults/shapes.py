"""Nasty shapes and random maps for the export: whatever comes, QuPath must take the file."""

import math
import random
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import shapely

from tests.qupath_rules import check
from wsiengine.annotations import AnnotateOptions, Annotation, annotate, tile_annotations
from wsiengine.geometry import Lattice, Mpp, Size
from wsiengine.qupath import write_geojson

NAMES = (
    "Normal",
    "Adenocarcinoma",
    "<script>alert(1)</script>",
    'a "quoted" & name',
    "Ångström µm ½",
    "\u202ereversed",
    "😀",
)
COLOURS = [(0, 158, 115), (213, 94, 0), (255, 255, 255), (0, 0, 0), (1, 2, 3), (86, 180, 233), (9, 9, 9)]
Shape = shapely.Geometry


def _ring(rng: random.Random, points: int, radius: float) -> list[tuple[float, float]]:
    """Random points in a circle, in no order: it crosses itself everywhere."""
    return [(rng.uniform(-radius, radius), rng.uniform(-radius, radius)) for _ in range(points)]


def _star(rng: random.Random, points: int, radius: float) -> list[tuple[float, float]]:
    angles = sorted(rng.uniform(0, 2 * math.pi) for _ in range(points))
    radii = [radius * rng.choice([0.001, 0.3, 1.0]) for _ in angles]
    return [(r * math.cos(a), r * math.sin(a)) for a, r in zip(angles, radii, strict=True)]


def _crossing(rng: random.Random) -> Shape:
    return shapely.Polygon(_ring(rng, rng.randrange(3, 12), rng.choice([0.02, 1, 500])))


def _starry(rng: random.Random) -> Shape:
    return shapely.Polygon(_star(rng, rng.randrange(3, 40), rng.choice([0.05, 3, 4000])))


def _needle(rng: random.Random) -> Shape:
    length, width = rng.uniform(1, 5000), 10 ** rng.uniform(-9, 0)
    turned = shapely.affinity.rotate(shapely.box(0, 0, length, width), rng.uniform(0, 180))
    return turned


def _pixel(rng: random.Random) -> Shape:
    side = rng.choice([0.001, 0.009, 0.1, 0.5, 1])
    return shapely.box(0, 0, side, side)


def _nested(rng: random.Random) -> Shape:
    """Holes in holes, crossing and touching the shell and each other."""
    holes = []
    for _ in range(rng.randrange(1, 5)):
        x, y, side = rng.uniform(-1, 10), rng.uniform(-1, 10), rng.choice([1e-4, 0.05, 1, 4, 10])
        holes.append([(x, y), (x + side, y), (x + side, y + side), (x, y + side)])
    return shapely.Polygon([(0, 0), (10, 0), (10, 10), (0, 10)], holes)


def _bow_tie(rng: random.Random) -> Shape:
    a = rng.uniform(0.001, 300)
    return shapely.Polygon([(0, 0), (a, a), (a, 0), (0, a)])


def _spike(rng: random.Random) -> Shape:
    """A square with an out-and-back line, repeated points and an almost closed neck."""
    far, thin = rng.uniform(11, 1000), 10 ** rng.uniform(-6, -1)
    return shapely.Polygon(
        [(0, 0), (10, 0), (10, 5), (far, 5), (10, 5), (10, 5), (10, 10), (5, 10), (5, thin), (4, 10), (0, 10)]
    )


def _several(rng: random.Random) -> Shape:
    parts = [rng.choice([_bow_tie, _pixel, _nested, _starry])(rng) for _ in range(rng.randrange(1, 4))]
    return shapely.MultiPolygon([p for p in parts if not p.is_empty])


def _degenerate(rng: random.Random) -> Shape:
    return rng.choice(
        [
            shapely.Polygon(),
            shapely.Polygon([(0, 0), (1, 1), (2, 2)]),
            shapely.Polygon([(3, 3), (3, 3), (3, 3)]),
            shapely.Polygon([(0, 0), (math.nan, 1), (1, 1)]),
            shapely.Polygon([(0, 0), (math.inf, 1), (1, 1)]),
            shapely.MultiPolygon(),
            shapely.GeometryCollection([shapely.LineString([(0, 0), (5, 5)]), shapely.box(0, 0, 2, 2)]),
        ]
    )


def _collapsing(rng: random.Random) -> Shape:
    """Steps smaller than the grid that rounding folds onto each other."""
    points = [(k * 0.004, rng.choice([0, 0.004, 0.006, 3])) for k in range(rng.randrange(4, 30))]
    return shapely.Polygon([*points, (0, rng.choice([0.005, -3]))])


KINDS: tuple[Callable[[random.Random], Shape], ...] = (
    _crossing, _starry, _needle, _pixel, _nested, _bow_tie, _spike, _several, _degenerate, _collapsing
)  # fmt: skip


def nasty(seed: int) -> Shape:
    """One shape, somewhere on or beyond a slide."""
    rng = random.Random(seed)
    far = rng.choice([0, 0, 1e3, 2.5e5, 4e6])
    with np.errstate(invalid="ignore"):  # some are made of NaN and infinity on purpose
        shape = rng.choice(KINDS)(rng)
        return shapely.affinity.translate(shape, rng.uniform(-1, 1) * far, rng.uniform(-1, 1) * far)


def annotations_of(shapes: list[Shape], seed: int) -> list[Annotation]:
    """The shapes as objects with odd names and numbers."""
    rng = random.Random(seed)
    names = [rng.choice(NAMES) for _ in shapes]
    odd = (0.0, -0.0, math.nan, math.inf, 1e300, 1e-300, 12345.678901, 2**53)
    return [
        Annotation(
            id=str(uuid.UUID(int=seed * 1_000_000 + i)),
            class_name=names[i],
            colour=COLOURS[NAMES.index(names[i])],
            geometry=shape,
            measurements={"Area mm^2": rng.choice(odd), "<b>": rng.choice(odd)},
            object_type=rng.choice(["annotation", "detection", "tile"]),
            name=rng.choice([None, "</script>", ""]),
            locked=rng.random() < 0.1,
        )
        for i, shape in enumerate(shapes)
    ]


def random_map(seed: int) -> tuple[np.ndarray, Lattice, AnnotateOptions]:
    """Labels of cells that make hard regions, on a lattice with odd proportions."""
    rng = np.random.default_rng(seed)
    rows, cols = (int(n) for n in rng.integers(1, 40, 2))
    kind = seed % 4
    if kind == 0:
        labels = rng.integers(0, 4, (rows, cols))
    elif kind == 1:
        labels = np.add.outer(np.arange(rows), np.arange(cols)) % 2 + 1  # touching at corners only
    elif kind == 2:
        labels = (rng.random((rows, cols)) < 0.59).astype(int)  # near percolation: nested holes
    else:
        labels = np.minimum.reduce(np.meshgrid(np.arange(rows) % 4, np.arange(cols) % 5, indexing="ij"))
    cell_px = int(rng.choice([1, 16, 32]))
    mpp = Mpp(*(float(m) for m in rng.uniform(0.2, 1.5, 2)))
    slide_mpp = Mpp(mpp.y / float(rng.uniform(0.7, 4)), mpp.x / float(rng.uniform(0.7, 4)))
    size = Size(
        max(1, round((rows - rng.random() * 0.9) * cell_px * mpp.y / slide_mpp.y)),
        max(1, round((cols - rng.random() * 0.9) * cell_px * mpp.x / slide_mpp.x)),
    )
    lattice = Lattice(size, slide_mpp, mpp, cell_px)
    labels = np.resize(labels, lattice.extent_cells.shape).astype(np.uint8)
    clip = shapely.Point(size.width / 2, size.height / 2).buffer(size.width / 3) if seed % 3 == 0 else None
    tolerance = [None, 0.0, 30.0][seed % 3]
    return (
        labels,
        lattice,
        AnnotateOptions("slide", f"run {seed}", tolerance, clip_l0=clip, channel_names=("A", "B", "C")),
    )


def export_shapes(seeds: range, folder: Path) -> tuple[int, list[str]]:
    """Nasty shapes through the writer → (shapes put in, what the rules of QuPath object to)."""
    path = folder / "shapes.geojson"
    offset = (0, 0) if seeds.start % 2 else (1234, 56789)
    files = write_geojson(annotations_of([nasty(seed) for seed in seeds], seeds.start), path, offset_l0=offset)
    return len(seeds), [problem for file in files for problem in check(file)]


def export_map(seed: int, folder: Path) -> tuple[int, list[str]]:
    """A random map through regions and tiles to the file → (regions, what the rules of QuPath object to)."""
    labels, lattice, options = random_map(seed)
    probability = np.random.default_rng(seed).integers(0, 256, (*labels.shape, 3)).astype(np.uint8)
    classes = list(zip(NAMES[:3], COLOURS[:3], strict=True))
    regions = annotate(labels, probability, lattice, classes, options)
    boxes = np.array([[0.0, 0.0, 64.0, 64.0], [-32.5, 1e6, 31.5, 1e6 + 64]])
    tiles = tile_annotations(
        boxes, list(NAMES[:2]), COLOURS[:2], {"A": np.array([0.5, math.nan])}, lattice, ("slide", options.identity)
    )
    files = write_geojson([*regions, *tiles], folder / "map.geojson.gz")
    return len(regions), [problem for file in files for problem in check(file)]
