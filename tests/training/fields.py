"""A small data folder in the layout of the colorectal sets: made-up tissue whose pixels encode where they are."""

import csv
from pathlib import Path

import cv2
import numpy as np

CLASSES = ("Normal", "Low-grade IN", "Adenocarcinoma", "Polyp")


def draw(rows: int, cols: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """RGB field on a gradient with dark discs, and the mask of the discs."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:rows, :cols]
    image = np.stack([200 - y * 60 // rows, 120 + x * 60 // cols, 190 + 0 * y], axis=2).astype(np.uint8)
    mask = np.zeros((rows, cols), np.uint8)
    for _ in range(7):
        centre = int(rng.integers(cols)), int(rng.integers(rows))
        cv2.circle(mask, centre, int(rng.integers(15, 40)), 255, -1)
    image[mask > 0] = image[mask > 0] // 2 + np.array([30, 5, 60], np.uint8)
    return image, mask


def write_sets(data: Path, images: int = 2) -> Path:
    """``data/crc/{ebhi,glas,lc25000}`` with a few fields of every class in folds 0 and 1."""
    seed = 0
    for source in ("ebhi", "glas", "lc25000"):
        folder = data / "crc" / source
        (folder / "images").mkdir(parents=True)
        (folder / "masks").mkdir()
        label, case = ("grade", "patient") if source == "glas" else ("class", "case")
        names = {"ebhi": CLASSES, "glas": ("healthy", "adenomatous", "poorly differentiated")}
        rows = []
        for finding in names.get(source, ("Normal", "Adenocarcinoma")):
            for i in range(images):
                seed += 1
                image, mask = draw(190, 230, seed)
                name = f"{finding.replace(' ', '_')}{i}.png"
                cv2.imwrite(str(folder / "images" / name), image[:, :, ::-1])
                row = {"file": f"images/{name}", label: finding, case: f"{finding}-{i}", "fold": i % 2}
                if source != "lc25000":
                    cv2.imwrite(str(folder / "masks" / name), mask)
                    row["mask"] = f"masks/{name}"
                rows.append(row)
        with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    return data
