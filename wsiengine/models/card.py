"""Card v1: everything the engine must know about a model, read from JSON and checked in words.

``docs/cards.md`` explains each entry to those who write one. A card is facts only: nothing here opens the ONNX file
(:mod:`wsiengine.models.runtime` compares the two), and nothing is looked up over a network.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from wsiengine.classes import Colour, colour_of
from wsiengine.errors import CardError
from wsiengine.models.detection import (
    Detection,
    Second,
    check_detection,
    detection_json,
    read_detection,
    read_second,
    second_json,
)
from wsiengine.models.fields import Fields
from wsiengine.models.parts import (
    PER_TILE,
    ClassInfo,
    Dense,
    Gate,
    InputSpec,
    Outputs,
    Resource,
    Uncertain,
    read_class,
    read_dense,
    read_gate,
    read_input,
    read_outputs,
    read_resource,
    read_uncertain,
)
from wsiengine.models.precision import REFERENCE, Variant, read_variants
from wsiengine.models.segmentation import Segmentation, check_segmentation, read_segmentation, segmentation_json
from wsiengine.recipe import READING_STEPS

SCHEMA_VERSION = 1
TASKS = ("classify", "segment", "detect")
FINDERS = ("slide", "breast")
"""What may look for the part of a picture that is analysed: :mod:`wsiengine.tissue`, :mod:`wsiengine.breast`."""
ACTIVATIONS = ("softmax", "sigmoid", "identity")
DETECTOR_OUTPUTS = ("boxes", "labels", "masks", "count", "sizes", "offsets")


@dataclass(frozen=True, slots=True)
class MapClass:
    """A class that results assert: the probabilities of ``channels`` are summed into it."""

    name: str
    colour: Colour
    channels: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A model, described. ``folder`` holds the card and every file that it names."""

    name: str
    version: str
    task: str
    classes: tuple[ClassInfo, ...]
    input: InputSpec
    outputs: Outputs
    activation: str
    output_stride_px: int
    resources: tuple[Resource, ...]
    licence: str
    folder: Path = field(compare=False)
    description: str = ""
    recipe: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    tissue: str | None = None
    halo_px: int = 0
    dense: Dense | None = None
    gate: Gate | None = None
    uncertain: Uncertain | None = None
    segmentation: Segmentation | None = None
    detection: Detection | None = None
    second: Second | None = None
    precision: Mapping[str, Any] = field(default_factory=dict, hash=False)
    number_format: str = REFERENCE
    terms: str | None = None
    intended_use: str = ""
    training_command: str = ""
    evaluation_command: str = ""

    @property
    def map_classes(self) -> tuple[MapClass, ...]:
        """The asserted classes, in the order of their first channel; never the gate's nor the uncertain name."""
        channels: dict[str, list[int]] = {}
        for index, info in enumerate(self.classes):
            channels.setdefault(info.asserted_as or info.name, []).append(index)
        own = {info.name: info.colour for info in self.classes}
        return tuple(
            MapClass(name, own.get(name) or colour_of(name, self.classes[c[0]].colour), tuple(c))
            for name, c in channels.items()
        )

    @property
    def score_channels(self) -> int:
        """Columns of a row of scores: the classes, then the gate if there is one."""
        return len(self.classes) + (self.gate is not None)

    @property
    def variants(self) -> dict[str, Variant]:
        """The same network in other number formats."""
        return read_variants(self.precision, self.name)

    def at(self, number_format: str) -> "Card":
        """The card whose model is the file of that number format (one of :attr:`variants`, or ``fp32``)."""
        return replace(self, number_format=number_format)

    @property
    def model_resource(self) -> Resource:
        """Of the ONNX file that sees the tiles, in the card's number format; a second stage's files are others."""
        other = self.variants.get(self.number_format)
        return next(r for r in self.resources if r.file in ([other.file] if other else _models(self)))

    @property
    def model_path(self) -> Path:
        """The ONNX file."""
        return self.folder / self.model_resource.file

    @property
    def sha256(self) -> str:
        """sha256 (hex) of the ONNX file, as the card states it; :mod:`registry` compares it with the file."""
        return self.model_resource.sha256

    @property
    def notice(self) -> str:
        """What a user is told at first use: the terms of the weights and what the model is not."""
        where = f" Terms: {self.terms}." if self.terms else ""
        return f"{self.name} {self.version}: {self.licence}.{where} Research software, not a medical device."

    def to_json(self) -> dict[str, Any]:
        """The card as JSON types; ``parse_card`` of it gives an equal card."""
        parts = {
            "tissue": self.tissue,
            "segmentation": segmentation_json(self.segmentation),
            "detection": detection_json(self.detection),
            "second": second_json(self.second),
        }
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "version": self.version,
            "task": self.task,
            "description": self.description,
            "classes": [info.to_json() for info in self.classes],
            "input": self.input.to_json(),
            "recipe": [dict(step) for step in self.recipe],
            "outputs": {role: name for role in Outputs.__slots__ if (name := getattr(self.outputs, role)) is not None},
            "activation": self.activation,
            "output_stride_px": self.output_stride_px,
            "halo_px": self.halo_px,
            "dense": _plain(self.dense),
            "gate": _plain(self.gate),
            "uncertain": _plain(self.uncertain),
            **{name: part for name, part in parts.items() if part is not None},
            "resources": [_plain(r) for r in self.resources],
            "precision": dict(self.precision),
            "licence": self.licence,
            "terms": self.terms,
            "intended_use": self.intended_use,
            "training_command": self.training_command,
            "evaluation_command": self.evaluation_command,
        }


