"""Label maps to polygons: pixel-edge contours, shared-boundary simplification, and geometry that QuPath accepts.

The contour of a region is the outline of its cells ("crack" contour), so that the area of its polygon is the number
of its cells; contours through the centres of border pixels lose half a cell all round.

``trace`` works on boundary *runs*, not cells: a run is a maximal straight piece of boundary between the same two
components. Each run gives one directed edge to the component on either side, so that neighbours carry the same
vertices (a valid coverage), which is what lets ``simplify`` move a shared boundary once for both.
"""

from dataclasses import dataclass

import numpy as np
import shapely
from scipy import ndimage

from wsiengine.geometry import Box

GRID_L0 = 0.01  # exported coordinates are multiples of this; QuPath 0.7 reduces to it on import
SMALLEST_AREA_L0 = 0.01  # rings below this area (square level-0 pixels) count as nothing


@dataclass(frozen=True, eq=False)
class Traced:
    """The connected regions of a label map.

    ``components`` int32 (rows, cols): 0 where the label is 0, else 1 … n; ``polygons[i]`` and ``labels[i]`` (uint8)
    belong to component i + 1. Components are numbered by label, then by their first cell in reading order.
    Polygons are in cells: x right, y down, whole numbers; every ring starts at its first vertex in reading order.
    """

    components: np.ndarray
    polygons: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class _Edges:
    """Directed boundary edges, the component on the right-hand side (y down): shells turn clockwise on screen."""

    start: np.ndarray  # int64 index of a lattice vertex
    end: np.ndarray
    owner: np.ndarray  # int32 component
    turn_in: np.ndarray  # bool: which of two edges this is, where two of one component end at the same vertex
    turn_out: np.ndarray  # and where two start


def trace(labels: np.ndarray) -> Traced:
    """Polygons of every 4-connected component of equal non-zero label, holes kept.

    Every polygon is valid as it comes: where a component touches itself at a corner, its boundary is cut there into
    a shell and a hole that share a point.

    Args:
        labels: uint8 (rows, cols), 0 = nothing.

    Returns:
        Regions whose polygon areas are exactly their numbers of cells.
    """
    if labels.ndim != 2:
        raise ValueError(f"a label map has rows and columns, not the shape {labels.shape}")
    components, component_labels = label_components(labels)
    if not len(component_labels):
        return Traced(components, np.empty(0, object), component_labels)
    edges = _boundary_edges(components)
    xy, ring_starts, ring_owner = _chain(edges, labels.shape[1] + 1)
    return Traced(components, _build(xy, ring_starts, ring_owner, len(component_labels)), component_labels)


