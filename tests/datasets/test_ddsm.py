"""DDSM headers, overlays and images: what is written is read back, what is cut is refused."""

from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsiengine.datasets.ddsm import (
    STEPS_XY,
    View,
    checked_samples,
    decode_chain,
    parse_header,
    parse_overlay,
    read_ddsm,
    read_ljpeg,
)
from wsiengine.errors import WsiError

VIEW = View("LEFT_CC", 300, 200, 12, 50.0, True)


def chain(points: np.ndarray) -> str:
    """The line of an outline: start, codes, #."""
    codes = [int(np.flatnonzero((step == STEPS_XY).all(axis=1))[0]) for step in np.diff(points, axis=0)]
    return " ".join(map(str, [*points[0].tolist(), *codes, "#"]))


def walks() -> st.SearchStrategy[np.ndarray]:
    """Border pixels of a walk well inside the image."""
    codes = st.lists(st.integers(0, 7), min_size=1, max_size=80)
    start = st.tuples(st.integers(90, 110), st.integers(90, 210))
    return st.builds(lambda s, c: np.vstack([[s], np.array(s) + np.cumsum(STEPS_XY[c], axis=0)]), start, codes)


def header_text(views: list[View], filename: str = "A-1234-1") -> str:
    lines = ["ics_version 1.0", f"filename {filename}", "DATE_OF_STUDY 2 7 1995", "PATIENT_AGE 42", "FILM", "DENSITY 3"]
    lines.append("SEQUENCE")
    for v in views:
        overlay = "OVERLAY" if v.overlay else "NON_OVERLAY"
        lines.append(
            f"{v.name} LINES {v.rows} PIXELS_PER_LINE {v.cols} BITS_PER_PIXEL {v.bits} RESOLUTION {v.um:g} {overlay}"
        )
    return "\n".join(lines) + "\n"


def overlay_text(outlines: list[np.ndarray], lesion: str = "MASS SHAPE OVAL MARGINS CIRCUMSCRIBED") -> str:
    lines = [f"TOTAL_ABNORMALITIES {len(outlines)}"]
    for number, outline in enumerate(outlines, 1):
        lines += [f"ABNORMALITY {number}", f"LESION_TYPE {lesion}", "ASSESSMENT 4", "SUBTLETY 3", "PATHOLOGY BENIGN"]
        lines += ["TOTAL_OUTLINES 1", "BOUNDARY", chain(outline)]
    return "\n".join(lines) + "\n"


@given(walks())
def test_a_chain_is_read_back(points: np.ndarray) -> None:
    np.testing.assert_array_equal(decode_chain(chain(points), VIEW), points)


def test_codes_go_clockwise_from_straight_up() -> None:
    found = decode_chain("10 20 0 2 4 6 1 3 5 7 #", VIEW)
    expected = [(10, 20), (10, 19), (11, 19), (11, 20), (10, 20), (11, 19), (12, 20), (11, 21), (10, 20)]
    assert found.tolist() == [list(p) for p in expected]


views = st.builds(
    View,
    st.sampled_from(["LEFT_CC", "LEFT_MLO", "RIGHT_CC", "RIGHT_MLO"]),
    st.integers(1, 7000),
    st.integers(1, 5000),
    st.sampled_from([12, 16]),
    st.sampled_from([42.0, 43.5, 50.0]),
    st.booleans(),
)


@given(st.lists(views, min_size=1, max_size=4))
def test_a_header_is_read_back(expected: list[View]) -> None:
    found = parse_header(header_text(expected))
    assert found.views == tuple(expected)
    assert found.filename == "A-1234-1"
    assert found.entries["PATIENT_AGE"] == "42"


@given(st.lists(walks(), min_size=1, max_size=3))
def test_an_overlay_is_read_back(outlines: list[np.ndarray]) -> None:
    found = parse_overlay(overlay_text(outlines), VIEW)
    assert [a.facts["PATHOLOGY"] for a in found] == ["BENIGN"] * len(outlines)
    for abnormality, outline in zip(found, outlines, strict=True):
        np.testing.assert_array_equal(abnormality.outlines[0], outline)