def load_card(path: Path | str) -> Card:
    """Read and check a card; the files that it names are not opened.

    Raises:
        CardError: The file is missing, is no JSON, or an entry is wrong; the message names the entry.
        IntegrityError: A resource lies outside the card's folder.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise CardError(
            f"the card {path} cannot be read: {error.strerror or error}",
            hint="give a folder that holds card.json and the ONNX file",
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CardError(
            f"the card {path} is not valid JSON: {error}", hint="docs/cards.md shows a whole card"
        ) from error
    return parse_card(data, path.parent, where=str(path))


def parse_card(data: Any, folder: Path | str, *, where: str = "card") -> Card:
    """A card from JSON types; ``folder`` holds its files, ``where`` names it in messages.

    Raises:
        CardError: An entry is missing, unknown, of a wrong type, or contradicts another.
        IntegrityError: A resource lies outside ``folder``.
    """
    top = Fields(data, where)
    _check_schema(top)
    card = Card(
        name=top.slug("name"),
        version=top.slug("version"),
        task=top.choice("task", TASKS),
        description=top.text("description", ""),
        classes=tuple(read_class(entry) for entry in top.objects("classes", at_least=1)),
        input=read_input(top.object("input")),
        recipe=tuple(step.mapping() for step in top.objects("recipe", default=())),
        tissue=top.choice("tissue", (*FINDERS, "none")) if top.has("tissue") else top.take("tissue", None),
        outputs=read_outputs(top.object("outputs")),
        activation=top.choice("activation", ACTIVATIONS),
        output_stride_px=top.integer("output_stride_px", at_least=1),
        halo_px=top.integer("halo_px", at_least=0, default=0),
        dense=read_dense(entry) if (entry := top.object_or_none("dense")) else None,
        gate=read_gate(entry) if (entry := top.object_or_none("gate")) else None,
        uncertain=read_uncertain(entry) if (entry := top.object_or_none("uncertain")) else None,
        segmentation=read_segmentation(entry) if (entry := top.object_or_none("segmentation")) else None,
        detection=read_detection(entry) if (entry := top.object_or_none("detection")) else None,
        second=read_second(entry) if (entry := top.object_or_none("second")) else None,
        resources=tuple(read_resource(entry) for entry in top.objects("resources", at_least=1)),
        precision=(entry.mapping() if (entry := top.object_or_none("precision")) else {}),
        licence=top.text("licence"),
        terms=top.text_or_none("terms"),
        intended_use=top.text("intended_use", ""),
        training_command=top.text("training_command", ""),
        evaluation_command=top.text("evaluation_command", ""),
        folder=Path(folder),
    )
    top.finish()
    _check_consistency(card, where)
    return card


def _check_schema(top: Fields) -> None:
    version = top.take("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise CardError(
            f"{top.where}: schema_version is {version!r}, this release reads {SCHEMA_VERSION}",
            hint="upgrade wsiengine" if isinstance(version, int) and version > SCHEMA_VERSION else "see docs/cards.md",
        )


def _check_consistency(card: Card, where: str) -> None:
    stride = card.output_stride_px
    lengths = {"input.size_px": card.input.size_px, "halo_px": card.halo_px}
    if card.dense:
        lengths |= {"dense.block_px": card.dense.block_px, "dense.halo_px": card.dense.halo_px}
    for name, length in lengths.items():
        if length % stride:
            raise CardError(f"{where}: {name} is {length}, needed a whole number of output strides ({stride} px)")
    names = [info.name for info in card.classes]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise CardError(f"{where}: class name used twice: {', '.join(doubled)}")
    special = [s for s in (card.gate and card.gate.otherwise, card.uncertain and card.uncertain.name) if s]
    asserted = [m.name for m in card.map_classes]
    if doubled := sorted({s for s in special if s in names or s in asserted or special.count(s) > 1}):
        raise CardError(
            f"{where}: the gate's and the uncertain name must differ from every class: {', '.join(doubled)}"
        )
    if card.activation != "softmax" and len(asserted) < len(names):
        raise CardError(f"{where}: asserted_as sums classes, which needs activation softmax, not {card.activation}")
    if bool(card.gate) != bool(card.outputs.gate):
        raise CardError(f"{where}: gate and outputs.gate go together: give both or neither")
    if card.dense and not card.outputs.cam:
        raise CardError(f"{where}: dense needs a class-activation map, but outputs.cam is not given")
    if card.dense and card.gate and not card.outputs.gate_map:
        raise CardError(f"{where}: dense with a gate needs the gate's map, but outputs.gate_map is not given")
    files = [r.file for r in card.resources]
    if lost := sorted({v.file for v in read_variants(card.precision, where).values()} - set(files)):
        raise CardError(f"{where}: precision names {', '.join(lost)}, which resources do not list with their sha256")
    if len(_models(card)) != 1 or len(set(files)) < len(files):
        raise CardError(f"{where}: resources must name each file once and exactly one .onnx: got {', '.join(files)}")
    _check_task(card, where)


def _check_task(card: Card, where: str) -> None:
    """What belongs to one task only is given there and nowhere else."""
    if card.input.resample == PER_TILE and (card.task != "classify" or card.dense):
        raise CardError(f"{where}: input.resample {PER_TILE} is for classifiers of single tiles only")
    detects = card.task == "detect"
    if detects != (card.detection is not None):
        raise CardError(f"{where}: detection and task detect go together: give both or neither")
    if (card.task == "segment") != (card.segmentation is not None):
        raise CardError(f"{where}: segmentation and task segment go together: give both or neither")
    if card.segmentation is not None:
        check_segmentation(card.segmentation, [c.name for c in card.classes], card.activation, where)
    if card.input.deep:
        _check_deep(card, where)
    if card.second and not detects:
        raise CardError(f"{where}: second follows a detector, but the task is {card.task}")
    if card.input.mpp is None and not detects:
        raise CardError(f"{where}: input.mpp is missing: needed µm per pixel", hint="only detectors take any pixels")
    if card.second and (lost := sorted(set(card.second.files) - {r.file for r in card.resources})):
        raise CardError(f"{where}: second names {', '.join(lost)}, which resources do not list with their sha256")
    if card.detection is not None:
        check_detection(card.detection, card.outputs, card.input, where, card.output_stride_px)
    elif others := [r for r in DETECTOR_OUTPUTS if getattr(card.outputs, r)]:
        raise CardError(f"{where}: outputs.{others[0]} belongs to detectors, but the task is {card.task}")


def _check_deep(card: Card, where: str) -> None:
    """What works at 16 bits: detectors, and of the steps the window; a second stage sees the same pixels."""
    wrong = None
    if card.task != "detect":
        wrong = f"input.depth 16 is for detectors, but the task is {card.task}"
    elif steps := refused_steps(card.recipe):
        wrong = f"the recipe's {steps} works at 8 bits, but input.depth is 16: needed no step, or a window"
    elif card.second and not card.second.input.deep:
        wrong = "second.input.depth is 8, but the crops are of a detector's pixels of 16 bits: needed 16"
    if wrong:
        raise CardError(f"{where}: {wrong}")


def refused_steps(steps: Iterable[Mapping[str, Any]]) -> str:
    """The names of a recipe's steps that do not work at 16 bits, with commas between; empty where all do."""
    return ", ".join(str(step.get("step")) for step in steps if step.get("step") not in READING_STEPS)


def _models(card: Card) -> list[str]:
    """The ONNX files among the resources, but for those of a second stage and of other number formats."""
    others = (*(card.second.files if card.second else ()), *(v.file for v in card.variants.values()))
    return [r.file for r in card.resources if r.file.lower().endswith(".onnx") and r.file not in others]


def _plain(record: Any) -> dict[str, Any] | None:
    """A frozen record as a dict, None as None."""
    return None if record is None else asdict(record)
