"""VOC, COCO, YOLO and QuPath: one drawn truth, written four ways, read back the same."""

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from wsiengine.cli import main
from wsiengine.datasets.common import read_coco, read_qupath, read_voc, read_yolo, yaml_names
from wsiengine.datasets.images import read_pixels
from wsiengine.datasets.reading import read_detections, recognise
from wsiengine.datasets.rows import DetectionSet
from wsiengine.datasets.splitting import of_classes, split, with_folds
from wsiengine.errors import WsiError
from wsiengine.evaluating_objects import read_drawn

WIDTH, HEIGHT = 50, 40
TRUTH = {"a": [("Cell", (5, 10, 15, 30)), ("Burr", (20, 0, 50, 12))], "b": [("Cell", (1, 1, 4, 9))]}
CLASSES = ("Burr", "Cell")


def draw_images(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(TRUTH):
        y, x = np.indices((HEIGHT, WIDTH))
        cv2.imwrite(str(folder / f"{name}.png"), np.stack([y * 4, x * 4, y + x + k], axis=-1).astype(np.uint8))


def write_voc(folder: Path) -> Path:
    draw_images(folder / "JPEGImages")
    (folder / "Annotations").mkdir()
    for name, objects in TRUTH.items():
        body = "".join(
            f"<object><name>{c}</name><difficult>{int(c == 'Burr')}</difficult><bndbox><xmin>{x0 + 1}</xmin>"
            f"<ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for c, (x0, y0, x1, y1) in objects
        )
        text = f"<annotation><filename>{name}.png</filename>{body}</annotation>"
        (folder / "Annotations" / f"{name}.xml").write_text(text)
    return folder


def write_coco(folder: Path) -> Path:
    draw_images(folder / "images")
    said: dict = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "Burr"}, {"id": 9, "name": "Cell"}]}
    for k, (name, objects) in enumerate(TRUTH.items()):
        said["images"].append({"id": k, "file_name": f"{name}.png", "width": WIDTH, "height": HEIGHT})
        for c, (x0, y0, x1, y1) in objects:
            said["annotations"].append(
                {
                    "id": len(said["annotations"]),
                    "image_id": k,
                    "category_id": 7 if c == "Burr" else 9,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
                    "iscrowd": 0,
                }
            )
    (folder / "instances.json").write_text(json.dumps(said))
    return folder


