"""What the cards of trained detectors have in common."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from wsiengine.models.card import parse_card


def write_card(file: Path, said: dict[str, Any]) -> None:
    """Write a detector's card, filled up with what all of them say, after the engine has read it.

    Raises:
        CardError: An entry is wrong.
    """
    card = {
        "schema_version": 1,
        "version": "1.0",
        "task": "detect",
        "recipe": [],
        "activation": "identity",
        "precision": {"weights": "float16", "arithmetic": "float32"},
        **said,
    }
    parse_card(card, file.parent, where=str(file))
    file.write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def resource(file: Path) -> dict[str, str]:
    """A file with its sha256, as a card lists it."""
    return {"file": file.name, "sha256": sha256(file.read_bytes()).hexdigest()}
