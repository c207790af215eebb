"""The model folder of ``glands``: ONNX file and card, with the figures that ``wsiengine evaluate`` gave::

python -m wsiengine.training.glands_release --run RUN --to FOLDER
wsiengine evaluate --model FOLDER --data DIR/crc/glas --source-mpp 0.62 --where split=testA --json > figures.json
python -m wsiengine.training.glands_release --run RUN --to FOLDER --figures figures.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

from wsiengine.models.card import parse_card
from wsiengine.models.integrity import file_sha256
from wsiengine.training.glands import CHANNELS, load_trained
from wsiengine.training.unet import STRIDE_PX, export_unet

VERSION = "1.0"
TILE_PX, HALO_PX = 512, 32
SEGMENTATION: dict[str, Any] = {
    "channels": list(CHANNELS),
    "threshold": 0.5,
    "contour_above": 0.5,
    "grow_um": 5.0,
    "holes_um2": 30000,
    "min_area_um2": 400,
    "bright_above": 215,
}
_DESCRIPTION = (
    "Glands, with their lumen, in H&E-stained colorectal tissue: each gland one object. A light U-Net on MobileNetV2, "
    "trained on GlaS' training half and EBHI-Seg."
)
_INTENDED_USE = (
    "Research on H&E-stained colorectal tissue. Not a medical device, not for diagnosis. The evidence is the published "
    "benchmark, whose two halves share patients; other laboratories, stains and organs were not tested."
)


EVALUATION = "wsiengine evaluate --model glands --data DIR/crc/glas --source-mpp 0.62 --where split=testA"


def release(run: Path, to: Path, figures: dict[str, Any] | None, command: str) -> None:
    """Write ``glands.onnx`` and ``card.json``.

    Args:
        run: Folder of a training.
        to: Folder to write.
        figures: What ``wsiengine evaluate --json`` printed.
        command: That trained it, for the card.
    """
    to.mkdir(parents=True, exist_ok=True)
    recipe = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    export_unet(load_trained(run), to / "glands.onnx")
    data = _card(file_sha256(to / "glands.onnx"), float(recipe["mpp"]), figures, command)
    card = parse_card(data, to)
    (to / "card.json").write_text(json.dumps(card.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _card(digest: str, mpp: float, figures: dict[str, Any] | None, command: str) -> dict[str, Any]:
    evidence: dict[str, Any] = {"trained_on": "GlaS train (85 images), EBHI-Seg (1,800)"}
    if figures:
        names = ("f1", "precision", "recall", "dice", "hausdorff_px", "drawn", "found")
        scores = {name: round(figures["all"][name], 4) for name in names}
        evidence |= {"tested_on": f"GlaS test part A, {figures['images']} images", **scores}
    return {
        "schema_version": 1,
        "name": "glands",
        "version": VERSION,
        "task": "segment",
        "description": _DESCRIPTION,
        "classes": [{"name": "Gland", "colour": [0, 114, 178], "evidence": evidence}],
        "input": {"size_px": TILE_PX, "mpp": mpp, "layout": "NHWC", "dtype": "uint8"},
        "outputs": {"scores": "maps"},
        "activation": "sigmoid",
        "output_stride_px": STRIDE_PX,
        "halo_px": HALO_PX,
        "segmentation": SEGMENTATION,
        "resources": [{"file": "glands.onnx", "sha256": digest}],
        "precision": {"weights": "float16", "arithmetic": "float32"},
        "licence": "research use only",
        "terms": "LICENSES/glands.txt",
        "intended_use": _INTENDED_USE,
        "training_command": command,
        "evaluation_command": EVALUATION,
    }


def main(arguments: list[str] | None = None) -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(prog="python -m wsiengine.training.glands_release", description="Make the model.")
    parser.add_argument("--run", type=Path, required=True, help="folder of the training")
    parser.add_argument("--to", type=Path, required=True, help="folder to write")
    parser.add_argument("--figures", type=Path, help="what `wsiengine evaluate --json` printed")
    parser.add_argument("--command", default="see docs/glands.md", help="what trained it")
    args = parser.parse_args(arguments)
    figures = json.loads(args.figures.read_text(encoding="utf-8")) if args.figures else None
    release(args.run, args.to, figures, args.command)


if __name__ == "__main__":
    main()
