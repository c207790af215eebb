"""The analysed area: that of the regions drawn, and the same when small ones are left out."""

import json
from pathlib import Path

import pytest
import shapely

from tests import planted_slides as planted
from wsiengine.geometry import Box, Size
from wsiengine.inference import Outputs, infer

SIZE = Size(803, 1211)
MARKS = [(planted.A, Box(100, 150, 350, 450)), (planted.C, Box(400, 700, 430, 730))]


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.write(tmp_path_factory.mktemp("slide") / "slide.svs", planted.paint(SIZE, MARKS))


@pytest.mark.parametrize("region", [None, shapely.Polygon([(90, 70), (900, 130), (1211, 803), (300, 700)])])
def test_it_does_not_shrink_with_what_is_left_out(region, slide: Path, tmp_path: Path) -> None:
    options: dict = {"tissue": "none"}
    if region is not None:
        path = tmp_path / "region.geojson"
        path.write_text(json.dumps({"type": "Feature", "geometry": shapely.geometry.mapping(region), "properties": {}}))
        options["region"] = path
    whole = infer(slide, "planted", tmp_path / "a", **options).summary
    large = infer(slide, "planted", tmp_path / "b", outputs=Outputs(min_area_um2=20_000), **options).summary
    assert whole["analysed_mm2"] == pytest.approx(sum(whole["area_mm2"].values()), rel=2e-3)
    assert large["analysed_mm2"] == whole["analysed_mm2"]
    assert sum(large["area_mm2"].values()) < 0.999 * large["analysed_mm2"]
