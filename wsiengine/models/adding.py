"""``wsiengine models add``: others' models from a folder, a file, an archive or an address.

Whatever comes is looked through, run once in a process of its own, and only then made known by its name. What had to
be fetched, unpacked or converted is kept in :func:`wsiengine.models.registry.data_dir`; a folder that is a model
already stays where it is.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from wsiengine.errors import CardError, DependencyError, IntegrityError, OutputError, UnknownModel, WsiError
from wsiengine.models.archive import is_archive, unpack
from wsiengine.models.card import Card, load_card
from wsiengine.models.child import ask
from wsiengine.models.download import Progress, beside, check_address, fetch, is_address, name_of
from wsiengine.models.integrity import check_files, file_sha256
from wsiengine.models.registry import CARD_FILE, ZOO, data_dir, load_model, register
from wsiengine.models.wsinfer import CONFIG_FILE, WEIGHTS_FILE, card_of, slug

_CONVERT_S, _PROBE_S = 900.0, 300.0


@dataclass(frozen=True, slots=True)
class Asked:
    """How a model is to be added.

    Attributes:
        trust: TorchScript may be opened (in a child process): it holds pickles, which can run any code.
        sha256: That the file behind an address must have: the archive, the card, or a zoo model's weights.
        name: Instead of the card's, or of the folder's for a model without a card.
        progress: Told of bytes while fetching.
    """

    trust: bool = False
    sha256: str | None = None
    name: str | None = None
    progress: Progress | None = None


def add(source: str, asked: Asked | None = None) -> Card:
    """Make a model known by its name → its card.

    Args:
        source: A folder (with card.json, or config.json of the WSInfer zoo), a card, an ONNX file with its card beside
            it, an archive of such a folder, or the ``https://`` address of an archive, a card.json or a config.json.
        asked: See :class:`Asked`.

    Raises:
        ModelError: In words, what is wrong with the model or its address.
        OutputError: It cannot be kept.
    """
    asked = asked or Asked()
    with _workshop() as shop:
        path = _fetched(source, shop / "fetched", asked) if is_address(source) else Path(source).expanduser()
        if not path.exists():
            raise UnknownModel(f"there is no file or folder {source}.", hint="check the path.")
        name = asked.name or slug(path.name.split(".")[0] if path.is_file() else path.resolve().name)
        if path.is_file() and is_archive(path.name):
            (shop / "unpacked").mkdir()
            path = unpack(path, shop / "unpacked")
        if path.is_dir() and not (path / CARD_FILE).exists() and (path / CONFIG_FILE).exists():
            return _install(_converted(path, shop / "model", name, asked), shop)
        card = load_model(path)
        if path.is_dir() and not path.is_relative_to(shop) and asked.name is None:
            _probe(path)
            return register(path)
        return _install(_copied(card, shop / "model", asked.name), shop)


@contextmanager
def _workshop() -> Iterator[Path]:
    """A folder beside the kept models, gone afterwards."""
    models = data_dir() / "models"
    try:
        models.mkdir(parents=True, exist_ok=True)
        shop = Path(tempfile.mkdtemp(prefix=".new-", dir=models))
    except OSError as error:
        raise OutputError(
            f"Cannot keep models in {models}: {error.strerror or error}.",
            hint="set WSIENGINE_CONFIG to a folder that you may write to.",
        ) from error
    try:
        yield shop
    except OSError as error:
        if isinstance(error, WsiError):
            raise
        raise OutputError(
            f"Cannot keep the model: {error}.", hint="free some space, or set WSIENGINE_CONFIG."
        ) from error
    finally:
        shutil.rmtree(shop, ignore_errors=True)


def _fetched(url: str, folder: Path, asked: Asked) -> Path:
    """An archive; or a folder with a card and its files, each with the sha256 that the card states; or a zoo model."""
    check_address(url, asked.sha256)
    cache = data_dir() / "downloads"
    name = name_of(url)
    if is_archive(name):
        folder.mkdir()
        return shutil.copyfile(fetch(url, cache, sha256=asked.sha256, progress=asked.progress), folder / name)
    model = folder / slug(url.rstrip("/").split("/")[-2])
    model.mkdir(parents=True)
    if name == CONFIG_FILE:
        weights = fetch(beside(url, WEIGHTS_FILE), cache, sha256=asked.sha256, progress=asked.progress)
        shutil.copyfile(fetch(url, cache), model / CONFIG_FILE)
        shutil.copyfile(weights, model / WEIGHTS_FILE)
        return model
    if not name.endswith(".json"):
        raise CardError(
            f"{url} is neither an archive nor a card: needed the address of a .zip, a .tar.gz, a card.json, or the "
            "config.json of a WSInfer model",
            hint="an ONNX file needs its card: give the card's address, the file lies beside it.",
        )
    shutil.copyfile(fetch(url, cache, sha256=asked.sha256), model / CARD_FILE)
    for resource in load_card(model / CARD_FILE).resources:
        kept = fetch(beside(url, resource.file), cache, sha256=resource.sha256, progress=asked.progress)
        (model / resource.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(kept, model / resource.file)
    return model


def _converted(source: Path, folder: Path, name: str, asked: Asked) -> Path:
    """A folder of the WSInfer zoo as one of ours."""
    weights = source / WEIGHTS_FILE
    if not weights.is_file():
        raise CardError(f"{source} has a {CONFIG_FILE} but no {WEIGHTS_FILE}", hint="fetch the model again.")
    card = card_of(source / CONFIG_FILE, name)
    if not asked.trust:
        raise IntegrityError(
            f"{weights.name} is TorchScript: opening it can run code inside it.",
            hint="if you trust those who made it, add it with --trust: it is then converted to ONNX, once.",
        )
    folder.mkdir()
    path = folder / CARD_FILE
    path.write_text(json.dumps(card), encoding="utf-8")
    _check_torch()
    arguments = [str(weights.resolve()), str(folder.resolve())]
    ask("wsiengine.training.torchscript", arguments, doing=f"converting {weights.name}", timeout_s=_CONVERT_S)
    card["resources"] = [{"file": "model.onnx", "sha256": file_sha256(folder / "model.onnx")}]
    card["precision"] = {"float32": "converted from TorchScript", "source_sha256": file_sha256(weights)}
    path.write_text(json.dumps(card, indent=2, ensure_ascii=False), encoding="utf-8")
    _probe(folder, folder / "reference.npz")
    (folder / "reference.npz").unlink()
    return folder


def _check_torch() -> None:
    if find_spec("torch") is None or find_spec("onnx") is None:
        raise DependencyError(
            "converting TorchScript needs torch and onnx, which are not installed.",
            hint='pip install "wsiengine[train]"; running the converted model needs neither.',
        )


def _copied(card: Card, folder: Path, name: str | None) -> Path:
    """A model's own files and no others, under another name where asked."""
    folder.mkdir()
    facts = card.to_json() | ({"name": name} if name else {})
    for resource in card.resources:
        (folder / resource.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(card.folder / resource.file, folder / resource.file)
    (folder / CARD_FILE).write_text(json.dumps(facts, indent=2, ensure_ascii=False), encoding="utf-8")
    _probe(folder)
    return folder


def _probe(folder: Path, *reference: Path) -> None:
    """Run it once where a crash harms nobody."""
    card = load_card(folder / CARD_FILE)
    check_files(card)
    arguments = [str(path.resolve()) for path in (folder, *reference)]
    ask("wsiengine.models.probe", arguments, doing=f"loading {card.model_path.name}", timeout_s=_PROBE_S)


def _install(folder: Path, shop: Path) -> Card:
    """Keep a finished folder under the model's name, in one step; an older one of that name goes."""
    card = load_card(folder / CARD_FILE)
    if (ZOO / card.name).is_dir():
        raise CardError(f"the name {card.name!r} belongs to a bundled model", hint="give another with --name.")
    goal = data_dir() / "models" / card.name
    if goal.exists():
        goal.rename(shop / "old")
    folder.rename(goal)
    return register(goal)