def label_components(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """4-connected components of equal non-zero label → (int32 (rows, cols), uint8 (n,) label of each)."""
    components = np.zeros(labels.shape, np.int32)
    found: list[np.ndarray] = []
    count = 0
    for label in np.unique(labels):
        if label == 0:
            continue
        part, n = ndimage.label(labels == label)
        np.add(part, count, out=components, where=part > 0, casting="unsafe")
        found.append(np.full(n, label, np.uint8))
        count += n
    return components, np.concatenate(found) if found else np.empty(0, np.uint8)


def _boundary_edges(components: np.ndarray) -> _Edges:
    """All directed edges of all components, from the runs along rows and along columns."""
    width = components.shape[1] + 1
    y, x0, x1, above, below = _runs(components)
    x, y0, y1, left, right = _runs(components.T)
    at_h, at_v = (y * width + x0, y * width + x1), (y0 * width + x, y1 * width + x)
    # One run, two edges: the component below sees it as its top (to the right), the one above as its bottom.
    # Where a component touches itself at a corner two of its edges end there and two start: down is followed by
    # right, up by left, left by down, right by up. That keeps the two diagonal cells apart from the gap between.
    parts = [
        (at_h[0], at_h[1], below, True, False),  # to the right
        (at_h[1], at_h[0], above, False, True),  # to the left
        (at_v[0], at_v[1], left, False, False),  # down
        (at_v[1], at_v[0], right, True, True),  # up
    ]
    kept = [(start[own > 0], end[own > 0], own[own > 0], i, o) for start, end, own, i, o in parts]
    return _Edges(
        start=np.concatenate([k[0] for k in kept]),
        end=np.concatenate([k[1] for k in kept]),
        owner=np.concatenate([k[2] for k in kept]),
        turn_in=np.concatenate([np.full(len(k[2]), k[3]) for k in kept]),
        turn_out=np.concatenate([np.full(len(k[2]), k[4]) for k in kept]),
    )


def _runs(components: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Maximal runs of boundary along the row lines → (line, first column, end column, above, below)."""
    rows, cols = components.shape
    padded = np.zeros((rows + 2, cols + 2), np.int32)
    padded[1:-1, 1:-1] = components
    above, below = padded[:-1], padded[1:]  # (rows + 1, cols + 2): the components on either side of each line
    differ = above != below
    same_as_left = (above[:, 1:] == above[:, :-1]) & (below[:, 1:] == below[:, :-1])
    first = np.flatnonzero(differ[:, 1:] & ~same_as_left)  # flat over (rows + 1, cols + 1)
    last = np.flatnonzero(differ[:, :-1] & ~same_as_left)
    line, x0 = np.divmod(first, cols + 1)
    x1 = last % (cols + 1)
    return line, x0, x1, above[line, x0 + 1], below[line, x0 + 1]


def _chain(edges: _Edges, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges joined end to start → (xy (n, 2) float64 of closed rings, start of each ring, its component)."""
    span = int(edges.owner.max()) + 1
    by_end = np.argsort((edges.end * span + edges.owner) * 2 + edges.turn_in, kind="stable")
    by_start = np.argsort((edges.start * span + edges.owner) * 2 + edges.turn_out, kind="stable")
    following = np.empty(len(by_end), np.int64)
    following[by_end] = by_start
    order, ring_starts = _cycles(following, np.argsort(edges.start, kind="stable"))
    y, x = np.divmod(edges.start[order], width)
    return np.column_stack((x, y)).astype(np.float64), ring_starts, edges.owner[order[ring_starts[:-1]]]


def _cycles(following: np.ndarray, first_choice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cycles of a permutation, each begun at its first member in ``first_choice`` and closed with it.

    Returns (members one cycle after another, start of each cycle and the end). A plain loop over lists: pointer
    doubling needs one pass over everything per doubling of the longest ring, and was slower on noisy maps.
    """
    nexts: list[int] = following.tolist()
    members: list[int] = []
    starts = [0]
    append = members.append
    for begin in first_choice.tolist():
        if nexts[begin] < 0:
            continue
        at = begin
        while (ahead := nexts[at]) >= 0:
            append(at)
            nexts[at] = -1
            at = ahead
        append(begin)
        starts.append(len(members))
    return np.array(members, np.int64), np.array(starts, np.int64)


def _build(xy: np.ndarray, ring_starts: np.ndarray, owner: np.ndarray, count: int) -> np.ndarray:
    """Polygons from closed rings: per component one shell (clockwise on screen), the rest are holes."""
    x, y = xy.T
    cross = x[:-1] * y[1:] - x[1:] * y[:-1]
    cross[ring_starts[1:-1] - 1] = 0.0  # the step from one ring to the next is no edge
    twice_area = np.add.reduceat(cross, ring_starts[:-1])
    by_owner = np.lexsort((np.arange(len(owner)), twice_area < 0, owner))
    lengths = np.diff(ring_starts)[by_owner]
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    take = np.arange(offsets[-1]) + np.repeat(ring_starts[:-1][by_owner] - offsets[:-1], lengths)
    rings_per_polygon = np.bincount(owner - 1, minlength=count)
    polygon_offsets = np.concatenate(([0], np.cumsum(rings_per_polygon)))
    return shapely.from_ragged_array(shapely.GeometryType.POLYGON, xy[take], (offsets, polygon_offsets))


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
    out = shapely.remove_repeated_points(shapely.transform(flat, lambda xy: np.round(xy, 2)))
    for i in np.flatnonzero(~_acceptable(out)):
        out[i] = _repair(flat[i])
    return out


def _acceptable(geometries: np.ndarray) -> np.ndarray:
    """Whether each is a valid, non-empty Polygon without a ring that is next to nothing → bool."""
    good = (shapely.get_type_id(geometries) == shapely.GeometryType.POLYGON) & ~shapely.is_empty(geometries)
    good &= shapely.is_valid(geometries)
    rings, index = shapely.get_rings(geometries[good], return_index=True)
    small = shapely.area(shapely.polygons(rings)) < SMALLEST_AREA_L0
    good[np.flatnonzero(good)[index[small]]] = False
    return good


def _repair(geometry: shapely.Geometry | None) -> shapely.Geometry | None:
    """One geometry made acceptable, as a Polygon or MultiPolygon; None where no area is left."""
    if geometry is None:
        return None
    for _ in range(3):  # snapping to the grid may make slivers, which the second pass removes
        parts = _areas(shapely.set_precision(shapely.make_valid(geometry), GRID_L0))
        parts = [part for part in map(_without_specks, parts) if part.area >= SMALLEST_AREA_L0]
        if not parts:
            return None
        geometry = parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)
        geometry = shapely.transform(shapely.set_precision(geometry, 0), lambda xy: np.round(xy, 2))
        if geometry.is_valid:
            return geometry
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
