"""Grey pictures of 12 to 16 bits: their values reach a model that asks for them, and nothing else of the engine."""

import pickle
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile

import tests.models.detectors as planted
from tests.models.detectors import Planted, build
from wsiengine.datasets.rows import Annotated, Objects
from wsiengine.errors import CardError, WsiError
from wsiengine.evaluating_detection import find_in_image
from wsiengine.geometry import Box, Mpp, Size
from wsiengine.inference import infer
from wsiengine.models.card import parse_card
from wsiengine.slides import open_slide
from wsiengine.slides.deep import area_means

SIZE = Size(101, 143)
FORMS = ("png", "tif", "pgm", "dcm")


def coded() -> np.ndarray:
    """Every pixel its own value."""
    return (np.arange(SIZE.area, dtype=np.uint32).reshape(SIZE.shape) * 4 + 7).astype(np.uint16)


def picture(path: Path, values: np.ndarray) -> Path:
    """A file of that suffix."""
    if path.suffix == ".png":
        path.write_bytes(imagecodecs.png_encode(values))
    elif path.suffix == ".tif":
        tifffile.imwrite(path, values, photometric="minisblack")
    elif path.suffix == ".pgm":
        head = f"P5\n{values.shape[1]} {values.shape[0]}\n65535\n".encode()
        path.write_bytes(head + values.astype(">u2").tobytes())
    else:
        pytest.importorskip("pydicom", reason="pydicom (extra `dicom`) is not installed")
        from tests.datasets.test_dicom import write_dicom

        write_dicom(path, values)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_every_value_is_read_as_it_is_stored(tmp_path: Path, form: str) -> None:
    slide = open_slide(picture(tmp_path / f"p.{form}", coded()), mpp=1.0, deep=True)
    around = np.zeros((SIZE.height + 40, SIZE.width + 50, 1), np.uint16)  # black outside
    around[10 : 10 + SIZE.height, 20 : 20 + SIZE.width, 0] = coded()
    box = Box(-10, -20, SIZE.height + 30, SIZE.width + 30)
    assert np.array_equal(slide.read_deep(box, Mpp.square(1.0)), around)
    again = pickle.loads(pickle.dumps(slide))
    assert np.array_equal(again.read_deep(Box(3, 5, 40, 30), Mpp.square(1.0))[..., 0], coded()[3:40, 5:30])
    shown = slide.read_level(0, Box.of(SIZE))
    assert shown.dtype == np.uint8
    assert shown.min() == 0
    assert shown.max() == 255


@pytest.mark.parametrize("ratio", [(1.0, 1.0), (2.0, 2.0), (1.7, 2.3), (0.8, 1.0), (3.0, 7.0)])
def test_area_means_against_an_obvious_twin(ratio: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).integers(0, 65536, (23, 31)).astype(np.uint16)

    def weights(count: int, step: float) -> np.ndarray:
        edges = np.arange(int(np.ceil(count / step - 1e-9)) + 1) * step
        pixel = np.arange(count)
        return np.clip(np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel), 0, 1)

    exact = weights(23, ratio[0]) @ values @ weights(31, ratio[1]).T / (ratio[0] * ratio[1])
    got = area_means(values, ratio)
    assert np.abs(got - exact).max() <= 0.5 + 1e-6
    monkeypatch.setattr("wsiengine.slides.deep._STRIP_PX", 64)
    assert np.array_equal(area_means(values, ratio), got)


def marked() -> np.ndarray:
    """Marks that differ from their ground, and from each other, by less than one of 256 grey levels."""
    values = np.full(SIZE.shape, 40000, np.uint16)
    values[10:26, 20:40] = 40003
    values[90:, 130:] = 40009
    values[60:76, 57:70] = 40003
    values[30:40, 100:110] = 40004  # no mark
    return values


MARKS = [("One", 20.0, 10.0, 40.0, 26.0), ("One", 57.0, 60.0, 70.0, 76.0), ("Two", 130.0, 90.0, 143.0, 101.0)]


def found(result: Any) -> list[tuple]:
    return sorted((a.class_name, *a.geometry.bounds) for a in result.annotations)


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted, "COLOURS", {"One": (40003, 40003), "Two": (40009, 40009)})
    written = planted._write_card

    def coloured(*args: Any) -> Any:  # the values are no colours for the overlay
        top = {"classes": [{"name": "One"}, {"name": "Two"}]} | args[-1]
        return written(*args[:-1], top)

    monkeypatch.setattr(planted, "_write_card", coloured)


@pytest.mark.usefixtures("levels")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_a_model_of_16_bits_sees_them(tmp_path: Path, form: str, dtype: str) -> None:
    path = picture(tmp_path / f"p.{form}", marked())
    build(tmp_path / "m", Planted(mpp=None, deep=dtype, pad=65535))
    result = infer(path, str(tmp_path / "m"), tmp_path / "out", device="cpu", block_tiles=1)
    assert found(result) == MARKS
    assert (tmp_path / "out" / "overlay.png").is_file()
    again = infer(path, str(tmp_path / "m"), tmp_path / "o2", device="cpu", block_tiles=8, threads=3)
    assert found(again) == MARKS


