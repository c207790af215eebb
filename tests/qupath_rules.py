"""What QuPath 0.5.1 and 0.7.0 both take, as a checker of files: independent of the code that writes them.

Rules found by running files through QuPath's own importer. One bad feature loses the whole file, hence every feature
is checked. ``check(path)`` returns what is wrong, in words; an empty list means that the file imports.
"""

import gzip
import json
import math
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import shapely

UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
GEOMETRIES = {"Polygon", "MultiPolygon", "Point", "MultiPoint", "LineString", "MultiLineString"}
OBJECT_TYPES = {"annotation", "detection", "tile"}
MAX_BYTES, MAX_OBJECTS = 300_000_000, 400_000
FLOAT32_MAX = 3.4028234663852886e38
SMALLEST_AREA = 0.01


def check(path: Path) -> list[str]:
    """Everything that is wrong with a file, in words."""
    data = path.read_bytes()
    packed = data[:2] == b"\x1f\x8b"
    if not path.name.endswith((".geojson", ".geojson.gz")):
        return [f"name: {path.name} is neither .geojson nor .geojson.gz"]
    if packed != path.name.endswith(".gz"):
        return ["name: gzip content and .gz name do not agree"]
    data = gzip.decompress(data) if packed else data
    problems = [f"file: {len(data)} bytes, QuPath needs at most {MAX_BYTES}"] if len(data) > MAX_BYTES else []
    try:
        content = json.loads(data.decode("utf-8"), parse_constant=_refuse, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        return [*problems, f"file: no JSON in UTF-8: {error}"]
    return problems + _check_collection(content, data)


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError(f"a key occurs twice among {[key for key, _ in pairs]}")
    return dict(pairs)


def _check_collection(content: Any, data: bytes) -> list[str]:
    if not isinstance(content, dict) or content.get("type") != "FeatureCollection":
        return ["collection: not one FeatureCollection (the import would give 0 objects)"]
    features = content.get("features")
    if not isinstance(features, list):
        return ["collection: no list of features"]
    problems = []
    if len(features) > MAX_OBJECTS:
        problems.append(f"collection: {len(features)} objects, at most {MAX_OBJECTS}")
    if b'", "' in data or b'": ' in data:
        problems.append("collection: not compact")
    seen: set[str] = set()
    for index, feature in enumerate(features):
        found = list(_check_feature(feature))
        if isinstance(feature, dict) and isinstance(feature.get("id"), str):
            if feature["id"] in seen:
                found.append("id: not unique")
            seen.add(feature["id"])
        problems += [f"feature {index}: {problem}" for problem in found]
    return problems


def _check_feature(feature: Any) -> Iterator[str]:
    if not isinstance(feature, dict) or feature.get("type") != "Feature":
        yield "type: not a Feature (would be skipped without an error)"
        return
    if _has_null({key: value for key, value in feature.items() if key != "geometry"}):
        yield "null: there must be none"
    if not isinstance(feature.get("id"), str) or not UUID.fullmatch(feature["id"]):
        yield f"id: {feature.get('id')!r} is no lower-case UUID"
    properties = feature.get("properties")
    if isinstance(properties, dict):
        yield from _check_properties(properties)
    else:
        yield "properties: not an object"
    geometry = feature.get("geometry")
    if isinstance(geometry, dict):
        yield from _check_geometry(geometry)
    else:
        yield "geometry: not an object (null fails)"


def _has_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_null(item) for item in value.values())
    if isinstance(value, list):
        return any(map(_has_null, value))
    return value is None


def _check_properties(properties: dict[str, Any]) -> Iterator[str]:
    kind = properties.get("objectType")
    if kind not in OBJECT_TYPES:
        yield f"objectType: {kind!r} would become an annotation"
    if kind == "detection" and "metadata" in properties:
        yield "metadata: not on detections"
    if "classification" in properties:
        yield from _check_classification(properties["classification"])
    if "isLocked" in properties and properties["isLocked"] is not True:
        yield "isLocked: true or absent"
    if "name" in properties and not isinstance(properties["name"], str):
        yield "name: a string or absent"
    measurements = properties.get("measurements", {})
    if not isinstance(measurements, dict):
        yield "measurements: not an object"
        return
    for name, value in measurements.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= FLOAT32_MAX:
            yield f"measurements: {name} is {value!r}, not a finite float32"


def _check_classification(classification: Any) -> Iterator[str]:
    if not isinstance(classification, dict):
        yield "classification: not an object"
        return
    name, colour = classification.get("name"), classification.get("color")
    if not isinstance(name, str) or not name.strip():
        yield "classification: no name"
    elif ":" in name or "\n" in name or "\r" in name:
        yield f"classification: ':' or a line break in {name!r}"
    if not (
        isinstance(colour, list)
        and len(colour) == 3
        and all(isinstance(c, int) and not isinstance(c, bool) and 0 <= c <= 255 for c in colour)
    ):
        yield f"classification: a name without [r, g, b] fails, got {colour!r}"


def _check_geometry(geometry: dict[str, Any]) -> Iterator[str]:
    kind, coordinates = geometry.get("type"), geometry.get("coordinates")
    if kind not in GEOMETRIES:
        yield f"geometry: {kind!r} is not taken"
        return
    if not isinstance(coordinates, list) or not coordinates:
        yield "geometry: no coordinates"
        return
    if kind.startswith("Multi") and len(coordinates) == 1:
        yield f"geometry: a {kind} of one part fails in 0.5"
    positions = list(_positions(coordinates))
    if not all(_is_position(position) for position in positions):
        yield "geometry: a position is not two finite numbers"
        return
    if not all(_two_decimals(value) for position in positions for value in position):
        yield "geometry: more than two decimals"
    if kind in ("Polygon", "MultiPolygon"):
        yield from _check_polygons([coordinates] if kind == "Polygon" else coordinates)


def _positions(coordinates: Any) -> Iterator[Any]:
    if isinstance(coordinates, list) and coordinates and isinstance(coordinates[0], list):
        for part in coordinates:
            yield from _positions(part)
    else:
        yield coordinates


def _is_position(position: Any) -> bool:
    return (
        isinstance(position, list)
        and len(position) == 2
        and all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in position)
    )


def _two_decimals(value: float) -> bool:
    return value == round(value, 2)


def _check_polygons(polygons: Any) -> Iterator[str]:
    parts = []
    for rings in polygons:
        if not isinstance(rings, list) or not rings:
            yield "geometry: a polygon without rings"
            return
        for ring in rings:
            if len(ring) < 4 or ring[0] != ring[-1]:
                yield f"geometry: a ring of {len(ring)} positions, closed: {ring[0] == ring[-1]}"
                return
            if abs(_area(ring)) < SMALLEST_AREA:
                yield f"geometry: a ring of {abs(_area(ring)):.4f} px²"
        parts.append(shapely.Polygon(rings[0], rings[1:]))
    whole = parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)
    if not whole.is_valid:
        yield f"geometry: invalid, {shapely.is_valid_reason(whole)}"
    elif shapely.set_precision(whole, 0.01).is_empty:
        yield "geometry: nothing is left on a grid of 0.01 px"


def _area(ring: list[list[float]]) -> float:
    """Signed area by the shoelace formula, about the first point (far offsets cost no digits)."""
    x0, y0 = ring[0]
    return sum((ax - x0) * (by - y0) - (bx - x0) * (ay - y0) for (ax, ay), (bx, by) in pairwise(ring)) / 2
