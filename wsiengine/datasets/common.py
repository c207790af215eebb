"""VOC XML, COCO JSON, YOLO text and QuPath GeoJSON: the formats that annotation programs write.

Images are looked for beside the annotations and in a folder ``images`` or ``JPEGImages`` next to them. ``folds.csv``
beside them, if there is one, has the columns ``image`` (or ``file``), ``fold`` and, if wanted, ``case`` (or
``patient``); without it every image is a case of its own.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from wsiengine.datasets.rows import Annotated, DetectionSet, Objects, bounds_xyxy, check_box, damaged
from wsiengine.datasets.sheets import read_sheet

IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".pgm", ".dcm")
_FOLDERS = (".", "images", "JPEGImages", "../images", "../JPEGImages")
_CLASS_FILES = ("classes.txt", "obj.names", "data.yaml", "dataset.yaml")


def read_voc(folder: Path) -> DetectionSet:
    """Pascal VOC: one XML file for each image; ``difficult`` objects are ignored.

    VOC counts pixels from 1 and includes the last: 1, 1, 10, 10 is the box (0, 0, 10, 10).

    Raises:
        WsiError: No XML file, or one that is cut or says no box.
    """
    files = sorted((folder / "Annotations").glob("*.xml")) or sorted(folder.glob("*.xml"))
    if not files:
        raise damaged(folder, "there is no .xml file in it, nor in Annotations/")
    said = [(file, *_voc(file)) for file in files]
    classes = sorted({name for *_, objects in said for name, _, _ in objects})
    rows = []
    for file, name, objects in said:
        made = Objects.of(
            [box for _, box, _ in objects],
            [classes.index(label) for label, _, _ in objects],
            ignored=[difficult for *_, difficult in objects],
        )
        rows.append(Annotated(find_image(file, name or file.stem), made, file.stem))
    return _with_folds(DetectionSet(tuple(classes), tuple(rows)), folder)


def _voc(file: Path) -> tuple[str, list[tuple[str, list[float], bool]]]:
    text = file.read_bytes()
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise damaged(file, "it declares entities, which annotations do not need", "remove the DOCTYPE")
    try:
        root = ElementTree.fromstring(text)
        objects = []
        for item in root.iter("object"):
            box = [float(item.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")]
            objects.append(
                (
                    item.findtext("name", "").strip(),
                    [box[0] - 1, box[1] - 1, box[2], box[3]],
                    item.findtext("difficult", "0").strip() == "1",
                )
            )
    except (ElementTree.ParseError, ValueError) as error:
        raise damaged(file, f"it is no whole VOC annotation ({error})") from error
    for name, box, _ in objects:
        if not name:
            raise damaged(file, "an object has no name")
        check_box(file, box)
    return root.findtext("filename", "").strip(), objects


def read_coco(file: Path) -> DetectionSet:
    """COCO JSON; polygons are kept, run-length masks give their box, crowds are ignored.

    Raises:
        WsiError: No COCO JSON, or an annotation that names an image or a category that is not there.
    """
    said = _json(file)
    try:
        categories = sorted(said["categories"], key=lambda c: c["id"])
        number = {c["id"]: i for i, c in enumerate(categories)}
        of_image: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in said["images"]}
        for entry in said["annotations"]:
            if entry["image_id"] not in of_image or entry["category_id"] not in number:
                what = f"names image {entry['image_id']} and category {entry['category_id']}"
                raise damaged(file, f"an annotation {what}, not both of which are listed", "list them, or remove it")
            of_image[entry["image_id"]].append(entry)
        rows = [
            Annotated(
                find_image(file, image["file_name"]), _coco(file, of_image[image["id"]], number), str(image["id"])
            )
            for image in said["images"]
        ]
        names = tuple(str(c["name"]) for c in categories)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(file, f"it is no whole COCO file: {error!r} is missing or wrong") from error
    named = tuple(replace(row, case=row.image.stem) for row in rows)
    return _with_folds(DetectionSet(names, named), file.parent)


def _coco(file: Path, entries: list[dict[str, Any]], number: dict[Any, int]) -> Objects:
    boxes, rings = [], []
    for entry in entries:
        x, y, width, height = map(float, entry["bbox"])
        boxes.append([x, y, x + width, y + height])
        check_box(file, boxes[-1])
        outline = entry.get("segmentation")
        polygons = outline if isinstance(outline, list) and outline else []
        largest = max(polygons, key=len, default=None)
        rings.append(np.array(largest, np.float64).reshape(-1, 2) if largest else None)
    labels = [number[entry["category_id"]] for entry in entries]
    return Objects.of(boxes, labels, ignored=[bool(e.get("iscrowd", 0)) for e in entries], rings=rings)


def read_yolo(folder: Path) -> DetectionSet:
    """YOLO: ``labels/N.txt`` beside ``images/N.*``; lines ``class cx cy w h`` or ``class x y x y …``, normalised.

    Class names come from ``classes.txt`` or ``obj.names`` (a name a line), or ``names`` in ``data.yaml``.

    Raises:
        WsiError: No class names, or a line that is not five numbers or a polygon, each from 0 to 1.
    """
    from wsiengine.datasets.images import read_pixels

    classes = _yolo_classes(folder)
    rows = []
    for file in sorted((folder / "labels").rglob("*.txt")):
        place = folder / "images" / file.relative_to(folder / "labels").with_suffix(".txt")
        image = find_image(place, file.stem)
        height, width = read_pixels(image).shape[:2]
        lines = [line.split() for line in _text(file).splitlines() if line.strip()]
        made = [_yolo_line(file, parts, len(classes), (width, height)) for parts in lines]
        objects = Objects.of([box for _, box, _ in made], [k for k, *_ in made], rings=[ring for *_, ring in made])
        rows.append(Annotated(image, objects, file.stem))
    if not rows:
        raise damaged(folder, "there is no labels/*.txt in it")
    return _with_folds(DetectionSet(classes, tuple(rows)), folder)


def _yolo_line(
    file: Path, parts: list[str], classes: int, size: tuple[int, int]
) -> tuple[int, list[float], np.ndarray | None]:
    try:
        label, values = int(parts[0]), [float(part) for part in parts[1:]]
    except ValueError as error:
        raise damaged(file, f"the line {' '.join(parts)[:40]!r} holds something that is no number") from error
    polygon = len(values) >= 6 and len(values) % 2 == 0
    if not 0 <= label < classes or not (polygon or len(values) == 4) or not all(0 <= v <= 1 for v in values):
        raise damaged(
            file, f"the line {' '.join(parts)[:40]!r} is no class below {classes} with a box or polygon from 0 to 1"
        )
    if polygon:
        ring = np.array(values).reshape(-1, 2) * size
        return label, list(bounds_xyxy(ring)), ring
    cx, cy, w, h = np.array(values) * (*size, *size)
    box = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
    check_box(file, box)
    return label, box, None


def _yolo_classes(folder: Path) -> tuple[str, ...]:
    for name in _CLASS_FILES:
        file = folder / name
        if not file.is_file():
            continue
        text = _text(file)
        found = yaml_names(text) if file.suffix == ".yaml" else [line.strip() for line in text.splitlines()]
        if names := tuple(name for name in found if name):
            return names
    raise damaged(folder, f"none of {', '.join(_CLASS_FILES)} names the classes", "write classes.txt, a name a line")


def yaml_names(text: str) -> list[str]:
    """The entry ``names`` of a YOLO ``data.yaml``: ``[a, b]``, a list with dashes, or ``0: a`` lines. No other YAML."""
    found = re.search(r"^names:[ \t]*(.*)$((?:\n(?:[ \t]+\S|-).*)*)", text, re.MULTILINE)
    if not found:
        return []
    inline, below = found[1].strip(), found[2].splitlines()
    entries = inline.strip("[]{} ").split(",") if inline else [line.strip().removeprefix("-") for line in below]
    return [re.sub(r"^\d+\s*:", "", entry.strip()).strip().strip("'\"") for entry in entries if entry.strip()]


def read_qupath(path: Path) -> DetectionSet:
    """QuPath GeoJSON: ``N.geojson`` for the image ``N.*``; classes whose name ends in ``*`` are ignored, as in QuPath.

    Objects without a class are left out, points too.

    Raises:
        WsiError: No such file, no GeoJSON, or nothing in it has a class.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.geojson"))
    if not files:
        raise damaged(path, "there is no .geojson file in it")
    said = [(file, list(_features(file))) for file in files]
    classes = sorted({name for _, objects in said for name, _ in objects if not name.endswith("*")})
    if not classes:
        raise damaged(path, "no object in it has a class", "set the class of each object in QuPath")
    rows = []
    for file, objects in said:
        labels = [0 if name.endswith("*") else classes.index(name) for name, _ in objects]
        boxes, rings = [bounds_xyxy(ring) for _, ring in objects], [ring for _, ring in objects]
        made = Objects.of(boxes, labels, ignored=[name.endswith("*") for name, _ in objects], rings=rings)
        rows.append(Annotated(find_image(file, file.name.removesuffix(".geojson")), made, file.stem))
    return _with_folds(DetectionSet(tuple(classes), tuple(rows)), files[0].parent)