@pytest.mark.usefixtures("levels")
def test_a_picture_of_16_bits_smaller_than_a_tile_and_one_shrunk_into_it(tmp_path: Path) -> None:
    values = np.full((41, 30), 40000, np.uint16)
    values[30:, 20:] = 40009
    build(tmp_path / "m", Planted(mpp=None, deep="uint16", pad=65535))
    small = picture(tmp_path / "small.png", values)
    result = infer(small, str(tmp_path / "m"), tmp_path / "out", device="cpu")
    assert found(result) == [("Two", 20.0, 30.0, 30.0, 41.0)]
    large = picture(tmp_path / "large.png", np.kron(values, np.ones((4, 4), np.uint16)))
    whole = {"size_px": 64, "mpp": None, "whole": True, "layout": "NHWC", "dtype": "uint16", "channels": 1, "pad": 9}
    build(tmp_path / "w", Planted(mpp=None, deep="uint16", largest_px=60), top_input=whole)
    shrunk = infer(large, str(tmp_path / "w"), tmp_path / "o2", device="cpu")
    assert shrunk.summary["tiles"] == 1
    [(name, *bounds)] = found(shrunk)
    assert name == "Two"
    assert np.abs(np.array(bounds) - (80, 120, 120, 164)).max() <= 2 * 164 / 64


@pytest.mark.usefixtures("levels")
def test_a_window_stretches_to_16_bits(tmp_path: Path) -> None:
    twelve = np.full(SIZE.shape, 100, np.uint16)
    twelve[10:26, 20:40] = round(40003 * 4095 / 65535)  # 2500 → 40009
    path = picture(tmp_path / "p.png", twelve)
    window = [{"step": "window", "low": 0, "high": 4095}]
    build(tmp_path / "m", Planted(mpp=None, deep="uint16", pad=0), top_recipe=window)
    result = infer(path, str(tmp_path / "m"), tmp_path / "out", device="cpu")
    assert found(result) == [("Two", 20.0, 10.0, 40.0, 26.0)]


@pytest.mark.usefixtures("levels")
@pytest.mark.parametrize("form", ["png", "dcm"])
def test_evaluate_sees_what_a_run_sees(tmp_path: Path, form: str) -> None:
    build(tmp_path / "m", Planted(mpp=None, deep="uint16", pad=65535))
    row = Annotated(picture(tmp_path / f"p.{form}", marked()), Objects.of([], []), "case", 0)
    answer = find_in_image(row, str(tmp_path / "m"), device="cpu")
    assert sorted(answer.boxes_xyxy.tolist()) == sorted([*box] for _, *box in MARKS)


@pytest.mark.usefixtures("levels")
def test_what_is_no_deep_grey_picture_is_refused_in_words(tmp_path: Path) -> None:
    build(tmp_path / "m", Planted(mpp=None, deep="uint16"))
    for pixels, words in (
        (np.zeros((9, 12), np.uint8), r"8 bits per channel \(grey\)"),
        (np.zeros((9, 12, 3), np.uint16), r"16 bits per channel \(3 channels\)"),
    ):
        path = tmp_path / "p.png"
        path.write_bytes(imagecodecs.png_encode(pixels))
        with pytest.raises(WsiError, match=words):
            infer(path, str(tmp_path / "m"), tmp_path / "out", device="cpu")
    path = picture(tmp_path / "p.png", marked())
    with pytest.raises(WsiError, match="takes pixels of 16 bits, and clahe works at 8"):
        infer(path, str(tmp_path / "m"), tmp_path / "out", device="cpu", normalise="clahe")
    with pytest.raises(WsiError, match="was opened for 8"):
        infer(open_slide(path, window=(0, 65535)), str(tmp_path / "m"), tmp_path / "out", device="cpu")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input": {"depth": 8}}, "depth is 8, needed 16 with dtype uint16"),
        ({"input": {"dtype": "uint8"}}, "depth is 16, needed 8 with dtype uint8"),
        ({"input": {"channels": 3}}, "needed channels 1, not 3"),
        ({"input": {"pad": 65536}}, "from 0 to 65535"),
        ({"input": {"range": [0, 1]}}, "dtype uint16 takes pixels as they are"),
        ({"recipe": [{"step": "clahe"}]}, "clahe works at 8 bits"),
    ],
)
def test_cards_that_contradict_themselves(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    data = build(tmp_path / "m", Planted(mpp=None, deep="uint16")).to_json()
    assert parse_card(data, tmp_path).input.deep
    for name, value in change.items():
        data[name] = {**data[name], **value} if isinstance(value, dict) else value
    with pytest.raises(CardError, match=words):
        parse_card(data, tmp_path)


def test_a_mammogram_in_dicom_is_opened_with_its_size(tmp_path: Path) -> None:
    slide = open_slide(picture(tmp_path / "m.dcm", marked()))
    assert slide.info.format == "DICOM"
    assert slide.info.mpp == Mpp(70.0, 85.0)
    assert slide.read_level(0, Box.of(SIZE)).max() == 255
