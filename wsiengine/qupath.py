"""QuPath objects and their file: one GeoJSON FeatureCollection, written as a stream.

QuPath's import is all or nothing, so the writer only lets through what every version from 0.5 takes: valid geometry
on a 0.01 px grid, a colour for every class, finite measurements, no ``null``. shapely geometries hold (x, y), as
GeoJSON does; arrays become (x, y) where geometries are made, in :mod:`wsiengine.polygons`.
"""

import gzip
import json
import math
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import shapely
from shapely.affinity import translate
from shapely.geometry import shape

from wsiengine.errors import OutputError
from wsiengine.polygons import clean

_HEAD, _TAIL = b'{"type":"FeatureCollection","features":[', b"]}\n"
_BATCH = 2048  # objects cleaned and serialised at a time
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_WHOLE = re.compile(r"\.0(?=[,\]])")
_NAMESPACE = uuid.UUID("6f0c1c62-5d0e-5f0b-9d53-1f2a7c0e8a41")  # of this package's ids; any fixed value would do


@dataclass(frozen=True, eq=False)
class Annotation:
    """One object on the slide.

    Attributes:
        id: Lower-case UUID.
        class_name: None for an object without class.
        colour: Red, green, blue of the class, 0–255.
        geometry: shapely Polygon or MultiPolygon, level-0 pixels from the slide's corner, x right, y down.
        measurements: Numbers by name; those that are not finite are not written.
        object_type: ``annotation``, ``detection`` or ``tile``, as QuPath means them.
        name: Shown by QuPath beside the object.
        locked: QuPath asks before it is edited.
    """

    id: str
    class_name: str | None
    colour: tuple[int, int, int]
    geometry: Any
    measurements: Mapping[str, float] = field(default_factory=dict)
    object_type: str = "annotation"
    name: str | None = None
    locked: bool = False


@dataclass(frozen=True, slots=True)
class FileLimits:
    """When to begin another file: QuPath needs 10 to 13 times a file's bytes as memory."""

    objects: int = 400_000
    size_bytes: int = 300_000_000


def make_ids(geometries: np.ndarray, class_names: Iterable[str | None], run: tuple[str, str]) -> list[str]:
    """Ids that are the same in every run of the same work: uuid5 of fingerprint, identity, class and outline.

    Args:
        geometries: Polygons in level-0 pixels; the outline counts wherever its ring begins.
        class_names: Of each.
        run: Fingerprint of the slide, identity of the run.
    """
    outlines = shapely.to_wkb(shapely.normalize(shapely.get_exterior_ring(geometries)), hex=True, byte_order=1)
    seen: dict[tuple[str, str], int] = {}
    ids = []
    for outline, name in zip(outlines, class_names, strict=True):
        key = (name or "", outline or "")
        seen[key] = again = seen.get(key, -1) + 1  # the same outline twice: number the copies
        ids.append(str(uuid.uuid5(_NAMESPACE, "\n".join((*run, *key, str(again))))))
    return ids


def write_geojson(
    annotations: Iterable[Annotation],
    path: Path,
    *,
    offset_l0: tuple[float, float] = (0, 0),
    limits: FileLimits = FileLimits(),
) -> list[Path]:
    """Write objects for QuPath; nothing appears under ``path`` before it is complete.

    Objects that have no area once they are repaired and rounded to 0.01 px are left out, as QuPath would refuse the
    whole file for one of them. What does not fit ``limits`` goes on in ``<name>.part2.geojson`` and so on; parts that
    an earlier, larger export left there are removed.

    Args:
        annotations: Any iterable: it is consumed as a stream.
        path: ``….geojson`` or ``….geojson.gz``.
        offset_l0: (y, x) subtracted from all coordinates: the corner of the slide's scanned bounds, where QuPath
            puts its origin.
        limits: Largest single file.

    Returns:
        The files written, ``path`` first.

    Raises:
        ValueError: Another file name; a class name that QuPath cannot take.
        OutputError: The file cannot be written.
    """
    path = Path(path)
    stem, suffix = _split_name(path)
    features = _features(annotations, offset_l0)
    written: list[Path] = []
    try:
        pending = next(features, None)
        while pending is not None or not written:
            part = path if not written else path.with_name(f"{stem}.part{len(written) + 1}{suffix}")
            with _packed(part) as file:
                pending = _write_collection(file, pending, features, limits)
            written.append(part)
        _remove_stale(path, stem, suffix, len(written))
    except OSError as error:
        raise OutputError(
            f"Could not write {path.name}: {error.strerror or error}.",
            hint="check that the folder is writable and the disk has room.",
        ) from error
    return written


def read_geojson(path: Path, *, offset_l0: tuple[float, float] = (0, 0)) -> list[Annotation]:
    """The objects of a file of ours, or of one that QuPath saved; further parts of a split export included.

    Args:
        path: ``….geojson`` or ``….geojson.gz``.
        offset_l0: (y, x) added to all coordinates: what :func:`write_geojson` subtracted.

    Raises:
        OutputError: A file is missing or is no JSON.
    """
    path = Path(path)
    stem, suffix = _split_name(path)
    found: list[Annotation] = []
    part, number = path, 1
    while number == 1 or part.exists():
        opener = gzip.open if suffix.endswith(".gz") else open
        try:
            with opener(part, "rb") as file:
                content = json.load(file)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputError(f"{part} cannot be read: {reason}.", hint="`wsiengine export` writes it anew.") from error
        features = content["features"] if isinstance(content, dict) else content
        found += [_parse(feature, offset_l0) for feature in features]
        number += 1
        part = path.with_name(f"{stem}.part{number}{suffix}")
    return found


