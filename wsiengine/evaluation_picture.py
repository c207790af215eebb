"""The picture of an evaluation: who was taken for whom, and how far probabilities can be believed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from wsiengine.evaluation_tables import words


def draw(found: Mapping[str, Any], path: Path) -> None:
    """A picture of a report: confusion matrix (rows: truth) and reliability, by image or, of slides, by slide."""
    level = next(name for name in ("image", "slide", "cell", "tile") if name in found)
    part, classes = found[level], found["classes"]
    font, small = ImageFont.load_default(18), ImageFont.load_default(14)
    side, left, top = 96, 230, 110
    columns = [*classes, "no answer"]
    plot = 360
    width = left + side * len(columns) + 90 + plot + 40
    height = max(top + side * len(classes) + 60, top + plot + 60)
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((20, 16), f"By {level}: rows are the truth, columns the answer", "black", font)
    for k, name in enumerate(columns):
        pen.text((left + side * k + 4, top - 40 + 18 * (k % 2)), name[:18], "black", small)
    for y, counts in enumerate(part["confusion"]):
        pen.text((20, top + side * y + side // 2 - 10), classes[y][:24], "black", small)
        for x, count in enumerate(counts):
            share = count / max(1, sum(counts))
            shade = tuple(round(255 - share * (255 - c)) for c in (0, 114, 178))
            box = (left + side * x, top + side * y, left + side * (x + 1) - 3, top + side * (y + 1) - 3)
            pen.rectangle(box, shade)
            pen.text((box[0] + 10, box[1] + 28), f"{count}", "white" if share > 0.5 else "black", font)
            pen.text((box[0] + 10, box[1] + 54), f"{100 * share:.0f} %", "white" if share > 0.5 else "black", small)
    x0 = left + side * len(columns) + 70
    pen.text((x0, 16), "Reliability: claimed (across) against found (up)", "black", small)
    pen.rectangle((x0, top, x0 + plot, top + plot), outline="black")
    pen.line((x0, top + plot, x0 + plot, top), "grey")
    bins = part["reliability"]
    most = max(1, *bins["count"])
    for claimed, found_share, count in zip(bins["claimed"], bins["found"], bins["count"], strict=True):
        if count:
            radius = 4 + round(10 * (count / most) ** 0.5)
            x, y = x0 + claimed * plot, top + plot - found_share * plot
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), (0, 114, 178))
    pen.text((x0, top + plot + 10), f"calibration error {words(part['calibration_error'])}", "black", small)
    picture.save(path)
