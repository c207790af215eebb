"""Mammograms in DICOM files, and the two sets that come as such: INbreast and CBIS-DDSM.

Needs pydicom (``pip install wsiengine[dicom]``); compressed files need what pydicom itself asks for.
"""

import io
import os
import plistlib
import re
import xml.parsers.expat
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from wsiengine.datasets.rows import Annotated, DetectionSet, Objects, bounds_xyxy, damaged
from wsiengine.datasets.sheets import read_sheet
from wsiengine.errors import DependencyError

MASS = ("Mass",)
_POINT = re.compile(r"^\(\s*(-?\d+(?:\.\d+)?)\s*,\s*(-?\d+(?:\.\d+)?)\s*\)$")


@dataclass(frozen=True, slots=True, eq=False)
class DicomImage:
    """Grey samples (rows, cols), uint8 or uint16, bright = dense tissue; µm per pixel (y, x) where stated."""

    pixels: np.ndarray
    mpp_yx: tuple[float, float] | None


def read_dicom(file: Path) -> DicomImage:
    """One grey image.

    Raises:
        DependencyError: pydicom is not installed.
        WsiError: Damaged, no single grey image, or compressed in a way that is not decoded here.
    """
    pydicom = _pydicom()
    try:
        with _open(file) as opened:
            data = pydicom.dcmread(opened)
        samples = data.pixel_array
    except (RuntimeError, NotImplementedError, KeyError) as error:
        raise damaged(
            file, f"its compression is not decoded here ({str(error)[:120]})", "decompress it with dcmdjpeg"
        ) from error
    except Exception as error:  # pydicom meets damage with errors of any type
        raise damaged(file, f"it is no whole DICOM image ({str(error)[:120]})") from error
    if samples.ndim != 2:
        raise damaged(file, f"its pixels have the shape {samples.shape}, needed one grey image", "split it first")
    if data.get("PhotometricInterpretation", "MONOCHROME2") == "MONOCHROME1":
        samples = (int(samples.max()) + int(samples.min())) - samples.astype(np.int64)
    low = min(0, int(samples.min()))
    depth = np.uint8 if int(samples.max()) - low < 256 else np.uint16
    return DicomImage((samples.astype(np.int64) - low).astype(depth), _spacing(data))


def is_grey_image(file: Path) -> bool:
    """Whether a DICOM file says that it holds one grey image; False where its head, or pydicom, cannot be read."""
    try:
        pydicom = _pydicom()
    except DependencyError:
        return False
    try:
        with _open(file) as opened:
            head = pydicom.dcmread(opened, stop_before_pixels=True)
        frames, samples = int(head.get("NumberOfFrames") or 1), int(head.get("SamplesPerPixel") or 0)
    except Exception:  # of any type, where it is damaged
        return False
    return frames == 1 and samples == 1


