"""The parts of a card: one frozen record each, and how it is read from JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wsiengine.classes import Colour, colour_of
from wsiengine.errors import CardError, IntegrityError
from wsiengine.geometry import Mpp
from wsiengine.models.fields import Fields

LAYOUTS = ("NHWC", "NCHW")
DTYPES = ("uint8", "uint16", "float32", "float16")
PER_TILE = "pil_bilinear_per_tile"  # each tile shrunk by itself: wsiengine.tilewise
RESAMPLINGS = ("area", PER_TILE)


@dataclass(frozen=True, slots=True)
class ClassInfo:
    """One score channel. ``asserted_as`` is the name under which a result may claim it (its own where None)."""

    name: str
    colour: Colour
    asserted_as: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def to_json(self) -> dict[str, Any]:
        asserted = {"asserted_as": self.asserted_as} if self.asserted_as else {}
        return {"name": self.name, "colour": list(self.colour), **asserted, "evidence": dict(self.evidence)}


@dataclass(frozen=True, slots=True)
class InputSpec:
    """What one tile must look like. Model value = ((lo + x/white·(hi − lo)) − mean) / std, for a pixel x in 0–white.

    White is 255, or with ``depth`` 16 (grey pictures of 12 to 16 bits, values as stored) 65535.

    ``mpp`` None: the image's pixels as they are, whatever their size (detectors only); with ``whole`` the image is
    shrunk to fit into one tile. ``channels`` 1: a grey model. ``pad`` (0–white) fills what a tile has beyond the image.
    """

    size_px: int
    mpp: Mpp | None
    layout: str
    dtype: str
    range: tuple[float, float] = (0.0, 255.0)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resample: str = "area"
    channels: int = 3
    whole: bool = False
    pad: int | None = None
    depth: int = 8

    @property
    def deep(self) -> bool:
        """Whether pixels are uint16."""
        return self.depth == 16

    @property
    def white(self) -> int:
        return 65535 if self.deep else 255

    @property
    def scale(self) -> np.ndarray:
        """float32 (channels,): model value = pixel · scale + bias."""
        lo, hi = self.range
        return ((hi - lo) / self.white / np.asarray(self.std or (1,) * self.channels, np.float64)).astype(np.float32)

    @property
    def bias(self) -> np.ndarray:
        """float32 (channels,)."""
        nothing, one = (0,) * self.channels, (1,) * self.channels
        mean, std = np.asarray(self.mean or nothing, np.float64), np.asarray(self.std or one, np.float64)
        return ((self.range[0] - mean) / std).astype(np.float32)

    @property
    def fixed_mpp(self) -> Mpp:
        """µm per pixel, of a model that has them."""
        if self.mpp is None:
            raise ValueError("this model takes pixels as they are")
        return self.mpp

    @property
    def resolution(self) -> str:
        """In words: µm/px, or that there are none."""
        return str(self.mpp) if self.mpp else ("the whole image" if self.whole else "pixels as they are")

    def to_json(self) -> dict[str, Any]:
        mpp = self.mpp and (self.mpp.y if self.mpp.y == self.mpp.x else [self.mpp.y, self.mpp.x])
        facts: dict[str, Any] = {
            "size_px": self.size_px,
            "mpp": mpp,
            "layout": self.layout,
            "dtype": self.dtype,
            "range": list(self.range),
            "mean": list(self.mean) if self.mean else None,
            "std": list(self.std) if self.std else None,
            "resample": self.resample,
        }
        rare = {
            "channels": (self.channels, 3),
            "whole": (self.whole, False),
            "pad": (self.pad, None),
            "depth": (self.depth, 8),
        }
        return facts | {name: value for name, (value, default) in rare.items() if value != default}


@dataclass(frozen=True, slots=True)
class Outputs:
    """ONNX output names by role.

    ``scores`` (N, classes) and ``gate`` (N,) are per tile; ``cam`` (N, classes, h, w) is the class-activation map whose
    mean over cells is ``scores``, ``gate_map`` (N, h, w) the map whose mean is ``gate``. Those from ``boxes`` on belong
    to detectors: see :mod:`wsiengine.models.detection`.
    """

    scores: str
    gate: str | None = None
    cam: str | None = None
    gate_map: str | None = None
    boxes: str | None = None
    labels: str | None = None
    masks: str | None = None
    count: str | None = None
    sizes: str | None = None
    offsets: str | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        """Those that are given, ``scores`` first."""
        return tuple(role for role in self.__slots__ if getattr(self, role) is not None)

    @property
    def names(self) -> tuple[str, ...]:
        """The ONNX names of :attr:`roles`."""
        return tuple(getattr(self, role) for role in self.roles)


@dataclass(frozen=True, slots=True)
class AgainstTiles:
    """Dense windows beside isolated tiles, on labelled tissue: parts of so many tiles.

    Attributes:
        agreement: With the same class.
        right_dense: Right in dense windows.
        right_tiles: Right as isolated tiles.
        tiles: How many.
    """

    agreement: float
    right_dense: float
    right_tiles: float
    tiles: int


@dataclass(frozen=True, slots=True)
class Dense:
    """Running the network once over large blocks: their side and halo, and where cell 0 of its map is centred.

    ``against_tiles``: what that changes, where it was measured.
    """

    block_px: int
    halo_px: int
    offset_px: float
    against_tiles: AgainstTiles | None = None


@dataclass(frozen=True, slots=True)
class Gate:
    """A tile whose gate fraction is below ``minimum`` is asserted to be ``otherwise``."""

    minimum: float
    otherwise: str


@dataclass(frozen=True, slots=True)
class Uncertain:
    """A place whose best class is below ``below`` is asserted to be ``name``."""

    below: float
    name: str


@dataclass(frozen=True, slots=True)
class Resource:
    """A file of the model, relative to the card's folder."""

    file: str
    sha256: str


