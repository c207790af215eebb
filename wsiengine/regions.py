"""Regions drawn by a person: GeoJSON → one geometry in level-0 pixels → which points and cells lie inside.

Boundary rule, everywhere the same: a point exactly on the boundary of a region is outside.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import geojson
import numpy as np
import shapely

from wsiengine.errors import RegionError
from wsiengine.geometry import Box, Lattice, Size
from wsiengine.scratch import IN_MEMORY, Scratch

_STRIP_POINTS = 1 << 20
_FARTHEST = 1e9  # geometry on larger numbers loses precision
_HINT = "draw it in QuPath and use File › Export objects as GeoJSON."


def load_region(
    path: str | os.PathLike[str], *, size_l0: Size, bounds_l0: Box | None = None, name: str = "--region"
) -> Any:
    """The union of all polygons of a GeoJSON file, clipped to the slide.

    Takes what QuPath exports (a FeatureCollection), a single Feature, a list of Features, or a bare geometry; plain or
    gzipped, told by content. Points and lines are left out; rings that cross themselves are repaired.

    Args:
        path: The file.
        size_l0: Size of the slide at level 0.
        bounds_l0: The slide's bounds, where it states them: QuPath counts from their corner.
        name: What the file was given as, for messages.

    Returns:
        A shapely Polygon or MultiPolygon in level-0 pixels of the slide, x right, y down.

    Raises:
        RegionError: The file cannot be read, is no GeoJSON, or holds no polygon that overlaps the slide.
    """
    found = list(_geometries(_parse(Path(path), name), name))
    polygons = _polygons(found, name)
    if not polygons:
        kinds = ", ".join(sorted({_kind(item) for item in found})) or "nothing"
        raise RegionError(
            f"{name} {path} holds no polygon with an area (only: {kinds}).",
            hint=f"draw a closed shape: {_HINT}",
        )
    region = shapely.union_all(polygons)
    if bounds_l0 is not None:
        region = shapely.transform(region, lambda xy: xy + np.array([bounds_l0.x0, bounds_l0.y0]))
    slide = shapely.box(0, 0, size_l0.width, size_l0.height)
    inside = _areas(shapely.intersection(region, slide))
    if not inside:
        left, top, right, bottom = (f"{value:,.0f}" for value in region.bounds)
        raise RegionError(
            f"{name} {path} lies outside the slide: it spans x {left} to {right}, y {top} to {bottom}, "
            f"the slide is {size_l0} px.",
            hint="coordinates must be full-resolution pixels of this slide, as QuPath exports them.",
        )
    return shapely.union_all(inside)


def load_classified(
    path: str | os.PathLike[str], *, size_l0: Size, bounds_l0: Box | None = None, name: str = "annotations"
) -> dict[str | None, Any]:
    """The annotations of a QuPath GeoJSON file by their class, each class's joined and clipped to the slide.

    Args:
        path: The file.
        size_l0: Size of the slide at level 0.
        bounds_l0: The slide's bounds, where it states them: QuPath counts from their corner.
        name: What the file was given as, for messages.

    Returns:
        Class name → shapely geometry in level-0 pixels; None stands for annotations without a class. Points and lines
        are left out.

    Raises:
        RegionError: The file cannot be read, is no GeoJSON, holds no polygon, or one that lies outside the slide.
    """
    slide = shapely.box(0, 0, size_l0.width, size_l0.height)
    by_class: dict[str | None, list[Any]] = {}
    for feature in _features(_parse(Path(path), name), name):
        for polygon in _polygons(_geometries(feature, name), name):
            if bounds_l0 is not None:
                polygon = shapely.transform(polygon, lambda xy: xy + np.array([bounds_l0.x0, bounds_l0.y0]))
            inside = _areas(shapely.intersection(polygon, slide))
            if not inside:
                left, top, right, bottom = (f"{value:,.0f}" for value in polygon.bounds)
                raise RegionError(
                    f"{name} {path}: an annotation ({_class_of(feature) or 'no class'}) lies outside the slide: it "
                    f"spans x {left} to {right}, y {top} to {bottom}, the slide is {size_l0} px.",
                    hint="is it of another slide? Coordinates must be full-resolution pixels, as QuPath exports them.",
                )
            by_class.setdefault(_class_of(feature), []).extend(inside)
    if not by_class:
        raise RegionError(f"{name} {path} holds no polygon with an area.", hint=f"draw a closed shape: {_HINT}")
    return {label: shapely.union_all(found) for label, found in by_class.items()}


def load_areas(
    path: str | os.PathLike[str], *, size_l0: Size, bounds_l0: Box | None = None, name: str = "--region"
) -> list[tuple[str, Any]]:
    """The drawn areas one by one, each with its name: what a count per area is made of.

    An area is called by its name in QuPath, else by its class, else ``Area 1`` and so on.

    Args:
        path, size_l0, bounds_l0, name: As for :func:`load_region`.

    Returns:
        (name, shapely geometry in level-0 pixels) of every feature that overlaps the slide.

    Raises:
        RegionError: As :func:`load_region`.
    """
    shift = np.array([bounds_l0.x0, bounds_l0.y0] if bounds_l0 is not None else [0, 0])
    slide = shapely.box(0, 0, size_l0.width, size_l0.height)
    areas = []
    for number, (label, item) in enumerate(_named(_parse(Path(path), name)), start=1):
        union = shapely.union_all(_polygons(_geometries(item, name), name))
        inside = _areas(shapely.intersection(shapely.transform(union, lambda xy: xy + shift), slide))
        if inside:
            areas.append((label or f"Area {number}", shapely.union_all(inside)))
    return areas


def _named(item: Any) -> Iterator[tuple[str, Any]]:
    """(name, feature or geometry) of all that a file holds."""
    if isinstance(item, list):
        for part in item:
            yield from _named(part)
    elif _kind(item) == "FeatureCollection":
        yield from _named(item.get("features") or [])
    else:
        properties = item.get("properties") if isinstance(item, dict) else None
        facts = properties if isinstance(properties, dict) else {}
        kind = facts.get("classification")
        label = facts.get("name") or (kind.get("name") if isinstance(kind, dict) else None)
        yield str(label) if label else "", item


def points_inside(geometry: Any, y_l0: np.ndarray, x_l0: np.ndarray) -> np.ndarray:
    """Whether points lie inside ``geometry``; a point on its boundary does not.

    Args:
        geometry: shapely geometry in level-0 pixels.
        y_l0, x_l0: Coordinates, broadcast against each other.

    Returns:
        bool array of the broadcast shape.
    """
    shapely.prepare(geometry)
    return shapely.contains_xy(geometry, *np.broadcast_arrays(x_l0, y_l0))


def rasterise(geometry: Any, lattice: Lattice, scratch: Scratch = IN_MEMORY) -> np.ndarray:
    """The cells of ``lattice`` whose centre lies inside ``geometry``: bool, ``lattice.extent_cells``, from ``scratch``.

    A cell that overhangs the slide is judged by the centre of its part inside the slide.
    """
    rows, cols = lattice.extent_cells.shape
    y_l0 = _centres(rows, lattice.l0_per_cell[0], lattice.slide_l0.height)
    x_l0 = _centres(cols, lattice.l0_per_cell[1], lattice.slide_l0.width)
    out = scratch.zeros((rows, cols), bool)
    if geometry.is_empty or not out.size:
        return out
    left, top, right, bottom = geometry.bounds
    row0, row1 = np.searchsorted(y_l0, [top, bottom])
    col0, col1 = np.searchsorted(x_l0, [left, right])
    strip = max(1, _STRIP_POINTS // max(1, int(col1 - col0)))
    for start in range(int(row0), int(row1), strip):
        stop = min(start + strip, int(row1))
        out[start:stop, col0:col1] = points_inside(geometry, y_l0[start:stop, None], x_l0[None, col0:col1])
    return out


def _centres(count: int, step: float, limit: int) -> np.ndarray:
    edges = np.minimum(np.arange(count + 1) * step, limit)
    return (edges[1:] + edges[:-1]) / 2


# --- reading GeoJSON -----------------------------------------------------------------------------


def _parse(path: Path, name: str) -> Any:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RegionError(
            f"{name} {path} cannot be read: {error.strerror or error}.", hint="check the path."
        ) from error
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        return geojson.loads(data.decode("utf-8-sig"))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RegionError(f"{name} {path} is a damaged gzip file: {error}.", hint="export it again.") from error
    except json.JSONDecodeError as error:
        raise RegionError(f"{name} {path} is not GeoJSON: line {error.lineno}, {error.msg}.", hint=_HINT) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise RegionError(f"{name} {path} is not GeoJSON: it is not text in UTF-8.", hint=_HINT) from error
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        # what the geojson package raises on JSON whose values are of the wrong kind
        raise RegionError(f"{name} {path} is JSON, but not GeoJSON.", hint=_HINT) from error


def _geometries(item: Any, name: str) -> Iterator[dict]:
    """The bare geometries in anything that GeoJSON or QuPath may write, depth first."""
    if isinstance(item, list):
        for part in item:
            yield from _geometries(part, name)
        return
    kind = _kind(item)
    if kind == "FeatureCollection":
        yield from _geometries(item.get("features") or [], name)
    elif kind == "Feature":
        if item.get("geometry") is not None:
            yield from _geometries(item["geometry"], name)
    elif kind == "GeometryCollection":
        yield from _geometries(item.get("geometries") or [], name)
    elif isinstance(item, dict) and "coordinates" in item:
        yield item
    else:
        raise RegionError(
            f"{name} is JSON, but not GeoJSON: an object of type {kind!r} where a feature or geometry was expected.",
            hint=_HINT,
        )


def _features(item: Any, name: str) -> Iterator[Any]:
    """The features of a collection or list, or the one thing that was given."""
    if isinstance(item, list):
        for part in item:
            yield from _features(part, name)
    elif _kind(item) == "FeatureCollection":
        yield from _features(item.get("features") or [], name)
    else:
        yield item


def _class_of(feature: Any) -> str | None:
    """The name of a feature's class in QuPath; the parts of a derived class are joined as QuPath shows them."""
    found = ((feature.get("properties") or {}) if isinstance(feature, dict) else {}).get("classification")
    if isinstance(found, str):
        return found or None
    if not isinstance(found, dict):
        return None
    names = found.get("names")
    if isinstance(names, list) and names:
        return ": ".join(map(str, names))
    return str(found["name"]) if found.get("name") else None


