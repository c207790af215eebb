"""Label maps to polygons along the edges of cells ("crack" contours).

The contour of a region is the outline of its cells, so that the area of its polygon is the number of its cells;
contours through the centres of border pixels lose half a cell all round.

``trace`` works on boundary *runs*, not cells: a run is a maximal straight piece of boundary between the same two
components. Each run gives one directed edge to the component on either side, so that neighbours carry the same
vertices: a valid coverage, in which a shared boundary can be smoothed or simplified once for both.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import shapely

from wsiengine.scratch import IN_MEMORY, Scratch, strips

_BATCH_EDGES = 100_000  # chained, smoothed and made into polygons at a time


@dataclass(frozen=True, eq=False)
class Traced:
    """The connected regions of a label map.

    ``components`` int32 (rows, cols): 0 where the label is 0, else 1 … n; ``polygons[i]`` and ``labels[i]`` (uint8)
    belong to component i + 1. Components are numbered by label, then by their first cell in reading order.
    Polygons are in cells, x right, y down; vertices are whole numbers, or multiples of half a cell where smoothed.
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


@dataclass(frozen=True, eq=False)
class _Rings:
    """Open rings one after another: points ``xy`` (n, 2), ``starts`` of each and the end, component that owns each."""

    xy: np.ndarray
    starts: np.ndarray
    owner: np.ndarray


def trace(labels: np.ndarray, *, smooth: bool = False, scratch: Scratch = IN_MEMORY) -> Traced:
    """Polygons of every 4-connected component of equal non-zero label, holes kept.

    Every polygon is valid as it comes: where a component touches itself at a corner, its boundary is cut there into
    a shell and a hole that share a point.

    Args:
        labels: uint8 (rows, cols), 0 = nothing.
        smooth: Replace the stairs of slanting boundaries by slanting lines: see :func:`_smooth`.
        scratch: Makes the map of components.

    Returns:
        Regions whose polygon areas are, unless smoothed, exactly their numbers of cells.
    """
    if labels.ndim != 2:
        raise ValueError(f"a label map has rows and columns, not the shape {labels.shape}")
    from wsikernels.components import label_values  # Numba, paid for on first use

    return trace_components(*label_values(labels, scratch.zeros), smooth=smooth)


def trace_components(components: np.ndarray, component_labels: np.ndarray, *, smooth: bool = False) -> Traced:
    """As :func:`trace`, of components that are known already: neighbours of one label may stay apart.

    Args:
        components: int32 (rows, cols), 0 = nothing; each of 1 … n is there and connected through edges.
        component_labels: uint8 (n,): label of each.
        smooth: As for :func:`trace`.
    """
    if not len(component_labels):
        return Traced(components, np.empty(0, object), component_labels)
    edges = _boundary_edges(components)
    polygons = []
    for first, stop, some in _batches(edges, len(component_labels)):
        rings = _chain(some, components.shape[1] + 1)
        if smooth:
            rings = _smooth(rings, components)
        polygons.append(_build(rings, first, stop))
    return Traced(components, np.concatenate(polygons), component_labels)


def _batches(edges: _Edges, count: int) -> Iterator[tuple[int, int, _Edges]]:
    """Components from ``first`` to before ``stop``, with their edges in order: chaining takes 300 bytes an edge."""
    ends = np.cumsum(np.bincount(edges.owner, minlength=count + 1))  # of each component's edges, were they sorted
    first = 1
    while first <= count:
        stop = max(first + 1, int(np.searchsorted(ends, ends[first - 1] + _BATCH_EDGES, side="right")))
        stop = min(stop, count + 1)
        if first == 1 and stop == count + 1:
            yield first, stop, edges
        else:
            own = np.flatnonzero((edges.owner >= first) & (edges.owner < stop))
            yield first, stop, _Edges(*(getattr(edges, field.name)[own] for field in fields(edges)))
        first = stop


def _boundary_edges(components: np.ndarray) -> _Edges:
    """All directed edges of all components, from the runs along rows and along columns."""
    along, down = _horizontal_edges(components), _vertical_edges(components)
    return _Edges(*(np.concatenate(column) for column in zip(*along, *down, strict=True)))


