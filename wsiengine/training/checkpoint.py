"""What an interrupted training goes on from: one file, replaced as a whole, and on the disk before it has its name."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

NAME = "checkpoint.pt"
Parts = Mapping[str, nn.Module | torch.optim.Optimizer]


def write(out: Path, parts: Parts, **more: Any) -> None:
    """Keep the state of each part in ``out``, and ``more`` with it."""
    draft = out / "checkpoint.new"
    with draft.open("wb") as file:
        torch.save({name: part.state_dict() for name, part in parts.items()} | more, file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(out / NAME)


def read(out: Path, parts: Parts) -> dict[str, Any]:
    """Give each part the state that ``out`` keeps → what was kept with them; empty where there is no checkpoint."""
    file = out / NAME
    if not file.exists():
        return {}
    kept = dict(torch.load(file, weights_only=True))
    for name, part in parts.items():
        part.load_state_dict(kept.pop(name))
    return kept
