"""From QuPath annotations to a model to annotated slides: ``python examples/train_your_own.py DATA [ITERATIONS]``.

DATA is the folder of public research data (CONTRIBUTING.md says where it comes from). Five slides are laid together
from its GlaS fields, each of other patients: benign tissue on the left, carcinoma on the right. Four are annotated, as
one would in QuPath; a model learns from three of them and is tested on the fourth; then it annotates the fifth.

With slides of your own, begin at ``train``: a folder with ``a.svs`` and ``a.geojson``, ``b.svs`` and ``b.geojson``, …
"""

import csv
import json
import sys
from pathlib import Path

import cv2
import numpy as np

import wsiengine
from wsiengine.geometry import Box, Size
from wsiengine.slides.pyramid import PyramidLayout, write_pyramid
from wsiengine.training import run as train

MPP = 0.62  # of the GlaS fields
FIELD = Size(522, 775)
ZONE = Size(3 * FIELD.height, 2 * FIELD.width)
GLASS_PX = 160
LEFT = Box.of(ZONE, GLASS_PX, GLASS_PX)
RIGHT = Box.of(ZONE, GLASS_PX, 2 * GLASS_PX + ZONE.width)
SIZE = Size(ZONE.height + 2 * GLASS_PX, 2 * ZONE.width + 3 * GLASS_PX)
BENIGN = ("healthy", "adenomatous")


def lay_slide(path: Path, glas: Path, fold: int) -> None:
    """A slide of one fold's fields; folds share no patient."""
    with (glas / "labels.csv").open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if int(row["fold"]) == fold]
    pixels = np.full((*SIZE.shape, 3), 244, np.uint8)
    for zone, benign in ((LEFT, True), (RIGHT, False)):
        files = [glas / row["file"] for row in rows if (row["grade"] in BENIGN) == benign]
        for k, place in enumerate(zone.pieces(*FIELD.shape)):
            field = cv2.cvtColor(cv2.imread(str(files[k % len(files)])), cv2.COLOR_BGR2RGB)
            pixels[place.slices] = cv2.resize(field, (FIELD.width, FIELD.height), interpolation=cv2.INTER_AREA)
    write_pyramid(path, pixels, SIZE, MPP, PyramidLayout(downsamples=(1, 4)))


def annotate(path: Path) -> None:
    """What QuPath's File › Export objects as GeoJSON would write for two hand-drawn rectangles."""
    features = []
    for name, colour, zone in (("Benign", [0, 158, 115], LEFT), ("Carcinoma", [213, 94, 0], RIGHT)):
        box = zone.grow(-40)  # a hand leaves the edge out
        ring = [[box.x0, box.y0], [box.x1, box.y0], [box.x1, box.y1], [box.x0, box.y1], [box.x0, box.y0]]
        properties = {"objectType": "annotation", "classification": {"name": name, "color": colour}}
        geometry = {"type": "Polygon", "coordinates": [ring]}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")


def main(data: Path, iterations: int) -> None:
    slides = Path("slides")
    slides.mkdir(exist_ok=True)
    for fold in range(1, 5):
        lay_slide(slides / f"patients{fold}.svs", data / "crc" / "glas", fold)
        annotate(slides / f"patients{fold}.geojson")
    lay_slide(Path("new.svs"), data / "crc" / "glas", 0)

    recipe = {
        "name": "mymodel",
        "classes": ["Benign", "Carcinoma"],
        "freeze": "features",  # the backbone stays as ImageNet made it: minutes instead of an hour
        "iterations": iterations,
        "batch": 16,
        "tiles_per_slide": 60,
        "weights": str(data / "weights" / "mobilenet_v2_1.0_224_int8_ptq.tflite"),
    }
    Path("recipe.json").write_text(json.dumps(recipe, indent=1), encoding="utf-8")
    train("recipe.json", slides, "mymodel")

    result = wsiengine.infer("new.svs", "./mymodel", output="out")
    for name, mm2 in result.summary["area_mm2"].items():
        print(f"{name}: {mm2:.3f} mm²")
    print("drag into QuPath: out/annotations.geojson; about the model: mymodel/report.md")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int([*sys.argv[2:], "80"][0]))
