"""``wsiengine export``: a finished run, drawn again with another threshold, smoothing or format. No inference."""

import argparse
import csv
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from wsiengine.commands.arguments import add_drawing
from wsiengine.errors import OutputConflict, OutputError, PlanError

FORMATS = ("geojson", "geojson.gz", "csv", "zarr")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="OUT", help="output folder of a finished run")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="file to write (default: OUT/export.<format>)"
    )
    parser.add_argument("--format", choices=FORMATS, help="default: what FILE's name says, else geojson")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    parser.add_argument(
        "--cam", metavar="CLASS", help="write the class-activation map of this class instead (OUT/attribution.zarr)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_drawing(parser)


def run(args: argparse.Namespace) -> int:
    from wsiengine.finishing import make_annotations, qupath_offset, summarise, tile_objects
    from wsiengine.result import Result
    from wsiengine.tasks.detect import nothing_below
    from wsiengine.truth import Truth
    from wsiengine.wording import area_lines, summary_words

    result = Result(args.folder)
    truth = Truth.load(args.folder / "probability.zarr")
    if args.cam is not None:
        return _export_cam(args, truth)
    changes = {
        "threshold": args.threshold,
        "smoothing_um": args.smoothing,
        "min_area_um2": args.min_area,
        "classes": args.classes,
    }
    finish = replace(result.finish(), tiles=args.tiles, **{k: v for k, v in changes.items() if v is not None})
    annotations = make_annotations(truth, truth.map(), finish)
    note = nothing_below(args.threshold, getattr(truth.layout, "minimum_score", 0.0))
    path = _path(args)
    if path.suffix == ".zarr":
        written = _write_table(truth, annotations, path)
    else:
        objects = [*annotations, *tile_objects(truth, finish)] if args.tiles else annotations
        written = write(objects, path, offset_l0=qupath_offset(truth))
    summary = summarise(truth, annotations)
    if args.json:
        facts = {"summary": summary, "files": [str(p) for p in written], **({"note": note} if note else {})}
        print(json.dumps(facts, ensure_ascii=False))
        return 0
    smoothing = "" if truth.task.name == "detect" else f" · smoothing {finish.smoothing_um:g} µm"
    print(f"{'drawn':<9}threshold {finish.threshold:g}{smoothing}")
    if note:
        print(f"{'note':<9}{note}")
    print(f"{'result':<9}{summary_words(summary)}")
    for area in area_lines(summary):
        print(f"{'area':<9}{area}")
    print(f"{'files':<9}{' · '.join(str(p) for p in written)}")
    return 0


def _export_cam(args: argparse.Namespace, truth: Any) -> int:
    """The class-activation map of a class, where the run kept it: no inference, and no slide to draw over."""
    import tempfile

    from wsiengine.attribution import attribution_map, write_attribution
    from wsiengine.store import open_store

    stored = open_store(args.folder / "probability.zarr")
    kept = {name: stored.truth[name][...] for name in ("cells", "cam") if name in stored.truth}
    truth = replace(truth, arrays={**truth.arrays, **kept})
    values = attribution_map(truth, args.cam, stored.attributes["parameters"].get("cam"))
    folder = args.output or args.folder
    there = [name for name in ("attribution.png", "attribution.zarr") if (folder / name).exists()]
    if there and not args.overwrite:
        raise OutputConflict(f"{folder / there[0]} exists.", hint="give another folder with -o, or --overwrite.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".cam-", dir=folder) as draft:
            written = write_attribution(
                values, truth, args.cam, Path(draft), None, stored.attributes.get("cam_offset_px")
            )
            for name in written:
                if (folder / name).is_dir():
                    shutil.rmtree(folder / name)
                (Path(draft) / name).replace(folder / name)
    except OSError as error:
        raise OutputError(
            f"Could not write to {folder}: {error.strerror or error}.", hint="give a writable folder with -o."
        ) from error
    files = [str(folder / name) for name in written]
    print(
        json.dumps({"class": args.cam, "files": files}, ensure_ascii=False)
        if args.json
        else f"{'files':<9}{' · '.join(files)}"
    )
    return 0


def _path(args: argparse.Namespace) -> Path:
    named = args.output and next((f for f in reversed(FORMATS) if args.output.name.endswith("." + f)), None)
    form = args.format or named or "geojson"
    path: Path = args.output or args.folder / f"export.{form}"
    if args.output and not path.name.endswith("." + form):
        path = path.with_name(f"{path.name}.{form}")
    if path.exists() and not args.overwrite:
        raise OutputConflict(f"{path} exists.", hint="give another file with -o, or --overwrite.")
    return path


def _write_table(truth: Any, annotations: Sequence[Any], path: Path) -> list[Path]:
    """A detector's objects as columns → files written."""
    from wsiengine.object_outputs import ObjectAnnotations, write_table

    if not isinstance(annotations, ObjectAnnotations):
        raise PlanError("Only a detector's objects have a Zarr table.", hint="--format csv.")
    if path.exists():
        shutil.rmtree(path)
    write_table(truth, annotations, path)
    return [path]


def _cell(value: float | None) -> float | str:
    """A measurement in a table: no digits beyond what it was measured to, empty where there is none."""
    return "" if value is None else round(float(value), 6)


def write(annotations: Sequence[Any], path: Path, *, offset_l0: tuple[int, int]) -> list[Path]:
    """Write annotations as GeoJSON, or as a table of regions (``.csv``) → files written."""
    if path.suffix != ".csv":
        from wsiengine.annotations import write_geojson

        return list(write_geojson(annotations, path, offset_l0=offset_l0))
    from wsiengine.qupath import replacing

    columns = list(dict.fromkeys(name for a in annotations for name in a.measurements))
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["id", "object", "class", "point inside x px", "point inside y px", *columns])
    for a in annotations:
        inside = a.geometry.representative_point()
        place = [round(inside.x - offset_l0[1], 2), round(inside.y - offset_l0[0], 2)]
        table.writerow([a.id, a.object_type, a.class_name, *place, *(_cell(a.measurements.get(c)) for c in columns)])
    try:
        with replacing(path) as file:
            file.write(text.getvalue().encode())
    except OSError as error:
        raise OutputError(
            f"Could not write {path}: {error.strerror or error}.", hint="give a file in a writable folder with -o."
        ) from error
    return [path]
