"""Boxes, resolutions and the lattice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsiengine.geometry import Box, Lattice, Mpp, Size

boxes = st.builds(lambda y, x, h, w: Box(y, x, y + h, x + w), *(st.integers(-50, 50),) * 2, *(st.integers(0, 60),) * 2)


def _points(box: Box) -> set[tuple[int, int]]:
    return {(y, x) for y in range(box.y0, box.y1) for x in range(box.x0, box.x1)}


@given(boxes, boxes)
def test_intersection_holds_the_common_points(a: Box, b: Box) -> None:
    assert _points(a.intersect(b)) == _points(a) & _points(b)


@given(boxes, st.integers(1, 30), st.integers(1, 30))
def test_pieces_cut_a_box_without_gap_or_overlap(box: Box, height: int, width: int) -> None:
    pieces = list(box.pieces(height, width)) if box else []
    assert sum(p.area for p in pieces) == box.area
    assert set().union(*map(_points, pieces)) == _points(box)


def test_boxes_and_resolutions_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="ends before"):
        Box(5, 0, 4, 3)
    with pytest.raises(ValueError, match="positive"):
        Mpp(0.5, float("nan"))
    with pytest.raises(ValueError, match="negative"):
        Size(-1, 3)


def test_lattice_counts_overhanging_cells_but_no_rounding_noise() -> None:
    lattice = Lattice(Size(1001, 2000), Mpp.square(0.5), Mpp.square(1.0), 32)
    assert lattice.extent_px == Size(501, 1000)
    assert lattice.extent_cells == Size(16, 32)
    assert lattice.l0_per_cell == (64, 64)
    # 3000 px at 0.1 µm are exactly 300 px at 1.0 µm, although 1.0 / 0.1 is not exact in binary.
    assert Lattice(Size(3000, 3000), Mpp.square(0.1), Mpp.square(1.0), 1).extent_px == Size(300, 300)


def test_lattice_keeps_the_axes_apart() -> None:
    lattice = Lattice(Size(1000, 1000), Mpp(y=0.5, x=0.25), Mpp.square(1.0), 10)
    assert lattice.l0_per_cell == (20, 40)
    assert lattice.extent_px == Size(500, 250)


def test_sizes_and_resolutions_read_as_people_write_them() -> None:
    assert str(Size(32914, 46000)) == "46,000 × 32,914"
    assert str(Mpp.square(1)) == "1.0 µm/px"
    assert str(Mpp(y=0.99, x=1.29)) == "1.29 × 0.99 µm/px (x × y)"
