"""DDSM cases (Heath et al. 2000): the ``.ics`` header, ``.OVERLAY`` outlines and ``.LJPEG`` images.

A case is a folder with one ``.ics`` file. Its sequence lines name the views (``LEFT_CC`` …), their size, bits, µm per
pixel, and whether an ``.OVERLAY`` file belongs to the view. An overlay lists abnormalities; each has outlines: a start
(column, row), a chain of steps 0–7 clockwise from straight up, and ``#``.

Images are lossless JPEG (process 14) with samples in either byte order. What imagecodecs decodes, and what then fits
the header's size and bits, is read; everything else is refused in words. No original file was at hand when this was
written: where images are refused, convert them with DDSM's own tools to PNG or TIFF of the same name; such files are
taken instead if they lie beside.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wsiengine.datasets.rows import Annotated, DetectionSet, Objects, bounds_xyxy, damaged

STEPS_XY = np.array([(0, -1), (1, -1), (1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1)])
"""What each code of a chain adds to (x, y)."""
CLASSES = ("Mass",)
_CONVERTED = (".png", ".tif", ".tiff", ".pgm", ".jpg")
_VIEW = re.compile(
    r"^(?P<name>(LEFT|RIGHT)_(CC|MLO))\s+LINES\s+(?P<rows>\d+)\s+PIXELS_PER_LINE\s+(?P<cols>\d+)\s+"
    r"BITS_PER_PIXEL\s+(?P<bits>\d+)\s+RESOLUTION\s+(?P<um>\d+(\.\d+)?)\s+(?P<overlay>OVERLAY|NON_OVERLAY)\s*$"
)


@dataclass(frozen=True, slots=True)
class View:
    """One image of a case, as the header states it: ``rows`` × ``cols`` px of ``um`` µm, ``bits`` deep."""

    name: str
    rows: int
    cols: int
    bits: int
    um: float
    overlay: bool


@dataclass(frozen=True, slots=True)
class Header:
    """What an ``.ics`` file says: its views, and the other entries by keyword (``PATIENT_AGE``, ``DENSITY`` …)."""

    filename: str
    views: tuple[View, ...]
    entries: dict[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class Abnormality:
    """One finding: facts by keyword (``PATHOLOGY``, ``ASSESSMENT`` …), its lesion types, its outlines.

    Each outline is (K, 2) int64, columns and rows of border pixels; the first is the boundary, others are cores.
    """

    lesions: tuple[str, ...]
    facts: dict[str, str]
    outlines: tuple[np.ndarray, ...]


def read_ddsm(folder: Path) -> DetectionSet:
    """All cases below a folder; masses are objects, other abnormalities are ignored.

    Raises:
        WsiError: No case, or a file of one is damaged.
    """
    headers = sorted(folder.rglob("*.ics"))
    if not headers:
        raise damaged(folder, "there is no .ics file below it", "give the folder that holds the cases")
    return DetectionSet(CLASSES, tuple(row for file in headers for row in _case(file)))


def _case(file: Path) -> Iterator[Annotated]:
    header = parse_header(file.read_text(encoding="latin-1"), file)
    for view in header.views:
        stem = f"{header.filename.replace('-', '_')}.{view.name}"
        findings: tuple[Abnormality, ...] = ()
        if view.overlay:
            overlay = file.with_name(f"{stem}.OVERLAY")
            if not overlay.is_file():
                raise damaged(overlay, f"there is no such file, but {file.name} says that {view.name} has an overlay")
            findings = parse_overlay(overlay.read_text(encoding="latin-1"), view, overlay)
        facts = {"view": view.name, **header.entries, "findings": [f.facts | {"lesions": f.lesions} for f in findings]}
        objects = Objects.of(
            [_box(f.outlines[0]) for f in findings],
            [0] * len(findings),
            ignored=[not any(lesion.startswith("MASS") for lesion in f.lesions) for f in findings],
            rings=[f.outlines[0] + 0.5 for f in findings],
        )
        image = file.with_name(f"{stem}.LJPEG")
        beside = [image.with_suffix(s) for s in _CONVERTED if image.with_suffix(s).is_file()]
        yield Annotated(beside[0] if beside else image, objects, header.filename, mpp_yx=(view.um,) * 2, facts=facts)


def _box(outline: np.ndarray) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = bounds_xyxy(outline)
    return x0, y0, x1 + 1.0, y1 + 1.0


def parse_header(text: str, file: Path = Path("case.ics")) -> Header:
    """An ``.ics`` header.

    Args:
        text: The file's text.
        file: Named in errors.

    Raises:
        WsiError: No file name, no views, or a line of a view that is cut or malformed.
    """
    entries: dict[str, str] = {}
    views = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line.startswith(("LEFT_", "RIGHT_")):
            if (found := _VIEW.match(line)) is None:
                raise damaged(file, f"line {number} is no whole view: {line[:70]!r}")
            rows, cols, bits = (int(found[name]) for name in ("rows", "cols", "bits"))
            views.append(View(found["name"], rows, cols, bits, float(found["um"]), found["overlay"] == "OVERLAY"))
        elif line:
            keyword, _, rest = line.partition(" ")
            entries[keyword] = rest.strip()
    if not entries.get("filename"):
        raise damaged(file, "it has no line `filename`")
    if not views:
        raise damaged(file, "it names no view (LEFT_CC, LEFT_MLO, RIGHT_CC, RIGHT_MLO)")
    return Header(entries.pop("filename"), tuple(views), entries)


def parse_overlay(text: str, view: View, file: Path = Path("view.OVERLAY")) -> tuple[Abnormality, ...]:
    """The abnormalities of an ``.OVERLAY`` file.

    Args:
        text: The file's text.
        view: Its image: outlines must lie in it.
        file: Named in errors.

    Raises:
        WsiError: Truncated, fewer abnormalities or outlines than announced, or a chain that leaves the image.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    announced = _announced(lines[0] if lines else "", "TOTAL_ABNORMALITIES", file)
    starts = [i for i, line in enumerate(lines) if re.fullmatch(r"ABNORMALITY\s+\d+", line)]
    if len(starts) != announced:
        raise damaged(file, f"it announces {announced} abnormalities and holds {len(starts)}: it is cut or damaged")
    ends = [*starts[1:], len(lines)]
    return tuple(_abnormality(lines[a + 1 : b], view, file) for a, b in zip(starts, ends, strict=True))