def write_yolo(folder: Path) -> Path:
    draw_images(folder / "images")
    (folder / "labels").mkdir()
    for name, objects in TRUTH.items():
        lines = []
        for c, (x0, y0, x1, y1) in objects:
            middle, size = ((x0 + x1) / 2 / WIDTH, (y0 + y1) / 2 / HEIGHT), ((x1 - x0) / WIDTH, (y1 - y0) / HEIGHT)
            lines.append(f"{CLASSES.index(c)} {middle[0]} {middle[1]} {size[0]} {size[1]}")
        (folder / "labels" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (folder / "data.yaml").write_text("train: images\nnames:\n  0: Burr\n  1: 'Cell'\nnc: 2\n")
    return folder


def write_qupath(folder: Path) -> Path:
    draw_images(folder)
    for name, objects in TRUTH.items():
        features = [
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [[[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]]},
                "properties": {"objectType": "annotation", "classification": {"name": c}},
            }
            for c, (x0, y0, x1, y1) in objects
        ]
        features.append({"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 1]}, "properties": {}})
        (folder / f"{name}.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return folder


WRITERS = {"voc": write_voc, "coco": write_coco, "yolo": write_yolo, "qupath": write_qupath}


def objects_of(found: DetectionSet) -> dict[str, list[tuple[str, tuple[float, ...]]]]:
    return {
        row.image.stem: [
            (found.classes[k], tuple(np.round(box, 6).tolist()))
            for k, box in zip(row.objects.labels, row.objects.boxes_xyxy, strict=True)
        ]
        for row in found.images
    }


@pytest.mark.parametrize("form", WRITERS)
def test_every_format_is_recognised_and_says_the_same(form: str, tmp_path: Path) -> None:
    folder = WRITERS[form](tmp_path / form)
    assert recognise(folder) == form
    found = read_detections(folder)
    assert objects_of(found) == {name: [(c, tuple(map(float, b))) for c, b in rows] for name, rows in TRUTH.items()}
    for row in found.images:
        assert read_pixels(row.image).shape == (HEIGHT, WIDTH, 3)


def test_difficult_objects_and_crowds_are_ignored(tmp_path: Path) -> None:
    assert read_voc(write_voc(tmp_path / "v")).images[0].objects.ignored.tolist() == [False, True]
    file = write_coco(tmp_path / "c") / "instances.json"
    said = json.loads(file.read_text())
    said["annotations"][0]["iscrowd"] = 1
    said["annotations"][0]["segmentation"] = {"counts": [1, 2], "size": [3, 1]}
    file.write_text(json.dumps(said))
    found = read_coco(file).images[0].objects
    assert found.ignored.tolist() == [True, False]
    assert found.rings[0] is None


def test_yolo_polygons_are_outlines(tmp_path: Path) -> None:
    folder = write_yolo(tmp_path / "y")
    (folder / "labels" / "a.txt").write_text("1 0.1 0.25 0.3 0.25 0.2 0.75\n")
    found = read_yolo(folder).images[0].objects
    assert found.boxes_xyxy.tolist() == [[5, 10, 15, 30]]
    np.testing.assert_allclose(found.rings[0], [(5, 10), (15, 10), (10, 30)])


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("names: [a, 'b c']\n", ["a", "b c"]),
        ("x: 1\nnames:\n- a\n- b\nnc: 2", ["a", "b"]),
        ("names:\n  0: a\n  1: b\n", ["a", "b"]),
        ("nc: 1", []),
    ],
)
def test_yolo_class_names(text: str, names: list[str]) -> None:
    assert yaml_names(text) == names


def edit(pattern: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = next(folder.glob(pattern))
        file.write_text(change(file.read_text()))

    return apply


def image_gone(folder: Path) -> None:
    next(folder.rglob("a.png")).unlink()


BROKEN = [
    ("voc", edit("Annotations/a.xml", lambda t: t[:60]), "no whole VOC annotation"),
    ("voc", edit("Annotations/a.xml", lambda t: t.replace("<xmin>6</xmin>", "")), "no whole VOC annotation"),
    ("voc", edit("Annotations/a.xml", lambda t: '<!DOCTYPE x [<!ENTITY y "z">]>' + t), "entities"),
    ("voc", edit("Annotations/a.xml", lambda t: t.replace("a.png", "../../a.png")), "outside its own folder"),
    ("voc", edit("Annotations/a.xml", lambda t: t.replace("<xmax>15<", "<xmax>3<")), "ends before it starts"),
    ("voc", image_gone, "is not there"),
    ("coco", edit("*.json", lambda t: t[:100]), "no JSON"),
    ("coco", edit("*.json", lambda t: t.replace('"image_id": 1', '"image_id": 5')), "names image 5"),
    ("coco", edit("*.json", lambda t: t.replace('"category_id": 9', '"category_id": 1')), "category 1"),
    ("coco", image_gone, "is not there"),
    ("yolo", edit("labels/a.txt", lambda t: t.replace("0.2", "x", 1)), "no number"),
    ("yolo", edit("labels/a.txt", lambda t: "5 0.5 0.5 0.1 0.1"), "no class below 2"),
    ("yolo", edit("labels/a.txt", lambda t: "1 50 50 10 10 9"), "no class below 2"),
    ("yolo", lambda folder: (folder / "data.yaml").unlink(), "names the classes"),
    ("yolo", image_gone, "is not there"),
    ("qupath", edit("a.geojson", lambda t: t[:50]), "no JSON"),
    ("qupath", edit("a.geojson", lambda t: t.replace('"coordinates"', '"co"')), "no GeoJSON"),
    ("qupath", image_gone, "is not there"),
]


@pytest.mark.parametrize(("form", "spoil", "says"), BROKEN)
def test_broken_files_get_words(form: str, spoil: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    folder = WRITERS[form](tmp_path / form)
    spoil(folder)
    with pytest.raises(WsiError, match=says) as error:
        read_detections(folder)
    assert error.value.hint


def test_an_unknown_folder_names_the_formats(tmp_path: Path) -> None:
    with pytest.raises(WsiError, match="inbreast"):
        read_detections(tmp_path)
    with pytest.raises(WsiError, match="nothing at"):
        read_detections(tmp_path / "no")
    with pytest.raises(WsiError, match="no reader"):
        read_detections(tmp_path, "pascal")


def test_folds_are_read_and_keep_cases_together(tmp_path: Path) -> None:
    folder = write_qupath(tmp_path / "q")
    (folder / "folds.csv").write_text("image,fold,case\na.png,0,p1\nb.png,3,p2\n")
    found = read_qupath(folder)
    assert [(row.fold, row.case) for row in found.images] == [(0, "p1"), (3, "p2")]
    trained, tested = split(with_folds(found), 0)
    assert [row.image.stem for row in trained.images] == ["b"]
    assert [row.image.stem for row in tested.images] == ["a"]
    (folder / "folds.csv").write_text("image,fold,case\na.png,0,p1\nb.png,3,p1\n")
    with pytest.raises(WsiError, match="p1"):
        with_folds(read_qupath(folder))
    (folder / "folds.csv").write_text("image,fold\na.png,0\n")
    with pytest.raises(WsiError, match=r"b\.png no fold"):
        read_qupath(folder)


def test_classes_are_chosen_in_order(tmp_path: Path) -> None:
    found = of_classes(read_coco(write_coco(tmp_path) / "instances.json"), ["Cell"])
    assert objects_of(found) == {"a": [("Cell", (5.0, 10.0, 15.0, 30.0))], "b": [("Cell", (1.0, 1.0, 4.0, 9.0))]}
    with pytest.raises(WsiError, match="Sickle"):
        of_classes(found, ["Sickle"])


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "no column"), ("bild,abnormalit\u00e9".encode("latin-1"), "UTF-8")]
)
def test_tables_that_are_empty_or_in_another_encoding_get_words(tmp_path, content, says):
    (tmp_path / "labels.csv").write_bytes(content)
    for read in (lambda folder: read_detections(folder, "mias"), read_drawn):
        with pytest.raises(WsiError, match=says):
            read(tmp_path)


