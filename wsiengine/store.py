"""The output store: an OME-Zarr 0.5 probability map with its overviews, and the scores it came from.

``probability.zarr`` is one Zarr v3 group::

    0, 1, 2, …     uint8 (channels, rows, cols), sharded; 0 = not analysed, 1–255 = (v − 1) / 254; each level halves
    truth/analysed uint8 (rows, cols): cells that the run was to fill
    truth/scores   of a classifier: float32 (tile rows, tile cols, score channels) as the model gave them; NaN where
                   not run. Other tasks keep other arrays there (:mod:`wsiengine.tasks.base`)

The only importer of zarr.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from wsiengine.errors import OutputError
from wsiengine.geometry import Lattice
from wsiengine.scratch import IN_MEMORY, Scratch
from wsiengine.tasks.classify import MapLayout, overview

_CHUNK = 256  # cells
_SHARD = 1024
_TABLE_ROWS = 1 << 18  # of a column, in one chunk
_SMALLEST = 256  # no overview is needed of a map this small


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """An opened store.

    Attributes:
        coded: zarr array (channels, rows, cols) uint8: the map at full resolution, read on demand.
        truth: The arrays under ``truth/`` by name, each read on demand.
        attributes: What :func:`write_store` was given.
    """

    coded: Any
    truth: Mapping[str, Any]
    attributes: Mapping[str, Any]

    @property
    def scores(self) -> Any:
        """zarr array (tile rows, tile cols, score channels) float32, of a classifier."""
        return self.truth["scores"]

    @property
    def analysed(self) -> Any:
        """zarr array (rows, cols) uint8."""
        return self.truth["analysed"]

    def arrays(self) -> dict[str, np.ndarray]:
        """What the task had gathered, read into memory; see :func:`write_store`."""
        names = self.attributes.get("arrays", ["scores"])
        coded = {"map": np.moveaxis(self.coded[...], 0, -1)} if "map" in names else {}
        return coded | {name: self.truth[name][...] for name in names if name != "map"}


def write_store(
    path: Path,
    coded: np.ndarray,
    truth: tuple[Mapping[str, np.ndarray], np.ndarray],
    describe: tuple[MapLayout, Lattice],
    attributes: Mapping[str, Any],
    scratch: Scratch = IN_MEMORY,
) -> None:
    """Write map, overviews and truth; every shard once.

    Args:
        path: Folder to make; must not exist.
        coded: (rows, cols, channels) uint8 map.
        truth: The task's arrays by name, and analysed (rows, cols) bool. An array called ``map`` is ``coded`` itself.
        describe: What the channels mean, and the lattice (for the physical scale).
        attributes: JSON-able facts about the run, stored under ``wsiengine``.
        scratch: Makes the overviews.
    """
    layout, lattice = describe
    arrays, analysed = truth
    facts = dict(attributes) if "scores" in arrays else {**attributes, "arrays": sorted(arrays)}
    levels = 1 + max(0, math.ceil(math.log2(max(coded.shape[:2]) / _SMALLEST)))
    ome = _ome_attributes(layout, lattice, levels)
    root = zarr.open_group(str(path), mode="w-", zarr_format=3, attributes={"ome": ome, "wsiengine": facts})
    image = coded
    for level in range(levels):
        if level:
            image = overview(image, scratch)
        _write_image(root, str(level), image)
    folder = root.create_group("truth")
    for name, values in arrays.items():
        if name != "map":
            _write_array(folder, name, values, np.nan if values.dtype.kind == "f" else 0)
    _write_array(folder, "analysed", analysed.view(np.uint8), 0)


def write_evidence(path: Path, values: np.ndarray, place: tuple[Lattice, float], attributes: Mapping[str, Any]) -> None:
    """Write a map of logits as OME-Zarr of one channel.

    Args:
        path: Folder to make; must not exist.
        values: (rows, cols) float32, one per cell; NaN where not analysed.
        place: The lattice, and by how many working pixels the cells' centres lie further down and right.
        attributes: JSON-able facts, stored under ``wsiengine``.
    """
    lattice, shift_px = place
    steps = [1.0, lattice.mpp.y * lattice.cell_px, lattice.mpp.x * lattice.cell_px]
    shifts = [0.0, lattice.mpp.y * shift_px, lattice.mpp.x * shift_px]
    transformations: list[dict[str, Any]] = [{"type": "scale", "scale": steps}]
    if shift_px:
        transformations.append({"type": "translation", "translation": shifts})
    space = {"type": "space", "unit": "micrometer"}
    ome: dict[str, Any] = {
        "version": "0.5",
        "multiscales": [
            {
                "name": "attribution",
                "axes": [{"name": "c", "type": "channel"}, {"name": "y", **space}, {"name": "x", **space}],
                "datasets": [{"path": "0", "coordinateTransformations": transformations}],
            }
        ],
    }
    root = zarr.open_group(str(path), mode="w-", zarr_format=3, attributes={"ome": ome, "wsiengine": dict(attributes)})
    array = root.create_array(
        "0",
        shape=(1, *values.shape),
        dtype="float32",
        chunks=(1, min(_SHARD, values.shape[0]), min(_SHARD, values.shape[1])),
        fill_value=np.nan,
        dimension_names=("c", "y", "x"),
    )
    array[0] = values


def _write_image(group: Any, name: str, image: np.ndarray) -> None:
    channels = image.shape[2]
    array = group.create_array(
        name,
        shape=(channels, *image.shape[:2]),
        dtype="uint8",
        chunks=(1, _CHUNK, _CHUNK),
        shards=(channels, _SHARD, _SHARD),
        fill_value=0,
        dimension_names=("c", "y", "x"),
    )
    for y in range(0, image.shape[0], _SHARD):  # one shard at a time: its bytes are written once
        for x in range(0, image.shape[1], _SHARD):
            part = image[y : y + _SHARD, x : x + _SHARD]
            array[:, y : y + part.shape[0], x : x + part.shape[1]] = np.moveaxis(part, -1, 0)


def _write_array(group: Any, name: str, values: np.ndarray, fill: float) -> None:
    table = values.ndim == 1 or (values.ndim == 2 and values.shape[1] <= 16 and len(values) > _TABLE_ROWS)
    chunks = tuple(max(1, min(n, _TABLE_ROWS if table else 512)) for n in values.shape)
    array = group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=chunks, fill_value=fill)
    for first in range(0, len(values), chunks[0]):  # a row of chunks at a time: each is written once
        array[first : first + chunks[0]] = values[first : first + chunks[0]]


def _ome_attributes(layout: MapLayout, lattice: Lattice, levels: int) -> dict[str, Any]:
    """OME-Zarr 0.5 metadata (https://ngff.openmicroscopy.org/0.5/): axes in µm, one transformation per level."""
    cell_um = (lattice.mpp.y * lattice.cell_px, lattice.mpp.x * lattice.cell_px)
    datasets = []
    for level in range(levels):
        factor = 2**level
        scale = [1.0, cell_um[0] * factor, cell_um[1] * factor]
        shift = [0.0, cell_um[0] * (factor - 1) / 2, cell_um[1] * (factor - 1) / 2]
        transformations: list[dict[str, Any]] = [{"type": "scale", "scale": scale}]
        if level:
            transformations.append({"type": "translation", "translation": shift})
        datasets.append({"path": str(level), "coordinateTransformations": transformations})
    space = {"type": "space", "unit": "micrometer"}
    colours = (*layout.colours, *[(255, 255, 255)] * (len(layout.channels) - len(layout.names)))
    return {
        "version": "0.5",
        "multiscales": [
            {
                "name": "probability",
                "axes": [{"name": "c", "type": "channel"}, {"name": "y", **space}, {"name": "x", **space}],
                "datasets": datasets,
                "type": "mean of analysed cells",
            }
        ],
        "omero": {
            "channels": [
                {
                    "label": name,
                    "color": "{:02X}{:02X}{:02X}".format(*colours[k]),
                    "active": k < len(layout.names),
                    "window": {"min": 0, "max": 255, "start": 1, "end": 255},
                }
                for k, name in enumerate(layout.channels)
            ]
        },
    }


def write_objects(
    path: Path, columns: Mapping[str, np.ndarray], density: np.ndarray, attributes: Mapping[str, Any]
) -> None:
    """Write a detector's objects as columns, and the map of their density.

    Args:
        path: Folder to make; must not exist. One Zarr v3 group: ``table/<column>`` and ``density``.
        columns: Arrays whose first axis is the objects.
        density: (classes, rows, cols) float32.
        attributes: JSON-able facts, stored under ``wsiengine``.
    """
    root = zarr.open_group(str(path), mode="w-", zarr_format=3, attributes={"wsiengine": dict(attributes)})
    table = root.create_group("table")
    for name, values in columns.items():
        _write_array(table, name, values, 0)
    chunks = (1, *(max(1, min(n, _SHARD)) for n in density.shape[1:]))
    array = root.create_array(
        "density",
        shape=density.shape,
        dtype=density.dtype,
        chunks=chunks,
        fill_value=np.nan,
        dimension_names=("c", "y", "x"),
    )
    array[...] = density


def open_store(path: Path) -> Stored:
    """Open a finished ``probability.zarr``.

    Raises:
        OutputError: It is missing or damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr warns of files it does not know; ours are all known
            root = zarr.open_group(str(path), mode="r")
            return Stored(
                root["0"],
                dict(root["truth"].arrays()),  # type: ignore[union-attr]
                dict(root.attrs)["wsiengine"],  # type: ignore[arg-type]
            )
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise OutputError(
            f"{path} is no finished probability map: {error}.", hint="run `wsiengine infer` on the slide first."
        ) from error