def _features(file: Path) -> Iterable[tuple[str, np.ndarray]]:
    said = _json(file)
    features = said.get("features", []) if isinstance(said, dict) else said
    try:
        for feature in features:
            name = ((feature.get("properties") or {}).get("classification") or {}).get("name")
            geometry = feature["geometry"]
            polygons = {"Polygon": [geometry["coordinates"]], "MultiPolygon": geometry["coordinates"]}
            for polygon in polygons.get(geometry["type"], []):
                ring = np.array(polygon[0], np.float64)[:, :2]
                if name and len(ring) > 3 and np.isfinite(ring).all():
                    yield str(name), ring[:-1]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise damaged(file, f"it is no GeoJSON as QuPath writes it ({error})") from error


def find_image(beside: Path, name: str) -> Path:
    """The image of a name, or of a stem, near an annotation file.

    Raises:
        WsiError: There is none, or the name leads out of the folder.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise damaged(beside, f"it names the image {name}, outside its own folder", "copy the images beside it")
    for folder in _FOLDERS:
        place = beside.parent / folder / name
        if place.suffix.lower() in IMAGES and place.is_file():
            return place
        for suffix in IMAGES:
            for spelt in (suffix, suffix.upper()):
                if (candidate := place.with_name(place.name + spelt)).is_file():
                    return candidate
    raise damaged(beside, f"its image {name} is not there", "copy the images beside it, or into a folder `images`")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise damaged(file, f"it is no text in UTF-8 ({error})", "save it as UTF-8") from error


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(file, f"it is no JSON ({error})") from error


def _with_folds(found: DetectionSet, folder: Path) -> DetectionSet:
    table = folder / "folds.csv"
    if not table.is_file():
        return found
    said = {Path(row.get("image") or row.get("file") or "").stem: row for row in read_sheet(table)[1]}
    rows = []
    for row in found.images:
        entry = said.get(row.image.stem)
        if entry is None or not (entry.get("fold") or "").strip().isdigit():
            raise damaged(table, f"it gives {row.image.name} no fold", "give every image a whole number from 0")
        case = entry.get("case") or entry.get("patient") or row.case
        rows.append(replace(row, fold=int(entry["fold"]), case=case))
    return replace(found, images=tuple(rows))