def test_yolo_text_in_another_encoding_and_boxes_without_area_get_words(tmp_path):
    for k, (line, says) in enumerate(
        [(b"0 .5 \xe9 .2 .2", "no text in UTF-8"), (b"0 .5 .5 0 .2", "ends before it starts")]
    ):
        write_yolo(tmp_path / str(k))
        (tmp_path / str(k) / "labels" / "a.txt").write_bytes(line)
        with pytest.raises(WsiError, match=says):
            read_detections(tmp_path / str(k))


def test_yolo_is_told_although_the_first_image_has_no_object(tmp_path):
    write_yolo(tmp_path)
    (tmp_path / "labels" / "a.txt").write_text("", encoding="utf-8")
    assert recognise(tmp_path) == "yolo"
    assert [len(row.objects) for row in read_detections(tmp_path).images] == [0, 1]


@pytest.mark.parametrize(("x", "radius"), [("nan", "5"), ("20", "-5"), ("20", "0")])
def test_circles_that_are_none_get_words(tmp_path, x, radius):
    table = f"file,patient,abnormality,x,y,radius\na.png,p,CIRC,{x},20,{radius}\n"
    (tmp_path / "labels.csv").write_text(table, encoding="utf-8")
    with pytest.raises(WsiError, match="ends before it starts"):
        read_detections(tmp_path, "mias")


@pytest.mark.parametrize("form", ["voc", "coco", "qupath"])
def test_boxes_beside_their_picture_are_named(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A little over the edge is how people draw; mostly beside the picture is another picture's, or another scale."""
    over = {"a": [("Cell", (45, 10, 54, 30))], "b": [("Burr", (1, 36, 4, 43))]}
    monkeypatch.setitem(globals(), "TRUTH", over)
    assert len(read_detections(WRITERS[form](tmp_path / "over")).images) == 2
    beside = {"a": [("Cell", (5, 10, 15, 30)), ("Cell", (60, 10, 70, 20))], "b": [("Burr", (46, 1, 60, 9))]}
    monkeypatch.setitem(globals(), "TRUTH", beside)
    folder = WRITERS[form](tmp_path / "beside")
    with pytest.raises(
        WsiError, match=r"2 boxes lie outside the picture: a\.png \(50 × 40 px\): x 60 to 70, y 10 to 20;"
    ):
        read_detections(folder)
    assert main(["evaluate", "--model", "rbc", "--data", str(folder)]) == 1
    assert "b.png (50 × 40 px): x 46 to 60, y 1 to 9" in capsys.readouterr().err
