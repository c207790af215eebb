"""Mosaics: the truth is where it says, zones are wide enough, sources and folds are not mixed."""

from pathlib import Path

import numpy as np
import pytest

from tests.data import data_dir
from tests.mosaics import CLASSES, GLASS_COLOUR, MosaicPlan, Truth, mosaic_size, mosaic_slide
from wsiengine import Box, Mpp, Size, open_slide
from wsiengine.slides.pyramid import PyramidLayout

LAYOUT = PyramidLayout(compression="deflate", downsamples=(1, 4))


@pytest.mark.parametrize("source", ["ebhi", "glas", "lc25000"])
def test_tissue_is_inside_zones_and_glass_outside(tmp_path: Path, source: str) -> None:
    plan = MosaicPlan(source, mpp=2.0, zone_um=500, margin_um=100)
    size = mosaic_size(plan, 2, 3)
    path = tmp_path / "mosaic.svs"
    truth = mosaic_slide(path, size, plan, data_dir(), LAYOUT)
    assert len(truth.zones) == 6
    with open_slide(path) as slide:
        assert slide.info.mpp == Mpp.square(2.0)
        pixels = slide.read_level(0, Box.of(size))
    labels = truth.raster(2.0)
    assert labels.shape == size.shape
    assert (pixels[labels == 0] == GLASS_COLOUR).all()
    assert (pixels[labels > 0] != GLASS_COLOUR).any(axis=-1).mean() > 0.97
    expected = {"glass", "normal", "adenocarcinoma"} | ({"adenoma"} if source != "lc25000" else set())
    assert {CLASSES[i] for i in np.unique(labels)} == expected
    for zone in truth.zones:
        assert min(zone.box_l0.shape) * plan.mpp >= plan.zone_um - plan.mpp


def test_the_truth_is_stored_and_seen_at_any_resolution(tmp_path: Path) -> None:
    plan = MosaicPlan("glas", mpp=1.0, zone_um=400, margin_um=90)
    truth = mosaic_slide(tmp_path / "m.svs", Size(1113, 1507), plan, data_dir(), LAYOUT)
    truth.save(tmp_path / "m.npz")
    assert Truth.load(tmp_path / "m.npz") == truth
    fine = truth.raster(1.0)
    for zone in truth.zones:
        assert (fine[zone.box_l0.slices] == CLASSES.index(zone.label)).all()
    assert (fine > 0).sum() == sum(zone.box_l0.area for zone in truth.zones)
    coarse = truth.raster(8.0)
    np.testing.assert_array_equal(coarse[:139, :188], fine[4::8, 4::8][:139, :188])


def test_mosaics_repeat_and_folds_differ(tmp_path: Path) -> None:
    made = []
    for name, plan in (
        ("a", MosaicPlan("ebhi", 2.0, 0, 500, 100)),
        ("b", MosaicPlan("ebhi", 2.0, 0, 500, 100)),
        ("c", MosaicPlan("ebhi", 2.0, 1, 500, 100)),
    ):
        mosaic_slide(tmp_path / name, mosaic_size(plan, 1, 3), plan, data_dir(), LAYOUT)
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1] != made[2]


def test_a_slide_too_small_for_a_zone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hold no zone of 1792 µm"):
        mosaic_slide(tmp_path / "m.svs", Size(500, 500), MosaicPlan(), data_dir())
