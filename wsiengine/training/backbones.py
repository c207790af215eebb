"""The backbones by name, and the files that hold weights for them.

Weights come from a file of your own: torch's (``.pt``, ``.pth``: read without running what is pickled inside) or
safetensors, with the names of torchvision's networks; or, for MobileNetV2, the quantised TensorFlow Lite file. Nothing
is downloaded.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wsiengine.errors import IntegrityError, WsiError
from wsiengine.training.backbone import Backbone
from wsiengine.training.densenet import DenseNet
from wsiengine.training.inception import Inception
from wsiengine.training.mobilenet import MobileNetV2
from wsiengine.training.resnet import ResNet

NAMES = ("mobilenet_v2", "resnet18", "resnet50", "densenet121", "inception_v3")
_NOT_OURS = ("fc.", "classifier.", "AuxLogits.", "head.")  # the ends of published networks
_PREFIXES = ("module.", "backbone.", "model.")
_SAFE_TYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I64": "<i8"}


def build(name: str, width: float = 1.0) -> Backbone:
    """A backbone with random weights.

    Args:
        name: One of :data:`NAMES`.
        width: Multiplies its channel counts (for tests); published weights need 1.0.

    Raises:
        WsiError: No such backbone.
    """
    if name in ("resnet18", "resnet50"):
        return ResNet(int(name[6:]), width)
    made = {"mobilenet_v2": MobileNetV2, "densenet121": DenseNet, "inception_v3": Inception}
    if name not in made:
        raise WsiError(f"there is no backbone {name!r}", hint=f"use {', '.join(NAMES)}")
    return made[name](width)


def load_weights(backbone: Backbone, file: Path) -> None:
    """Fill in the weights of a file.

    Raises:
        WsiError: There is no such file.
        IntegrityError: It holds no weights, others than this backbone's, or code.
    """
    if not file.is_file():
        raise WsiError(f"the weights {file} are not there", hint="name the file as `weights` in the recipe")
    if file.suffix == ".tflite":
        if not isinstance(backbone, MobileNetV2):
            raise IntegrityError(f"{file.name} holds MobileNetV2", hint="choose backbone mobilenet_v2")
        backbone.load_imagenet(file)
        return
    found = _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    state = _named(found, backbone)
    missing = [name for name in backbone.state_dict() if name not in state and not name.endswith("num_batches_tracked")]
    wrong = [
        name for name, value in backbone.state_dict().items() if name in state and state[name].shape != value.shape
    ]
    if missing or wrong:
        what = f"{len(missing)} layers are missing" if missing else f"{len(wrong)} layers have another shape"
        raise IntegrityError(
            f"{file.name} does not fit this backbone: {what}, the first is {(missing or wrong)[0]}",
            hint="use the weights of the same network, with torchvision's names",
        )
    backbone.load_state_dict(state, strict=False)


def _named(found: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """The entries that are the backbone's, under its names."""
    state = {}
    for name, value in found.items():
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        if isinstance(backbone, DenseNet):
            name = name.replace("features.", "dense.", 1) if name.startswith("features.") else name
        if not name.startswith(_NOT_OURS):
            state[name] = value
    return state


def _read_torch(file: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(file, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise IntegrityError(
            f"{file.name} cannot be read as plain weights: {str(error).splitlines()[0][:200]}",
            hint="save it with torch.save(network.state_dict(), FILE): whole networks hold code and are refused",
        ) from error
    for key in ("state_dict", "model"):
        found = found.get(key, found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise IntegrityError(f"{file.name} holds no state_dict", hint="save network.state_dict()")
    return found


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    """The format is a length (8 bytes), a JSON header and the raw numbers."""
    data = file.read_bytes()
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        body = memoryview(data)[8 + size :]
        found = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                values = np.frombuffer(body[start:stop], _SAFE_TYPES[entry["dtype"]]).reshape(entry["shape"])
                found[name] = torch.from_numpy(values.astype(values.dtype.newbyteorder("=")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{file.name} is damaged or no safetensors file: {error}", hint="copy it again") from error
    return found
