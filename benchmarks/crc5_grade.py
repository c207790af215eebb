"""Can a grade be told? Leave-patients-out on GlaS' carcinomas, several ideas, all by an ordinal rule::

    python benchmarks/crc5_grade.py --data DIR --run SPLITS/without-glas

The features come from a network that saw no image of GlaS (``benchmarks/crc5_splits.py``). Two logistic regressions
(at least moderate-to-poor; poor), every patient alike, give a severity; the drawn glands give an upper bound of what
perfect gland maps could give.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from wsiengine.training.data import Field, load, read_fields
from wsiengine.training.loop import load_trained
from wsiengine.training.scoring import field_tiles

GRADES = ("moderately differentiated", "moderately-to-poorly differentiated", "poorly differentiated")
_SMALLEST_GLAND_PX = 200
_LUMEN_LEVEL, _NUCLEUS_RED, _GLASS_LEVEL = 200, 110, 215


def network_features(run: Path, fields: list[Field], mpp: float) -> np.ndarray:
    """Mean features of each field's tiles, weighted by predicted epithelium, (N, features)."""
    network = load_trained(run)
    rows = []
    for field in fields:
        tiles, _ = field_tiles(field, mpp)
        with torch.inference_mode():
            maps = network.backbone(network.backbone.prepare(torch.from_numpy(tiles).permute(0, 3, 1, 2)))
            covered = network.gate(maps).sigmoid()
            rows.append(((maps * covered).sum((0, 2, 3)) / covered.sum()).numpy())
    return np.array(rows)


def gland_measurements(field: Field) -> list[float]:
    """Share of the field and of its tissue, size, number, solidity, roundness and lumen of glands; nuclei outside."""
    pixels = load(field, 0.62)
    assert pixels.mask is not None
    mask = (pixels.mask > 127).astype(np.uint8)
    grey, nuclei = cv2.cvtColor(pixels.image, cv2.COLOR_RGB2GRAY), pixels.image[..., 0] < _NUCLEUS_RED
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask)
    shapes = []
    for i in range(1, count):
        if stats[i, cv2.CC_STAT_AREA] < _SMALLEST_GLAND_PX:
            continue
        own = labels == i
        outlines = cv2.findContours(own.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
        outline = max(outlines, key=cv2.contourArea)
        area, hull = cv2.contourArea(outline), cv2.contourArea(cv2.convexHull(outline))
        round_ = 4 * np.pi * area / max(1.0, cv2.arcLength(outline, True)) ** 2
        shapes.append(
            (np.log(stats[i, cv2.CC_STAT_AREA]), area / max(1.0, hull), round_, (grey[own] > _LUMEN_LEVEL).mean())
        )
    size, solid, circular, lumen = np.median(shapes, axis=0) if shapes else (5.0, 1.0, 1.0, 0.0)
    tissue = max(0.01, float((grey < _GLASS_LEVEL).mean()))
    outside = (nuclei & (mask == 0)).sum() / max(1, nuclei.sum())
    return [mask.mean(), mask.mean() / tissue, size, len(shapes), solid, circular, lumen, outside]


def severity(features: np.ndarray, grade: np.ndarray, case: np.ndarray, components: int) -> np.ndarray:
    """Severity 0–2 of every image by a model that saw no image of its patient."""
    found = np.zeros(len(grade))
    for one in np.unique(case):
        train = case != one
        weight = np.array([1 / np.sum(case[train] == c) for c in case[train]])
        for at_least in (1, 2):
            steps = [StandardScaler(), *([PCA(components, random_state=0)] if components else [])]
            model = make_pipeline(*steps, LogisticRegression(C=0.1, class_weight="balanced", max_iter=3000))
            model.fit(features[train], grade[train] >= at_least, logisticregression__sample_weight=weight)
            found[~train] += model.predict_proba(features[~train])[:, 1]
    return found


def report(name: str, found: np.ndarray, grade: np.ndarray, case: np.ndarray) -> None:
    """Balanced accuracy over images, and how often a patient's poor images rank above another's moderate ones."""
    called = np.digitize(found, [2 / 3, 4 / 3])
    three = np.mean([(called[grade == g] == g).mean() for g in range(3)])
    two = np.mean([(found[grade == 0] <= 1).mean(), (found[grade == 2] > 1).mean()])
    units = sorted(set(zip(case, grade, strict=True)))
    mean = {g: np.array([found[(case == c) & (grade == g)].mean() for c, one in units if one == g]) for g in (0, 2)}
    ranked = (mean[2][:, None] > mean[0]).mean()
    print(
        f"{name}: three grades {three:.2f} (chance 0.33); moderate or poor {two:.2f} (chance 0.50); patients ranked "
        f"right {ranked:.2f} ({len(mean[0])} moderate, {len(mean[2])} poor)"
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Grade, leave-patients-out.")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds crc/")
    parser.add_argument("--run", type=Path, required=True, help="a training without GlaS")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    fields = [f for f in read_fields(asked.data, ("glas",)) if f.finding in GRADES]
    grade, case = np.array([GRADES.index(f.finding) for f in fields]), np.array([f.case for f in fields])
    fine, coarse = (network_features(asked.run, fields, mpp) for mpp in (1.0, 2.0))
    glands = np.array([gland_measurements(f) for f in fields])
    ideas = {
        "features, 8 components": (fine, 8),
        "features, 20 components": (fine, 20),
        "features at 2 µm/px": (coarse, 8),
        "features at 1 and 2 µm/px": (np.c_[fine, coarse], 8),
        "share of glands, as drawn": (glands[:, :2], 0),
        "all measurements of drawn glands": (glands, 0),
    }
    print(f"{len(fields)} images of {len(set(case))} patients")
    for name, (features, components) in ideas.items():
        report(name, severity(features, grade, case, components), grade, case)


if __name__ == "__main__":
    main()
