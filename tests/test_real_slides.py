"""Real slides through the command line: facts, words, and files that QuPath, zarr and picture viewers open."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import shapely
import zarr

from tests.data import slide_path
from tests.qupath_rules import check
from wsiengine.cli import main
from wsiengine.result import Result

RESULTS = {"annotations.geojson", "probability.zarr", "overlay.png", "run.json"}
CMU, JPEG2000, LUNA = "CMU-1-Small-Region.svs", "tcga-cr-7395-01a-01-ts1.svs", "luna_1065626.svs"
QPTIFF = "pathml_small_vectra.qptiff"


def _infer(name: str, folder: Path, *options: str, model: str = "planted") -> int:
    return main(["infer", str(slide_path(name)), "-m", model, "-o", str(folder), *options])


def _info(name: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["info", str(slide_path(name)), "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def _checked(folder: Path) -> Result:
    """The result, after looking at every file of it."""
    assert {path.name for path in folder.iterdir()} == RESULTS
    assert check(folder / "annotations.geojson") == []
    result = Result(folder)
    size = result.run["slide"]["size_l0"]
    whole = shapely.union_all([a.geometry for a in result.annotations])
    assert shapely.box(0, 0, size["width"], size["height"]).buffer(0.01).contains(whole)
    assert sum(a.geometry.area for a in result.annotations) == pytest.approx(whole.area, rel=1e-6)
    mm2 = result.run["slide"]["mpp"]["y"] * result.run["slide"]["mpp"]["x"] / 1e6
    assert result.summary["analysed_mm2"] == pytest.approx(whole.area * mm2, rel=0.02)  # outlines are simplified
    coded = zarr.open_group(str(folder / "probability.zarr"), mode="r")["0"][...]  # type: ignore[index]
    cell_mm2 = (result.run["plan"]["cell_px"] * result.run["plan"]["working_mpp"]["y"] / 1000) ** 2
    assert np.count_nonzero(coded[0]) * cell_mm2 == pytest.approx(result.summary["analysed_mm2"], rel=0.1)
    picture = cv2.imread(str(folder / "overlay.png"))
    assert picture is not None
    assert min(picture.shape[:2]) > 300
    return result


def test_cmu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = _info(CMU, capsys)
    assert facts["size_l0"] == {"width": 2220, "height": 2967}
    assert facts["mpp"] == {"x": 0.499, "y": 0.499}
    assert facts["format"].startswith("Aperio SVS, JPEG")
    assert "label" in facts["associated_images"]
    assert _infer(CMU, tmp_path / "out") == 0
    result = _checked(tmp_path / "out")
    assert set(result.summary["area_mm2"]) == {"No mark"}  # there are no planted marks on it
    assert 0.4 < result.summary["tissue_mm2"] < 1.2


def test_jpeg2000_without_mpp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = _info(JPEG2000, capsys)
    assert facts["mpp"] is None
    assert "JPEG 2000" in facts["format"]
    assert _infer(JPEG2000, tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert "does not state its µm/px" in err
    assert "--mpp" in err
    assert not (tmp_path / "out").exists()
    assert _infer(JPEG2000, tmp_path / "out", "--mpp", "0.25") == 0
    assert "warning  µm/px taken from --mpp: 0.25" in capsys.readouterr().out
    result = _checked(tmp_path / "out")
    assert result.run["slide"]["mpp"] == {"y": 0.25, "x": 0.25}


def test_mostly_glass(tmp_path: Path) -> None:
    assert _infer(LUNA, tmp_path / "out") == 0
    result = _checked(tmp_path / "out")
    whole_mm2 = 11952 * 10249 * 0.5026**2 / 1e6
    assert 0.005 < result.summary["tissue_mm2"] / whole_mm2 < 0.05  # about 97 % is bare glass
    assert result.summary["tiles"] < 0.05 * whole_mm2 * 1e6 / (48 * 48)


def test_fluorescence_in_a_qptiff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = _info(QPTIFF, capsys)
    assert facts["channels"] == ["DAPI", "FITC", "Cy3"]
    assert _infer(QPTIFF, tmp_path / "out") == 1
    out, err = capsys.readouterr()
    assert "warning  This is fluorescence (DAPI, FITC, Cy3)" in out
    assert "no tissue was found" in err
    assert _infer(QPTIFF, tmp_path / "out", "--tissue", "none") == 0  # whoever insists is warned, not stopped
    assert "fluorescence" in capsys.readouterr().out
    result = _checked(tmp_path / "out")
    assert "fluorescence" in result.run["warnings"][0]


@pytest.mark.parametrize(("name", "options"), [(CMU, ()), (JPEG2000, ("--mpp", "0.25")), (LUNA, ())])
def test_crc5(name: str, options: tuple[str, ...], tmp_path: Path) -> None:
    assert _infer(name, tmp_path / "out", *options, model="crc5") == 0
    result = _checked(tmp_path / "out")
    known = {"Normal", "Adenoma", "Adenocarcinoma", "No epithelium", "Uncertain"}
    assert set(result.summary["area_mm2"]) <= known
    assert result.classes == ("Normal", "Adenoma", "Adenocarcinoma")
    assert "research use only" in result.run["model"]["licence"]
    probability = result.probability.compute().astype(float)
    there = probability[..., 0] > 0
    np.testing.assert_allclose((probability[there, :3] - 1).sum(axis=-1), 254, atol=2)  # three classes, rounded


def test_the_readers_of_others_open_the_map(tmp_path: Path) -> None:
    import warnings

    assert _infer(CMU, tmp_path / "out") == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that they bring
        from ome_zarr.io import parse_url
        from ome_zarr.reader import Reader

        location = parse_url(str(tmp_path / "out" / "probability.zarr"), mode="r")
        assert location is not None
        [node] = [n for n in Reader(location)() if n.data]
        coded = Result(tmp_path / "out").probability.compute()
        np.testing.assert_array_equal(np.moveaxis(node.data[0].compute(), 0, -1), coded)


def test_all_slides_of_a_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As a user tries a folder first: what can be run is run, the rest is told, and the code says that not all went."""
    assert main(["infer", str(slide_path(".")), "-m", "planted", "-o", str(tmp_path / "out")]) == 1
    out, err = capfd.readouterr()
    done = {path.parent.name for path in (tmp_path / "out").glob("*/run.json")}
    assert done == {Path(CMU).stem, Path(LUNA).stem}
    assert "2 of 6 slides finished" in out
    assert err.count("error    ") == err.count("try      ") == 4
    assert "Traceback" not in err
