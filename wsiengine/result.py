"""A finished run, read back from its folder."""

import json
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiengine.errors import OutputError
from wsiengine.output import finished_run

if TYPE_CHECKING:
    import dask.array as da

    from wsiengine.annotations import Annotation


class Result:
    """What a run found. Everything is read from the folder when asked for.

    Args:
        folder: Output folder of a finished run.

    Raises:
        OutputError: There is no finished run in it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        run = finished_run(self.folder)
        if run is None:
            raise OutputError(
                f"{self.folder} holds no finished run.", hint="`wsiengine infer SLIDE -o FOLDER` makes or resumes one."
            )
        self.run: dict[str, Any] = run

    @property
    def summary(self) -> dict[str, Any]:
        """``area_mm2`` by class, ``analysed_mm2``, ``tissue_mm2``, ``regions``, ``tiles``."""
        return dict(self.run["summary"])

    @property
    def files(self) -> list[str]:
        """Paths of the files written."""
        return [str(self.folder / name) for name in self.run["files"]]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes: the first channels of :attr:`probability`, in order."""
        return tuple(self.run["model"]["map_classes"])

    @property
    def probability(self) -> "da.Array":
        """The map as a lazy Dask array: (rows, cols, channels) uint8; 0 = not analysed, 1–255 = (v − 1) / 254."""
        from wsiengine.graph import stored_array
        from wsiengine.store import open_store

        return stored_array(open_store(self.folder / "probability.zarr").coded)

    @cached_property
    def annotations(self) -> "list[Annotation]":
        """The regions, in level-0 pixels of the slide.

        The file counts from the corner of the scanned bounds, where the slide states any, as QuPath does; here they
        are back where the slide's pixels are.
        """
        from wsiengine.annotations import read_geojson
        from wsiengine.store import open_store

        bounds = open_store(self.folder / "probability.zarr").attributes["bounds_l0"]
        offset = (bounds[0], bounds[1]) if bounds else (0, 0)
        return read_geojson(self.folder / "annotations.geojson", offset_l0=offset)

    def to_geojson(
        self,
        path: str | os.PathLike[str],
        *,
        threshold: float | None = None,
        smoothing_um: float | None = None,
    ) -> Path:
        """Write the annotations to ``path`` (``.geojson`` or ``.geojson.gz``), without any inference.

        Args:
            path: File to write.
            threshold: Another least probability of the best class; None keeps the run's.
            smoothing_um: Another smoothing, µm; None keeps the run's.
        """
        from dataclasses import replace

        from wsiengine.annotations import write_geojson
        from wsiengine.finishing import make_annotations, qupath_offset
        from wsiengine.truth import Truth

        truth = Truth.load(self.folder / "probability.zarr")
        finish = self.finish()
        changes = {"threshold": threshold, "smoothing_um": smoothing_um}
        finish = replace(finish, **{k: v for k, v in changes.items() if v is not None})
        write_geojson(make_annotations(truth, truth.map(), finish), Path(path), offset_l0=qupath_offset(truth))
        return Path(path)

    def finish(self) -> Any:
        """How the run drew its annotations (:class:`wsiengine.finishing.Finish`)."""
        from wsiengine.finishing import Finish

        return Finish(**self.run["finish"])

    def __repr__(self) -> str:
        return f"Result({str(self.folder)!r}, {json.dumps(self.summary.get('area_mm2', {}), ensure_ascii=False)})"
