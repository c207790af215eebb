"""Polygons on their way out: shared-boundary simplification, clipping, and geometry that QuPath accepts.

shapely geometries hold (x, y); arrays and scalars of this package are (y, x), turned round in ``to_level0`` and
``rectangle``.
"""

import numpy as np
import shapely

from wsiengine.contours import Traced, trace, trace_components
from wsiengine.geometry import Box

__all__ = ["Traced", "clean", "clip", "rectangle", "simplify", "to_level0", "trace", "trace_components"]

GRID_L0 = 0.01  # exported coordinates are multiples of this; QuPath 0.7 reduces to it on import
SMALLEST_AREA_L0 = 0.011  # smaller rings count as nothing: QuPath wants 0.01 px², the rest is for rounding far out


def simplify(polygons: np.ndarray, tolerance: float) -> np.ndarray:
    """Fewer vertices; a boundary shared by two polygons is simplified once, so they neither gap nor overlap.

    Removes vertices whose triangle with their neighbours is smaller than ``tolerance``² (Visvalingam and Whyatt 1993,
    over a coverage), and never one that would make lines cross. None of the polygons vanishes.

    Args:
        polygons: A valid coverage, as from ``trace``.
        tolerance: In the unit of the polygons; 0 leaves them as they are.
    """
    if not tolerance or not len(polygons):
        return polygons
    simple = shapely.coverage_simplify(polygons, tolerance, simplify_boundary=True)
    lost = shapely.is_empty(simple) | ~shapely.is_valid(simple)
    return np.where(lost, polygons, simple)


def to_level0(polygons: np.ndarray, l0_per_cell: tuple[float, float]) -> np.ndarray:
    """Polygons in cells → in level-0 pixels, by one multiplication per axis (y, x)."""
    scale = np.array([l0_per_cell[1], l0_per_cell[0]])
    return shapely.transform(polygons, lambda xy: xy * scale)


def clip(geometries: np.ndarray, limits: list[shapely.Geometry]) -> np.ndarray:
    """Each geometry cut to all ``limits``; those that lie wholly inside are not touched."""
    out = np.array(geometries, dtype=object)
    for limit in limits:
        shapely.prepare(limit)
        cut = ~shapely.covers(limit, out)
        with np.errstate(all="ignore"):  # floating-point flags that GEOS raised and dealt with
            out[cut] = shapely.intersection(out[cut], limit)
    return out


def rectangle(box: Box) -> shapely.Polygon:
    """A box as a polygon, in the same pixels."""
    return shapely.box(box.x0, box.y0, box.x1, box.y1)


def clean(geometries: np.ndarray) -> np.ndarray:
    """Geometries as every QuPath version takes them; None where nothing of an area is left.

    Valid polygons (one part: Polygon, several: MultiPolygon) with coordinates on a grid of 0.01 px and no ring below
    0.01 px². Most shapes only need rounding; the rest are repaired: ``make_valid``, polygon parts, ``set_precision``.
    """
    flat = shapely.force_2d(np.array(geometries, dtype=object))
    xy, index = shapely.get_coordinates(flat, return_index=True)
    flat[index[~np.isfinite(xy).all(axis=1)]] = None
    out = shapely.transform(flat, lambda xy: np.round(xy, 2))
    good = _acceptable(out)
    out[good] = shapely.remove_repeated_points(out[good])
    with np.errstate(all="ignore"):  # floating-point flags that GEOS raised and dealt with
        for i in np.flatnonzero(~good):
            out[i] = _repair(flat[i])
    return out


def _acceptable(geometries: np.ndarray) -> np.ndarray:
    """Whether each is a valid, non-empty Polygon without a ring that is next to nothing → bool."""
    good = (shapely.get_type_id(geometries) == shapely.GeometryType.POLYGON) & ~shapely.is_empty(geometries)
    good &= shapely.is_valid(geometries)
    # QuPath snaps to its grid on import, which leaves nothing of a needle about as thin as the grid.
    good &= shapely.area(geometries) >= 5 * GRID_L0 * shapely.length(geometries)
    rings, index = shapely.get_rings(geometries[good], return_index=True)
    small = shapely.area(shapely.polygons(rings)) < SMALLEST_AREA_L0
    good[np.flatnonzero(good)[index[small]]] = False
    return good


def _repair(geometry: shapely.Geometry | None) -> shapely.Geometry | None:
    """One geometry made acceptable, as a Polygon or MultiPolygon; None where no area is left."""
    if geometry is None:
        return None
    for _ in range(3):  # snapping to the grid may make slivers, which the second pass removes
        parts = _areas(shapely.make_valid(geometry))  # of a collection these may overlap
        parts = _areas(shapely.set_precision(shapely.union_all(parts), GRID_L0))
        parts = [part for part in map(_without_specks, parts) if part.area >= SMALLEST_AREA_L0]
        if not parts:
            return None
        geometry = parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)
        geometry = shapely.transform(shapely.set_precision(geometry, 0), lambda xy: np.round(xy, 2))
        if geometry.is_valid:
            return None if shapely.set_precision(geometry, GRID_L0).is_empty else geometry
    return None


def _areas(geometry: shapely.Geometry) -> list[shapely.Polygon]:
    """The polygon parts of anything, however nested."""
    if hasattr(geometry, "geoms"):
        return [area for part in geometry.geoms for area in _areas(part)]
    return [geometry] if geometry.geom_type == "Polygon" and not geometry.is_empty else []


def _without_specks(polygon: shapely.Polygon) -> shapely.Polygon:
    """The polygon without holes that are next to nothing."""
    holes = [ring for ring in polygon.interiors if shapely.Polygon(ring).area >= SMALLEST_AREA_L0]
    return polygon if len(holes) == len(polygon.interiors) else shapely.Polygon(polygon.exterior, holes)