def _kind(item: Any) -> str:
    return str(item.get("type", "nothing")) if isinstance(item, dict) else type(item).__name__


def _polygons(geometries: Iterable[dict], name: str) -> list[Any]:
    polygons: list[Any] = []
    for item in geometries:
        rings_of = {"Polygon": [item["coordinates"]], "MultiPolygon": item["coordinates"]}.get(_kind(item), [])
        for rings in rings_of:
            polygons += _areas(_polygon(rings, name))
    return polygons


def _polygon(rings: Any, name: str) -> Any:
    """One polygon from GeoJSON rings: the first is the shell, the others holes; a hole is cut out, whatever its way."""
    try:
        outlines = [[(float(position[0]), float(position[1])) for position in ring] for ring in rings]
    except (TypeError, ValueError, LookupError, OverflowError) as error:
        raise RegionError(f"{name} has a polygon whose coordinates are not pairs of numbers.", hint=_HINT) from error
    if not all(abs(value) <= _FARTHEST for ring in outlines for position in ring for value in position):  # nor NaN
        raise RegionError(f"{name} has a polygon with a coordinate that is no pixel of any slide.", hint=_HINT)
    if not outlines or not _spans(outlines[0]):
        return shapely.Polygon()
    shell, *holes = (shapely.make_valid(shapely.Polygon(ring)) for ring in outlines if _spans(ring))
    return shapely.difference(shell, shapely.union_all(holes)) if holes else shell


def _spans(ring: list[tuple[float, float]]) -> bool:
    return len(set(ring)) >= 3


def _areas(geometry: Any) -> list[Any]:
    """The polygon parts of any geometry that have an area."""
    out: list[Any] = []
    for part in shapely.get_parts(geometry):
        if part.geom_type == "Polygon":
            out += [part] if part.area > 0 else []
        elif part.geom_type in ("MultiPolygon", "GeometryCollection"):
            out += _areas(part)
    return out