def _horizontal_edges(components: np.ndarray) -> list[tuple[np.ndarray, ...]]:
    """Columns of :class:`_Edges` to the right, and to the left."""
    width = components.shape[1] + 1
    y, x0, x1, above, below = _runs(components)
    start, end = y * width + x0, y * width + x1
    # One run, two edges: the component below sees it as its top (to the right), the one above as its bottom.
    # Where a component touches itself at a corner two of its edges end there and two start: down is followed by
    # right, up by left, left by down, right by up. That keeps the two diagonal cells apart from the gap between.
    return [_owned(start, end, below, (True, False)), _owned(end, start, above, (False, True))]


def _vertical_edges(components: np.ndarray) -> list[tuple[np.ndarray, ...]]:
    """Columns of :class:`_Edges` down, and up."""
    width = components.shape[1] + 1
    x, y0, y1, left, right = _runs(components.T)
    start, end = y0 * width + x, y1 * width + x
    return [_owned(start, end, left, (False, False)), _owned(end, start, right, (True, True))]


def _owned(start: np.ndarray, end: np.ndarray, owner: np.ndarray, turns: tuple[bool, bool]) -> tuple[np.ndarray, ...]:
    """Columns of :class:`_Edges`, of those that a component owns."""
    own = owner > 0
    count = int(np.count_nonzero(own))
    return start[own], end[own], owner[own], np.full(count, turns[0]), np.full(count, turns[1])