def _abnormality(lines: list[str], view: View, file: Path) -> Abnormality:
    lesions, facts, outlines = [], {}, []
    total = None
    for i, line in enumerate(lines):
        keyword, _, rest = line.partition(" ")
        if keyword == "LESION_TYPE":
            lesions.append(rest.strip())
        elif keyword == "TOTAL_OUTLINES":
            total = _announced(line, keyword, file)
        elif keyword in ("BOUNDARY", "CORE"):
            outlines.append(decode_chain(lines[i + 1] if i + 1 < len(lines) else "", view, file))
        elif keyword.isupper():
            facts[keyword] = rest.strip()
    if total is None or total < 1 or len(outlines) != total:
        raise damaged(file, f"it announces {total or 'no'} outlines and holds {len(outlines)}: it is cut or damaged")
    return Abnormality(tuple(lesions), facts, tuple(outlines))


def _announced(line: str, keyword: str, file: Path) -> int:
    found = re.fullmatch(rf"{keyword}\s+(\d+)", line)
    if found is None:
        raise damaged(file, f"needed `{keyword} N`, got {line[:40]!r}")
    return int(found[1])


def decode_chain(line: str, view: View, file: Path = Path("view.OVERLAY")) -> np.ndarray:
    """The border pixels of an outline: (K, 2) int64 columns and rows, the start first.

    Args:
        line: Start column, start row, codes 0–7, and ``#``.
        view: The image that it must lie in.
        file: Named in errors.

    Raises:
        WsiError: No ``#`` (the file is cut), something that is no code, or a step out of the image.
    """
    parts = line.split()
    if not parts or parts[-1] != "#":
        raise damaged(file, "an outline does not end in #: the file is truncated")
    if len(parts) < 3 or not all(part.isdigit() for part in parts[:-1]):
        raise damaged(file, f"an outline is {line[:40]!r}, needed column, row, codes 0 to 7, #")
    numbers = np.array([int(part) for part in parts[:-1]], np.int64)
    codes = numbers[2:]
    if (codes > 7).any():
        raise damaged(file, f"an outline has the code {int(codes.max())}, needed 0 to 7")
    points = np.vstack([numbers[:2], numbers[:2] + np.cumsum(STEPS_XY[codes], axis=0)])
    if (points < 0).any() or (points >= (view.cols, view.rows)).any():
        raise damaged(file, f"an outline leaves the image of {view.cols} × {view.rows} px")
    return points


def read_ljpeg(file: Path) -> np.ndarray:
    """The samples of a lossless JPEG, uint16 (rows, cols), checked against the header beside it.

    Raises:
        WsiError: No decoder takes it, or what comes out has another size or more bits than the header says.
    """
    import imagecodecs

    headers = list(file.parent.glob("*.ics"))
    if len(headers) != 1:
        raise damaged(file, f"{len(headers)} .ics headers lie beside it, needed one, for its size and bits")
    header = parse_header(headers[0].read_text(encoding="latin-1"), headers[0])
    view = next((v for v in header.views if file.name.split(".")[-2] == v.name), None)
    if view is None:
        raise damaged(file, f"{headers[0].name} does not name its view")
    convert = "convert it to PNG or TIFF with DDSM's own tools and put that beside it"
    try:
        samples = np.squeeze(imagecodecs.ljpeg_decode(file.read_bytes()))
    except (imagecodecs.LjpegError, ValueError) as error:
        raise damaged(file, f"the lossless-JPEG decoder does not take it ({error})", convert) from error
    return checked_samples(samples, view, file)


def checked_samples(samples: np.ndarray, view: View, file: Path) -> np.ndarray:
    """Samples of the size and bits that the header states, their bytes swapped where only that fits.

    Raises:
        WsiError: They fit in neither order.
    """
    convert = "convert it to PNG or TIFF with DDSM's own tools and put that beside it"
    if samples.shape != (view.rows, view.cols):
        got = " × ".join(map(str, samples.shape[::-1]))
        raise damaged(file, f"it decodes to {got} px, the header says {view.cols} × {view.rows}", convert)
    for candidate in (samples.astype(np.uint16), samples.astype(np.uint16).byteswap()):
        if int(candidate.max()) < 1 << view.bits:
            return candidate
    raise damaged(file, f"its values need more than the {view.bits} bits of the header, in either byte order", convert)