def read_class(entry: Fields) -> ClassInfo:
    name = entry.name("name")
    given = entry.numbers_or_none("colour", 3)
    if given is not None and any(v != int(v) or not 0 <= v <= 255 for v in given):
        raise CardError(f"{entry.where}.colour is {list(given)}, needed three whole numbers from 0 to 255")
    asserted = entry.name("asserted_as") if entry.has("asserted_as") else None
    evidence = found.mapping() if (found := entry.object_or_none("evidence")) else {}
    entry.finish()
    colour = (int(given[0]), int(given[1]), int(given[2])) if given else colour_of(name)
    return ClassInfo(name, colour, asserted, evidence)


def read_input(entry: Fields) -> InputSpec:
    mpp = Mpp(*entry.positive_pair("mpp")) if entry.has("mpp") else entry.take("mpp", None)
    channels = entry.integer("channels", at_least=1, default=3)
    if channels not in (1, 3):
        raise CardError(f"{entry.where}.channels is {channels}, needed 3 (colour) or 1 (grey)")
    dtype = entry.choice("dtype", DTYPES)
    depth = _read_depth(entry, dtype, channels)
    lo, hi = entry.numbers_or_none("range", 2) or (0.0, 65535.0 if depth == 16 else 255.0)
    if lo >= hi:
        raise CardError(f"{entry.where}.range is [{lo:g}, {hi:g}], needed [low, high] with low < high")
    mean, std = entry.numbers_or_none("mean", channels), entry.numbers_or_none("std", channels)
    if std is not None and min(std) <= 0:
        raise CardError(
            f"{entry.where}.std is {list(std)}, needed {'three numbers' if channels == 3 else 'one'} above 0"
        )
    _check_scaling(entry.where, (lo, hi), mean, std)
    size_px = entry.integer("size_px", at_least=1)
    spec = InputSpec(
        size_px=size_px,
        mpp=mpp,
        layout=entry.choice("layout", LAYOUTS),
        dtype=dtype,
        range=(lo, hi),
        mean=mean,
        std=std,
        resample=entry.choice("resample", RESAMPLINGS, default="area"),
        channels=channels,
        whole=entry.flag("whole", default=False),
        pad=entry.integer("pad", at_least=0) if entry.has("pad") else entry.take("pad", None),
        depth=depth,
    )
    entry.finish()
    if spec.whole and spec.mpp:
        raise CardError(f"{entry.where}: whole shrinks any image to one tile, mpp fixes its scale: needed one of them")
    if spec.pad is not None and spec.pad > spec.white:
        raise CardError(f"{entry.where}.pad is {spec.pad}, needed a whole number from 0 to {spec.white}")
    if spec.dtype == "float16" and spec.layout == "NHWC":
        raise CardError(f"{entry.where}: dtype float16 needs layout NCHW", hint="export with NCHW, or as float32")
    if dtype.startswith("uint") and ((lo, hi) != (0, spec.white) or mean or std):
        raise CardError(
            f"{entry.where}: dtype {dtype} takes pixels as they are, but range, mean or std ask for scaling",
            hint="put the scaling into the ONNX graph, or set dtype to float32",
        )
    return spec


