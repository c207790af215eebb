"""Finding models: those bundled with the package, folders the user registered, and plain paths.

A few facts are remembered in a small JSON file, ``models.json``, in the user's configuration folder
(``WSIENGINE_CONFIG``, else ``XDG_CONFIG_HOME/wsiengine``, else ``~/.config/wsiengine``): registered folders, and the
models whose terms were shown. Reading never needs that folder to exist, and a home that cannot be written costs only
the memory.
"""

import contextlib
import difflib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsiengine.errors import CardError, ModelError, OutputError, UnknownModel
from wsiengine.models.card import Card, load_card
from wsiengine.models.integrity import PICKLE_SUFFIXES, check_files, refuse_pickle

ZOO = Path(__file__).parent / "zoo"
CARD_FILE = "card.json"


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One known model: its card, or the problem that keeps it from being used."""

    name: str
    source: str  # "bundled" or "registered"
    folder: Path
    card: Card | None
    problem: str | None = None


def load_model(name_or_path: str | Path) -> Card:
    """The checked card of a model.

    Args:
        name_or_path: A bundled or registered name; a folder that holds ``card.json``; a card ``*.json``; or an
            ``*.onnx`` with its card beside it (``<stem>.json`` or ``card.json``). A bare name means the bundled or
            registered model, even where a folder of that name lies in the working directory (``./name`` means that).

    Raises:
        UnknownModel: Neither a known name nor an existing path; near names are offered.
        CardError: The card is missing or invalid, or a file that it names is missing.
        IntegrityError: A file is not what the card says, or is a pickle.
    """
    text = str(name_or_path)
    folders = {} if isinstance(name_or_path, Path) else _known_folders()
    card = load_card(folders[text] / CARD_FILE) if text in folders else _card_at(text, Path(text).expanduser())
    check_files(card)
    return card


def list_models() -> tuple[ModelEntry, ...]:
    """Every known model in order of name; one that cannot be used is listed with its problem."""
    return tuple(_entry(name, folder) for name, folder in sorted(_known_folders().items()))


def register(folder: str | Path) -> Card:
    """Make the model in ``folder`` known by its name from now on; a folder of the same name is replaced.

    Raises:
        CardError, IntegrityError: As :func:`load_model`, and where the name is a bundled model's.
        OutputError: The configuration folder cannot be written.
    """
    path = Path(folder).expanduser().resolve()
    card = load_model(path)
    if card.folder.resolve() != path:
        raise CardError(f"{path} is not a folder", hint="give the folder that holds card.json")
    if (ZOO / card.name).is_dir():
        raise CardError(f"the name {card.name!r} belongs to a bundled model", hint="give your model another name")
    memory = _read_memory()
    _write_memory({**memory, "folders": {**memory["folders"], card.name: str(path)}})
    return card


def first_use(card: Card) -> bool:
    """True once for each model version and user (always, where that cannot be remembered): show ``card.notice``."""
    key = f"{card.name} {card.version} {card.sha256[:16]}"
    memory = _read_memory()
    if key in memory["noticed"]:
        return False
    with contextlib.suppress(OutputError):  # a home that cannot be written: the notice comes again, which harms nobody
        _write_memory({**memory, "noticed": [*memory["noticed"], key]})
    return True


def config_dir() -> Path:
    """The folder of the user's settings; it need not exist."""
    if own := os.environ.get("WSIENGINE_CONFIG"):
        return Path(own)
    if xdg := os.environ.get("XDG_CONFIG_HOME"):
        return Path(xdg) / "wsiengine"
    return _at_home(".config/wsiengine")


def data_dir() -> Path:
    """The folder of models that were fetched, unpacked or converted; it need not exist."""
    if own := os.environ.get("WSIENGINE_CONFIG"):
        return Path(own)
    if xdg := os.environ.get("XDG_DATA_HOME"):
        return Path(xdg) / "wsiengine"
    return _at_home(".local/share/wsiengine")


def _at_home(name: str) -> Path:
    """Below the user's home, or where nobody can write: a container's user may have none."""
    try:
        return Path.home() / name
    except RuntimeError:
        return Path(os.sep) / "nonexistent" / name


def _known_folders() -> dict[str, Path]:
    registered = {name: Path(folder) for name, folder in _read_memory()["folders"].items()}
    bundled = {path.parent.name: path.parent for path in ZOO.glob(f"*/{CARD_FILE}")}
    return registered | bundled


def _entry(name: str, folder: Path) -> ModelEntry:
    source = "bundled" if folder.parent == ZOO else "registered"
    try:
        card = load_card(folder / CARD_FILE)
        check_files(card)
    except ModelError as error:
        return ModelEntry(name, source, folder, None, error.message)
    return ModelEntry(name, source, folder, card)


def _card_at(text: str, path: Path) -> Card:
    if path.is_dir():
        return load_card(path / CARD_FILE)
    if not path.is_file():
        raise _unknown(text)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        refuse_pickle(path)
    if path.suffix.lower() == ".json":
        return load_card(path)
    if path.suffix.lower() != ".onnx":
        refuse_pickle(path)
        raise CardError(f"{path.name} is neither a card (.json) nor an ONNX file", hint="give the model's folder")
    for beside in (path.with_suffix(".json"), path.with_name(CARD_FILE)):
        if beside.is_file():
            return _card_of(path, beside)
    raise CardError(
        f"{path.name} has no card: needed {path.stem}.json or {CARD_FILE} beside it",
        hint="docs/cards.md shows how to write one",
    )


def _card_of(onnx: Path, beside: Path) -> Card:
    card = load_card(beside)
    if card.model_path.resolve() != onnx.resolve():
        raise CardError(f"the card {beside} describes {card.model_path.name}, not {onnx.name}")
    return card


def _unknown(text: str) -> UnknownModel:
    known = sorted(_known_folders())
    near = difflib.get_close_matches(text, known, 3, 0.5)
    return UnknownModel(
        f"no model {text!r}: no such file or folder, and the known models are {', '.join(known) or 'none'}",
        hint=f"did you mean {' or '.join(near)}?" if near else "wsiengine models lists what there is",
    )


def _read_memory() -> dict[str, Any]:
    path = config_dir() / "models.json"
    empty: dict[str, Any] = {"schema_version": 1, "folders": {}, "noticed": []}
    try:
        found = json.loads(path.read_bytes())
    except OSError:
        return empty
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CardError(f"the list of models {path} is not valid JSON: {error}", hint="repair or delete it") from error
    if not isinstance(found, dict):
        raise CardError(f"the list of models {path} is not a JSON object", hint="repair or delete it")
    folders, noticed = found.get("folders", {}), found.get("noticed", [])
    if not isinstance(folders, dict) or not isinstance(noticed, list) or not all(map(_is_text, folders.values())):
        raise CardError(f"the list of models {path} has an unknown form", hint="repair or delete it")
    return empty | {"folders": folders, "noticed": noticed}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _write_memory(memory: dict[str, Any]) -> None:
    """Replace the file in one step, so that a reader never sees half of it."""
    folder = config_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=folder, suffix=".tmp", delete=False) as file:
            json.dump(memory, file, indent=1, ensure_ascii=False)
        Path(file.name).replace(folder / "models.json")
    except OSError as error:
        raise OutputError(
            f"the list of models cannot be written to {folder}: {error.strerror or error}",
            hint="set WSIENGINE_CONFIG to a folder that you may write to",
        ) from error