def _split_name(path: Path) -> tuple[str, str]:
    for suffix in (".geojson", ".geojson.gz"):
        if path.name.endswith(suffix) and path.name != suffix:
            return path.name.removesuffix(suffix), suffix
    raise ValueError(f"an export for QuPath is named .geojson or .geojson.gz, not {path.name!r}")


def _write_collection(file: IO[bytes], first: bytes | None, features: Iterator[bytes], limits: FileLimits) -> Any:
    """Write one collection → the feature that no longer fitted, or None at the end."""
    file.write(_HEAD)
    objects, size = 0, len(_HEAD) + len(_TAIL)
    feature = first
    while feature is not None:
        if objects and (objects == limits.objects or size + len(feature) + 1 > limits.size_bytes):
            break
        file.write(b"," + feature if objects else feature)
        objects, size = objects + 1, size + len(feature) + 1
        feature = next(features, None)
    file.write(_TAIL)
    return feature


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its name, synced to disk, only when it is complete."""
    draft = path.with_name(path.name + ".tmp")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _packed(path: Path) -> Iterator[IO[bytes]]:
    """As :func:`replacing`, gzipped where the name says so: without name or time inside, so that bytes repeat."""
    with replacing(path) as file:
        if not path.name.endswith(".gz"):
            yield file
            return
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=6) as packed:
            yield packed  # type: ignore[misc]


def _remove_stale(path: Path, stem: str, suffix: str, count: int) -> None:
    while (stale := path.with_name(f"{stem}.part{count + 1}{suffix}")).exists():
        stale.unlink()
        count += 1


def _features(annotations: Iterable[Annotation], offset_l0: tuple[float, float]) -> Iterator[bytes]:
    """Each object as one GeoJSON feature, cleaned by the batch."""
    stream = iter(annotations)
    shift = np.array([offset_l0[1], offset_l0[0]], np.float64)
    while batch := list(islice(stream, _BATCH)):
        geometries = np.array([None] * len(batch), object)
        geometries[:] = [annotation.geometry for annotation in batch]
        if shift.any():
            geometries = shapely.transform(geometries, lambda xy: xy - shift)
        geometries = clean(geometries)
        for annotation, text in zip(batch, shapely.to_geojson(geometries), strict=True):
            if text is not None:
                yield _feature(annotation, text)


def _feature(annotation: Annotation, geometry: str) -> bytes:
    properties: dict[str, Any] = {"objectType": annotation.object_type}
    if annotation.class_name is not None:
        properties["classification"] = {
            "name": _class_name(annotation.class_name),
            "color": [int(channel) for channel in annotation.colour],
        }
    if annotation.name is not None:
        properties["name"] = annotation.name
    if annotation.locked:
        properties["isLocked"] = True
    numbers = {name: _number(value) for name, value in annotation.measurements.items()}
    properties["measurements"] = {name: value for name, value in numbers.items() if value is not None}
    text = json.dumps(properties, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # "<" only ever stands inside strings here: escaped, it is still the same string, and harmless in a web page.
    text = text.replace("<", "\\u003c").replace(">", "\\u003e")
    geometry = _WHOLE.sub("", geometry)
    whole = f'{{"type":"Feature","id":"{annotation.id}","geometry":{geometry},"properties":{text}}}'
    return whole.encode("utf-8", "replace")


def _class_name(name: str) -> str:
    if not name.strip() or any(char in name for char in ":\n\r"):
        raise ValueError(f"QuPath cannot take the class name {name!r}: it must be text without ':' or line breaks")
    return name


def _number(value: float) -> float | int | None:
    """A value as QuPath's float32 keeps it, written short; None where it is not finite."""
    value = float(value)
    if not math.isfinite(value) or abs(value) > _FLOAT32_MAX:
        return None
    value = float(f"{value:.7g}")
    return int(value) if value.is_integer() and abs(value) < 1e15 else value


def _parse(feature: Mapping[str, Any], offset_l0: tuple[float, float]) -> Annotation:
    properties = feature.get("properties") or {}
    classification = properties.get("classification") or {}
    return Annotation(
        id=str(feature.get("id", "")),
        class_name=classification.get("name"),
        colour=_colour(classification),
        geometry=translate(shape(feature["geometry"]), xoff=offset_l0[1], yoff=offset_l0[0]),
        measurements=dict(properties.get("measurements") or {}),
        object_type=properties.get("objectType", "annotation"),
        name=properties.get("name"),
        locked=bool(properties.get("isLocked", False)),
    )


def _colour(classification: Mapping[str, Any]) -> tuple[int, int, int]:
    if "color" in classification:
        red, green, blue = (int(channel) for channel in classification["color"][:3])
        return red, green, blue
    packed = int(classification.get("colorRGB", 0x808080))  # how older versions of QuPath saved it
    return packed >> 16 & 255, packed >> 8 & 255, packed & 255