def _read_depth(entry: Fields, dtype: str, channels: int) -> int:
    """Bits of a pixel: 16 where dtype says so, else 8 unless asked for."""
    own = {"uint8": 8, "uint16": 16}.get(dtype)
    depth = entry.integer("depth", at_least=1, default=own or 8)
    if depth not in (8, 16) or (own and depth != own):
        raise CardError(f"{entry.where}.depth is {depth}, needed {own or '8 or 16'} with dtype {dtype}")
    if depth == 16 and channels != 1:
        raise CardError(f"{entry.where}: a depth of 16 bits is for grey pictures: needed channels 1, not {channels}")
    return depth


def _check_scaling(
    where: str, span: tuple[float, float], mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> None:
    """Mean and deviation are of values within the range: a slip between 0–1 and 0–255 makes a model blind."""
    lo, hi = span
    if mean is not None and not all(lo <= m <= hi for m in mean):
        raise CardError(f"{where}.mean is {list(mean)}, needed numbers within the range {lo:g} to {hi:g}")
    if std is not None and not all((hi - lo) / 100 <= s <= hi - lo or s == 1 for s in std):  # 1: only centred
        least, most = (hi - lo) / 100, hi - lo
        raise CardError(
            f"{where}.std is {list(std)}, needed numbers from {least:g} to {most:g} for a range of {lo:g} to {hi:g}",
            hint="range, mean and std belong together: [0, 1] with 0.485 and 0.229, [0, 255] with 123.7 and 58.4",
        )


def read_outputs(entry: Fields) -> Outputs:
    outputs = Outputs(entry.text("scores"), *(entry.text_or_none(role) for role in Outputs.__slots__[1:]))
    entry.finish()
    if len(set(outputs.names)) < len(outputs.names):
        raise CardError(f"{entry.where}: two roles name the same ONNX output: {', '.join(outputs.names)}")
    return outputs


def read_dense(entry: Fields) -> Dense:
    block_px, halo_px = entry.integer("block_px", at_least=1), entry.integer("halo_px", at_least=0)
    dense = Dense(block_px, halo_px, entry.number("offset_px"), _against_tiles(entry.object_or_none("against_tiles")))
    entry.finish()
    return dense


def _against_tiles(entry: Fields | None) -> AgainstTiles | None:
    if entry is None:
        return None
    found = AgainstTiles(
        agreement=entry.number("agreement", low=0, high=1),
        right_dense=entry.number("right_dense", low=0, high=1),
        right_tiles=entry.number("right_tiles", low=0, high=1),
        tiles=entry.integer("tiles", at_least=1),
    )
    entry.finish()
    return found


def read_gate(entry: Fields) -> Gate:
    gate = Gate(entry.number("minimum", low=0, high=1), entry.name("otherwise"))
    entry.finish()
    return gate


def read_uncertain(entry: Fields) -> Uncertain:
    uncertain = Uncertain(entry.number("below", low=0, high=1), entry.name("name"))
    entry.finish()
    return uncertain


def read_resource(entry: Fields) -> Resource:
    file, digest = entry.text("file"), entry.text("sha256").lower()
    entry.finish()
    parts = file.replace("\\", "/").split("/")
    if not file or file[0] in "/\\~" or ":" in file or ".." in parts or "" in parts:
        raise IntegrityError(
            f"{entry.where}.file is {file!r}: a model may only name files inside its own folder",
            hint="copy the file next to the card and name it without folders",
        )
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise CardError(f"{entry.where}.sha256 is {digest!r}, needed 64 hexadecimal digits", hint="sha256sum FILE")
    return Resource(file, digest)