class _Bounded(io.BufferedReader):
    """A file that is never asked for more than it has left.

    pydicom reads as many bytes as a length in the file says; of a damaged one that is up to 4 GiB, for which Python
    finds the memory before it looks at the file.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, os.fstat(self.fileno()).st_size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def _open(file: Path) -> _Bounded:
    return _Bounded(io.FileIO(file))


def _pydicom() -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise DependencyError("DICOM images need pydicom", hint="pip install wsiengine[dicom]") from error
    return pydicom


def _spacing(data: Any) -> tuple[float, float] | None:
    said = data.get("PixelSpacing") or data.get("ImagerPixelSpacing")
    return (float(said[0]) * 1000, float(said[1]) * 1000) if said else None


def read_inbreast(folder: Path) -> DetectionSet:
    """INbreast (Moreira et al. 2012): ``AllDICOMs/ID_PATIENT_….dcm`` and ``AllXML/ID.xml``, Apple property lists.

    Masses are objects; other findings are ignored. Images without an XML file have no finding. Files whose name starts
    with a dot are left out.

    Raises:
        WsiError: No DICOM file, or a damaged XML file.
    """
    images = sorted(p for p in folder.rglob("*.dcm") if not p.name.startswith("."))
    if not images:
        raise damaged(folder, "there is no .dcm file below it", "give the folder that holds AllDICOMs and AllXML")
    outlines = {p.stem: p for p in folder.rglob("*.xml") if not p.name.startswith(".")}
    rows = []
    for image in images:
        name, _, rest = image.stem.partition("_")
        objects = read_plist(outlines[name]) if name in outlines else Objects.of([], [])
        rows.append(Annotated(image, objects, rest.split("_")[0] or name))
    return DetectionSet(MASS, tuple(rows))


def read_plist(file: Path) -> Objects:
    """The regions of an INbreast XML file.

    Raises:
        WsiError: No property list, or a region without points or with something that is no point.
    """
    try:
        said = plistlib.loads(file.read_bytes(), fmt=plistlib.FMT_XML)
        regions = [region for image in said["Images"] for region in image["ROIs"]]
        named = [(str(region["Name"]), [str(p) for p in region["Point_px"]]) for region in regions]
    except (plistlib.InvalidFileException, xml.parsers.expat.ExpatError, KeyError, TypeError, ValueError) as error:
        raise damaged(file, f"it is no whole property list with Images, ROIs, Name and Point_px ({error})") from error
    boxes, rings, ignored = [], [], []
    for name, points in named:
        found = [_POINT.match(point) for point in points]
        if not points or None in found:
            raise damaged(file, f"the region {name!r} has {'a broken point' if points else 'no points'}")
        ring = np.array([(float(p[1]), float(p[2])) for p in found if p])
        x0, y0, x1, y1 = bounds_xyxy(ring)
        boxes.append((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))
        rings.append(ring if len(ring) > 2 else None)
        ignored.append(name.strip().lower() != "mass")
    return Objects.of(boxes, [0] * len(boxes), ignored=ignored, rings=rings)


def read_cbis(folder: Path) -> DetectionSet:
    """CBIS-DDSM (Lee et al. 2017): ``mass_case_description_*.csv`` and the DICOM files that they name.

    Paths in the tables are those of the archive; where they are not there, the DICOM files below the path's first
    folder are looked through. The mask is the file of the image's size: crops and masks are exchanged in some rows.

    Raises:
        WsiError: No table, a missing column, or an image or mask that is not there.
    """
    tables = sorted(folder.rglob("*case_description*.csv"))
    if not tables:
        raise damaged(folder, "there is no *case_description*.csv below it")
    found: dict[Path, list[dict[str, str]]] = defaultdict(list)
    for table in tables:
        for row in _table(table, ("patient_id", "abnormality type", "image file path", "ROI mask file path")):
            found[_first(folder, row["image file path"], table)].append(row)
    images = []
    for image, rows in found.items():
        picture = read_dicom(image)
        outlines = [_mask_ring(folder, row, picture.pixels.shape) for row in rows]
        objects = Objects.of(
            [bounds_xyxy(ring) for ring in outlines],
            [0] * len(rows),
            ignored=[row["abnormality type"] != "mass" for row in rows],
            rings=outlines,
        )
        images.append(Annotated(image, objects, rows[0]["patient_id"], mpp_yx=picture.mpp_yx, facts={"rows": rows}))
    return DetectionSet(MASS, tuple(images))


def _table(file: Path, needed: Iterable[str]) -> list[dict[str, str]]:
    names, rows = read_sheet(file)
    if missing := sorted(set(needed) - set(names)):
        raise damaged(file, f"it has no column {', '.join(missing)}")
    return [{name: value.strip() for name, value in row.items()} for row in rows]


def _files(folder: Path, path: str) -> list[Path]:
    """The file of a table's path, or all DICOM files below the first folder that it names; never outside ``folder``."""
    inside = (folder / path).resolve()
    if not inside.is_relative_to(folder.resolve()):
        return []
    return [inside] if inside.is_file() else sorted((folder / Path(path).parts[0]).rglob("*.dcm")) if path else []


def _first(folder: Path, path: str, table: Path) -> Path:
    files = _files(folder, path)
    if not files:
        raise damaged(table, f"it names {path}, which is not there", "copy the images beside the tables")
    return files[0]


def _mask_ring(folder: Path, row: dict[str, str], shape: tuple[int, ...]) -> np.ndarray:
    path = row["ROI mask file path"]
    sizes = []
    for file in _files(folder, path):
        mask = read_dicom(file).pixels
        sizes.append(" × ".join(map(str, mask.shape[::-1])))
        if mask.shape == shape and mask.any():
            edges, _ = cv2.findContours((mask > 0).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            border = max(edges, key=cv2.contourArea)[:, 0].astype(np.float64)
            middle = border.mean(axis=0)
            return border + np.where(border > middle, 1.0, 0.0)  # out to the edges of the border pixels
    raise damaged(
        folder / path,
        f"no mask of the image's size {shape[1]} × {shape[0]} px: found {', '.join(sizes) or 'no file'}",
        "copy the mask files of this case again",
    )
