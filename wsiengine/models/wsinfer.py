"""Folders of the WSInfer model zoo: ``config.json`` to a card. Their TorchScript is converted elsewhere.

Format (https://github.com/SBU-BMI/wsinfer-zoo, Kaczmarzyk et al. 2024): spec_version 1.0, num_classes,
class_names, patch_size_pixels at spacing_um_px, and a transform of Resize, ToTensor and Normalize that each patch,
cut from the slide's finest level, goes through with Pillow. Probabilities are softmax, or sigmoid of a single class.
"""

import json
import re
from pathlib import Path
from typing import Any

from wsiengine.errors import CardError
from wsiengine.models.fields import Fields

CONFIG_FILE, WEIGHTS_FILE = "config.json", "torchscript_model.pt"
_NEAR_STRIDE_PX = 32
_BILINEAR = ("bilinear", 2)  # torchvision's word and Pillow's number


def card_of(config: Path, name: str) -> dict[str, Any]:
    """The card, as JSON types, of a model whose ONNX file will be ``model.onnx``; its sha256 is yet to be filled in.

    Raises:
        CardError: Not a config.json of this kind, or a transform that cannot be done here.
    """
    try:
        top = Fields(json.loads(config.read_bytes()), config.name)
    except (OSError, ValueError, RecursionError) as error:
        raise CardError(f"{config} cannot be read as JSON: {error}", hint="fetch the model again.") from error
    version = top.choice("spec_version", ("1.0",))
    names = top.take("class_names")
    count = top.integer("num_classes", at_least=1)
    if not isinstance(names, list) or len(names) != count or not all(isinstance(n, str) for n in names):
        raise CardError(f"{config.name}: class_names is {names!r:.80}, needed {count} names", hint="fetch it again.")
    patch_px = top.integer("patch_size_pixels", at_least=1)
    spacing = top.number("spacing_um_px", low=1e-3, high=1e3)
    size_px, mean, std = _transform(top.objects("transform", at_least=1))
    architecture = top.text("architecture", "")
    return {
        "schema_version": 1,
        "name": name,
        "version": version,
        "task": "classify",
        "description": f"{architecture} of the WSInfer model zoo, converted from TorchScript.".strip(),
        "classes": [{"name": n} for n in names],
        "input": {
            "size_px": size_px,
            "mpp": patch_px * spacing / size_px,
            "layout": "NCHW",
            "dtype": "float32",
            "range": [0, 1],
            "mean": mean,
            "std": std,
            "resample": "pil_bilinear_per_tile",
        },
        "outputs": {"scores": "logits"},
        "activation": "softmax" if count > 1 else "sigmoid",
        "output_stride_px": _stride(size_px),
        "uncertain": {"below": 0.5, "name": f"Not {names[0]}"} if count == 1 else None,
        "resources": [{"file": "model.onnx", "sha256": "0" * 64}],
        "licence": "not stated by its config.json: ask its makers",
    }


def _transform(steps: list[Fields]) -> tuple[int, list[float] | None, list[float] | None]:
    """Side of the network's input, mean and std."""
    names = [step.text("name") for step in steps]
    if names not in (["Resize", "ToTensor"], ["Resize", "ToTensor", "Normalize"]):
        raise CardError(
            f"its transform is {' → '.join(names)}, needed Resize → ToTensor → Normalize",
            hint="export the model to ONNX yourself and write a card for it (docs/cards.md).",
        )
    resize = _arguments(steps[0])
    size = resize.take("size")
    sides = size if isinstance(size, list) else [size]
    if not all(isinstance(n, int) and n > 0 for n in sides) or len(set(sides)) != 1:
        raise CardError(f"its Resize has the size {size!r}, needed one whole number: tiles are squares")
    if (kind := resize.take("interpolation", "bilinear")) not in _BILINEAR:
        raise CardError(f"its Resize interpolates by {kind!r}, needed bilinear")
    resize.take("antialias", True)  # Pillow always does
    resize.finish()
    if len(steps) < 3:
        return sides[0], None, None
    normalise = _arguments(steps[2])
    mean, std = normalise.numbers_or_none("mean", 3), normalise.numbers_or_none("std", 3)
    normalise.take("inplace", False)
    normalise.finish()
    return sides[0], list(mean) if mean else None, list(std) if std else None


def _arguments(step: Fields) -> Fields:
    return step.object_or_none("arguments") or Fields({}, step.where)


def _stride(size_px: int) -> int:
    """The divisor of a tile's side that is nearest to the usual cell; on the map, a result of one tile fills many.

    >>> _stride(224), _stride(350), _stride(299)
    (32, 35, 23)
    """
    return min((n for n in range(1, size_px + 1) if size_px % n == 0), key=lambda n: abs(n - _NEAR_STRIDE_PX))


def slug(text: str) -> str:
    """A name fit for ``--model`` from a folder's or file's.

    >>> slug("breast-tumor resnet34 (TCGA)")
    'breast-tumor-resnet34-TCGA'
    """
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-._+")[:64] or "model"
