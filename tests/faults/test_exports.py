"""Exports are always valid: nasty shapes and random maps, each file checked against the rules of QuPath."""

from pathlib import Path

import pytest
import shapely

from tests.faults.shapes import KINDS, annotations_of, export_map, export_shapes, nasty
from tests.qupath_rules import check
from wsiengine.qupath import write_geojson

SHAPES, BATCH = 2_000, 250  # benchmarks/faults.py takes 20,000


@pytest.mark.parametrize("first", range(0, SHAPES, BATCH))
def test_nasty_shapes(tmp_path: Path, first: int) -> None:
    _, problems = export_shapes(range(first, first + BATCH), tmp_path)
    assert problems == []


@pytest.mark.parametrize("seed", range(24))
def test_random_maps(tmp_path: Path, seed: int) -> None:
    _, problems = export_map(seed, tmp_path)
    assert problems == []


def test_the_shapes_are_nasty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the tests: without repair QuPath would refuse most of these files."""
    shapes = [nasty(seed) for seed in range(200)]
    assert sum(not shape.is_valid for shape in shapes) > 50
    assert len(KINDS) == 10
    monkeypatch.setattr("wsiengine.qupath.clean", lambda geometries: geometries)
    finite = [s for s in shapes if not s.is_empty and shapely.is_valid_reason(s) != "Invalid Coordinate"]
    for start in range(0, 40, 10):
        write_geojson(annotations_of(finite[start : start + 10], 0), tmp_path / "raw.geojson")
        assert check(tmp_path / "raw.geojson")