@given(st.lists(walks(), min_size=1, max_size=2), st.data())
def test_a_cut_overlay_is_refused(outlines: list[np.ndarray], data: st.DataObject) -> None:
    text = overlay_text(outlines).rstrip()
    cut = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(WsiError):
        parse_overlay(text[:cut], VIEW)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("10 20 1 2 3", "truncated"),
        ("", "truncated"),
        ("10 20 1 8 #", "code 8"),
        ("10 x 1 #", "column, row, codes"),
        ("0 0 0 #", "leaves the image of 200 × 300 px"),
        ("199 299 2 #", "leaves the image"),
    ],
)
def test_a_broken_chain_is_refused_in_words(line: str, says: str) -> None:
    with pytest.raises(WsiError, match=says):
        decode_chain(line, VIEW)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ics_version 1.0\n", "filename"),
        ("filename A-1\n", "no view"),
        ("filename A-1\nLEFT_CC LINES 400 PIXELS_PER_L", "line 2 is no whole view"),
    ],
)
def test_a_broken_header_is_refused_in_words(text: str, says: str) -> None:
    with pytest.raises(WsiError, match=says):
        parse_header(text)


def make_case(folder: Path, *, lesion: str = "MASS SHAPE OVAL") -> np.ndarray:
    folder.mkdir(parents=True)
    view = View("LEFT_CC", 60, 40, 12, 50.0, True)
    (folder / "A-1234-1.ics").write_text(header_text([view, View("LEFT_MLO", 60, 40, 12, 50.0, False)]))
    ring = np.array([(10, 20), (11, 20), (12, 21), (12, 22), (11, 23), (10, 23), (9, 22), (9, 21), (10, 20)])
    (folder / "A_1234_1.LEFT_CC.OVERLAY").write_text(overlay_text([ring], lesion))
    samples = (np.arange(60)[:, None] * 60 + np.arange(40)).astype(np.uint16)
    for name in ("LEFT_CC", "LEFT_MLO"):
        (folder / f"A_1234_1.{name}.LJPEG").write_bytes(imagecodecs.ljpeg_encode(samples, bitspersample=12))
    return samples


def test_a_case_becomes_its_views(tmp_path: Path) -> None:
    samples = make_case(tmp_path / "cases" / "A-1234-1")
    found = read_ddsm(tmp_path)
    left, other = found.images
    assert left.objects.boxes_xyxy.tolist() == [[9, 20, 13, 24]]  # pixel edges: the last pixel is in the box
    assert left.case == other.case == "A-1234-1"
    assert left.mpp_yx == (50.0, 50.0)
    assert len(other.objects) == 0
    np.testing.assert_array_equal(read_ljpeg(left.image), samples)


def test_what_is_no_mass_is_ignored(tmp_path: Path) -> None:
    make_case(tmp_path / "c", lesion="CALCIFICATION TYPE PLEOMORPHIC")
    assert read_ddsm(tmp_path).images[0].objects.ignored.tolist() == [True]


def test_a_converted_image_is_preferred(tmp_path: Path) -> None:
    make_case(tmp_path / "c")
    (tmp_path / "c" / "A_1234_1.LEFT_CC.png").write_bytes(b"")
    assert read_ddsm(tmp_path).images[0].image.suffix == ".png"


def test_an_image_that_does_not_fit_its_header_is_refused(tmp_path: Path) -> None:
    make_case(tmp_path / "c")
    image = tmp_path / "c" / "A_1234_1.LEFT_CC.LJPEG"
    image.write_bytes(imagecodecs.ljpeg_encode(np.zeros((60, 50), np.uint16), bitspersample=12))
    with pytest.raises(WsiError, match="decodes to 50 × 60 px, the header says 40 × 60"):
        read_ljpeg(image)
    image.write_bytes(image.read_bytes()[:40])
    with pytest.raises(WsiError, match="decoder does not take it"):
        read_ljpeg(image)


def test_swapped_bytes_are_put_right() -> None:
    view = View("LEFT_CC", 2, 2, 12, 50.0, True)
    samples = np.array([[1, 2], [3, 0x0FFF]], np.uint16)
    np.testing.assert_array_equal(checked_samples(samples.byteswap(), view, Path("x.LEFT_CC.LJPEG")), samples)
    with pytest.raises(WsiError, match="more than the 12 bits"):
        checked_samples(np.full((2, 2), 0xFFFF, np.uint16), view, Path("x.LEFT_CC.LJPEG"))


def test_a_missing_overlay_is_named(tmp_path: Path) -> None:
    make_case(tmp_path / "c")
    (tmp_path / "c" / "A_1234_1.LEFT_CC.OVERLAY").unlink()
    with pytest.raises(WsiError, match=r"LEFT_CC\.OVERLAY"):
        read_ddsm(tmp_path)