def _runs(components: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Maximal runs of boundary along the row lines → (line, first column, end column, above, below)."""
    rows, cols = components.shape
    found = [_runs_along(components, lines, cols) for lines in strips((rows + 1, cols))]
    line, x0, x1, above, below = (np.concatenate(column) for column in zip(*found, strict=True))
    return line, x0, x1, above, below


def _runs_along(components: np.ndarray, lines: slice, cols: int) -> tuple[np.ndarray, ...]:
    """``_runs`` along some lines: line k lies above row k."""
    padded = np.zeros((lines.stop - lines.start + 1, cols + 2), np.int32)
    beside = components[max(lines.start - 1, 0) : lines.stop]  # the rows on either side of them
    first_row = int(lines.start == 0)
    padded[first_row : first_row + len(beside), 1:-1] = beside
    above, below = padded[:-1], padded[1:]
    differ = above != below
    same_as_left = (above[:, 1:] == above[:, :-1]) & (below[:, 1:] == below[:, :-1])
    first = np.flatnonzero(differ[:, 1:] & ~same_as_left)  # flat over (lines, cols + 1)
    last = np.flatnonzero(differ[:, :-1] & ~same_as_left)
    line, x0 = np.divmod(first, cols + 1)
    x1 = last % (cols + 1)
    return line + lines.start, x0, x1, above[line, x0 + 1], below[line, x0 + 1]


def _chain(edges: _Edges, width: int) -> _Rings:
    """Edges joined end to start."""
    span = int(edges.owner.max()) + 1
    by_end = np.argsort((edges.end * span + edges.owner) * 2 + edges.turn_in)
    by_start = np.argsort((edges.start * span + edges.owner) * 2 + edges.turn_out)
    following = np.empty(len(by_end), np.int64)
    following[by_end] = by_start
    order, starts = _cycles(following, np.argsort(edges.start, kind="stable"))
    y, x = np.divmod(edges.start[order], width)
    return _Rings(np.column_stack((x, y)).astype(np.float64), starts, edges.owner[order[starts[:-1]]])


def _cycles(following: np.ndarray, first_choice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cycles of a permutation, each begun at its first member in ``first_choice``.

    Returns (members, one cycle after another; start of each cycle, and the end).
    """
    nexts: list[int] = following.tolist()  # a plain loop: lists are several times faster than single array items
    members: list[int] = []
    starts = [0]
    for at in first_choice.tolist():
        if nexts[at] < 0:
            continue
        while (ahead := nexts[at]) >= 0:
            members.append(at)
            nexts[at] = -1
            at = ahead
        starts.append(len(members))
    return np.array(members, np.int64), np.array(starts, np.int64)


def _smooth(rings: _Rings, components: np.ndarray) -> _Rings:
    """Slanting lines instead of stairs, within half a cell of the cells' edges.

    A *step* is a run between two opposite turns. The corners at both its ends are cut by equal triangles, one on
    either side of the boundary, so that areas stay; a square has no step and keeps its corners. One leg of every
    triangle is half a cell, the other at most half a run: no other boundary can reach into it, so lines never cross.
    Points where three regions meet stay. Nothing here depends on the side from which a boundary is seen, so
    neighbours still share it.
    """
    before, after = _neighbours(rings.starts)
    run = rings.xy[after] - rings.xy
    length = np.abs(run).sum(axis=1)
    turn = np.sign(run[before, 0] * run[:, 1] - run[before, 1] * run[:, 0])
    node = _is_node(rings.xy, components)
    turn[node] = 0
    step = turn * turn[after] < 0
    outer = np.minimum(length[before], length[after])
    slanting = (length == 1) | (outer == 1)
    along = np.where(step, np.where(slanting, length / 2, 0.5), np.inf)  # cut off the step itself, at both its ends
    beside = np.where(step, np.where(slanting, outer / 2, 0.5), np.inf)  # and off the runs on either side of it
    back, ahead = np.minimum(along[before], beside), np.minimum(along, beside[before])
    cut = np.isfinite(back)
    first, second = rings.xy.copy(), rings.xy.copy()
    unit = run / length[:, None]
    first[cut] -= unit[before[cut]] * back[cut, None]
    second[cut] += unit[cut] * ahead[cut, None]
    both = np.stack((first, second), axis=1).reshape(-1, 2)
    twice = _Rings(both, rings.starts * 2, rings.owner)
    kept = (both != both[_neighbours(twice.starts)[0]]).any(axis=1)  # two cuts may meet in the middle of a run
    thinned, node = _take(twice, kept), np.repeat(node, 2)[kept]
    before, after = _neighbours(thinned.starts)
    into, out_of = thinned.xy - thinned.xy[before], thinned.xy[after] - thinned.xy
    return _take(thinned, node | (into[:, 0] * out_of[:, 1] != into[:, 1] * out_of[:, 0]))


def _is_node(xy: np.ndarray, components: np.ndarray) -> np.ndarray:
    """Whether more than two pieces of boundary meet at lattice points → bool (n,)."""
    x, y = xy.astype(np.int64).T
    around = [_component_at(components, y + dy, x + dx) for dy, dx in ((-1, -1), (-1, 0), (0, 0), (0, -1))]
    return sum((around[i] != around[i - 1]).astype(np.int8) for i in range(4)) > 2


def _component_at(components: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Components of cells; 0 beyond the map."""
    rows, cols = components.shape
    on_map = (y >= 0) & (y < rows) & (x >= 0) & (x < cols)
    return np.where(on_map, components[np.clip(y, 0, rows - 1), np.clip(x, 0, cols - 1)], 0)


def _neighbours(starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of the point before and after each, round each ring."""
    count = starts[-1]
    before, after = np.arange(-1, count - 1), np.arange(1, count + 1)
    before[starts[:-1]] = starts[1:] - 1
    after[starts[1:] - 1] = starts[:-1]
    return before, after


def _take(rings: _Rings, kept: np.ndarray) -> _Rings:
    """Only some points of each ring."""
    return _Rings(rings.xy[kept], np.concatenate(([0], np.cumsum(kept)))[rings.starts], rings.owner)


def _build(rings: _Rings, first: int, stop: int) -> np.ndarray:
    """Polygons of components ``first`` to before ``stop``: one shell each (clockwise on screen), the rest are holes."""
    _, after = _neighbours(rings.starts)
    (x, y), (x_after, y_after) = rings.xy.T, rings.xy[after].T
    twice_area = np.add.reduceat(x * y_after - x_after * y, rings.starts[:-1])
    order = np.lexsort((twice_area < 0, rings.owner))  # stable: holes in reading order after their shell
    lengths = np.diff(rings.starts)[order] + 1  # closed
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    take = np.arange(offsets[-1]) + np.repeat(rings.starts[order] - offsets[:-1], lengths)
    take[offsets[1:] - 1] = rings.starts[order]
    rings_per_polygon = np.bincount(rings.owner - first, minlength=stop - first)
    polygon_offsets = np.concatenate(([0], np.cumsum(rings_per_polygon)))
    return shapely.from_ragged_array(shapely.GeometryType.POLYGON, rings.xy[take], (offsets, polygon_offsets))
