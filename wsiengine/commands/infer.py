"""``wsiengine infer``: many slides, without a gap between two; a bad one does not stop the rest."""

import argparse
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from glob import glob, has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiengine.commands.arguments import add_drawing, add_mpp, fraction, memory, positive, whole
from wsiengine.errors import SlideNotFound, WsiError
from wsiengine.events import Event
from wsiengine.models.precision import ASKED
from wsiengine.stopping import MESSAGE as STOPPED  # noqa: F401  (what the command line says after Ctrl-C)
from wsiengine.terminal import Display, make_display

if TYPE_CHECKING:
    from wsiengine.isolation import Reporter
    from wsiengine.result import Result

SLIDE_SUFFIXES = [
    ".svs",
    ".tif",
    ".tiff",
    ".ndpi",
    ".vms",
    ".vmu",
    ".scn",
    ".mrxs",
    ".svslide",
    ".bif",
    ".czi",
    ".dcm",
    ".qptiff",
    ".png",
    ".jpg",
    ".jpeg",
    ".pgm",
    ".ppm",
    ".zvi",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("slides", nargs="+", metavar="SLIDE", help="slides, folders of slides, globs or URLs")
    parser.add_argument("-m", "--model", default="crc5", help="model name or folder (default: %(default)s)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for the results (default: <slide name>.wsiengine; with several slides, one sub-folder each)",
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--overlap", type=fraction, metavar="F", help="of neighbouring tiles (default: 0.3, or what the model needs)"
    )
    run.add_argument("--batch-size", type=whole, metavar="N", help="tiles per call of the model")
    run.add_argument("--region", type=Path, metavar="GEOJSON", help="analyse only inside this QuPath annotation")
    run.add_argument(
        "--tissue",
        default="auto",
        metavar="auto|slide|breast|none|GEOJSON",
        help="find what the card says (tissue on slides), or this; take all; or a drawn mask",
    )
    run.add_argument("--normalise", metavar="RECIPE", help="replace the card's recipe: none, macenko, macenko+clahe, …")
    add_mpp(run)
    run.add_argument(
        "--mode",
        choices=("tiles", "dense", "auto"),
        default="tiles",
        help="run each tile, or read windows off one run per block (cheaper at high overlap; default: tiles)",
    )
    run.add_argument(
        "--precision",
        choices=ASKED,
        default="fp32",
        help="number format of the model; auto: the fastest that keeps the answers (default: fp32)",
    )
    run.add_argument(
        "--device", default="auto", metavar="auto|cpu|cuda[:i]|tensorrt[:i]|mnn", help="what runs the model"
    )
    run.add_argument("--threads", type=whole, default=0, metavar="N", help="worker threads (default: all cores)")
    run.add_argument(
        "--readers",
        type=whole,
        metavar="N",
        help="processes that read for the threads, as far as memory allows (default: one per core where a GPU runs the "
        "model, else none)",
    )
    run.add_argument("--memory-limit", type=memory, metavar="SIZE", help="refuse or shrink a run that needs more: 4GB")
    run.add_argument(
        "--patience",
        type=positive,
        default=1800.0,
        metavar="S",
        help="give a slide up that shows no progress for so many seconds (default: 1800)",
    )
    run.add_argument(
        "--on-bad-tile",
        choices=("fail", "skip"),
        default="fail",
        help="where the slide is damaged: stop, or leave those tiles out, say so, and exit with 1 (default: fail)",
    )
    run.add_argument("--overwrite", action="store_true", help="replace another run's results in the output folder")
    add_drawing(parser.add_argument_group("regions"))
    parser.add_argument("--cam", metavar="CLASS", help="also write where this class was seen: its class-activation map")
    talk = parser.add_argument_group("output")
    talk.add_argument("--profile", action="store_true", help="tell where the time went; a timeline in profile.png")
    talk.add_argument("--quiet", action="store_true", help="print errors only")
    talk.add_argument("--json", action="store_true", help="print progress and result as JSON lines")


def run(args: argparse.Namespace) -> int:
    display = make_display(quiet=args.quiet, as_json=args.json)
    missing: list[SlideNotFound] = []
    slides = find_slides(args.slides, missing)
    for error in missing:
        display.error(error)
    if not slides:
        return 1
    folders = output_folders(slides, args.output)
    pairs = list(zip(slides, folders, strict=True))
    outcomes = (_isolated if _in_own_process(args, slides) else _in_turn)(args, pairs, display)
    rows = [(slide, *outcome) for slide, outcome in zip(slides, outcomes, strict=True)]
    named = [{"slide": row[0], "output": str(folder), "ok": row[1]} for row, folder in zip(rows, folders, strict=True)]
    display(Event("summary", {"slides": named}))
    if len(rows) > 1:
        _summary_table(rows, display)
    return 0 if all(ok for _, ok, _ in rows) and not missing else 1


def _in_own_process(args: argparse.Namespace, slides: Sequence[str]) -> bool:
    """Whether a process is started for the slides: always, but to look for a fault with a debugger."""
    return not args.debug


def _isolated(args: argparse.Namespace, pairs: Sequence[tuple[str, Path]], display: Display) -> list[tuple[bool, str]]:
    """All slides in a process of their own, so that one which ends it costs no other → outcome of each."""
    from wsiengine.isolation import Task, run_isolated

    def failed(pair: tuple[str, Path], error: WsiError) -> tuple[bool, str]:
        display.error(error, slide=Path(pair[0]).name)
        return False, error.message

    def note(pair: tuple[str, Path], text: str) -> None:
        display(Event("note", {"text": f"{Path(pair[0]).name}: {text}"}))

    return run_isolated(pairs, Task(_in_child, args, args.patience), failed, note)


def _in_child(args: argparse.Namespace, pairs: Sequence[tuple[str, Path]], reporter: "Reporter") -> None:
    _in_turn(args, pairs, make_display(quiet=args.quiet, as_json=args.json), reporter)


def _in_turn(
    args: argparse.Namespace,
    pairs: Sequence[tuple[str, Path]],
    display: Display,
    reporter: "Reporter | None" = None,
) -> list[tuple[bool, str]]:
    """Run all slides, telling ``reporter`` of each → outcome of each."""
    with _no_garbage():
        from wsiengine.events import InTurn
        from wsiengine.models.session import open_early

        open_early(args.model, args.precision, device=args.device, batch_size=args.batch_size)
        from wsiengine.series import infer_many  # takes as long

    shown = InTurn(display)

    def listener(number: int, event: Event) -> None:
        if reporter is not None and event.kind == "start":
            reporter.begun(pairs[number])
        elif reporter is not None:
            reporter.alive()
        shown(number, event)
        if event.kind == "start" and not number and not args.quiet:
            _notice(args.model, display)

    outcomes = []
    slides, folders = [slide for slide, _ in pairs], [folder for _, folder in pairs]
    how = {"overwrite": args.overwrite, "listener": listener, **_options(args)}
    with closing(infer_many(slides, args.model, folders, **how)) as results:
        for pair, found in zip(pairs, results, strict=True):
            outcomes.append(_outcome(pair, found, args, display))
            if reporter is not None:
                reporter.ended(pair, outcomes[-1])
            shown.next()
    return outcomes


@contextmanager
def _no_garbage() -> Iterator[None]:
    """While libraries are imported: what they make stays, and to look for garbage in it takes a tenth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _outcome(
    pair: tuple[str, Path], found: "Result | Exception", args: argparse.Namespace, display: Display
) -> tuple[bool, str]:
    """Of one slide: whether it went well, in a few words."""
    from wsiengine.wording import summary_words

    try:
        if not isinstance(found, Exception):
            return not found.summary.get("unreadable_tiles"), summary_words(found.summary)
        if args.debug:
            raise found
        display.error(found, slide=Path(pair[0]).name)
        return False, str(found).splitlines()[0]
    finally:
        display.close()


def _options(args: argparse.Namespace) -> dict[str, Any]:
    from wsiengine.inference import Outputs

    return {
        "profile": args.profile,
        "outputs": Outputs(args.smoothing or 0.0, None, args.min_area or 0.0, args.tiles, args.classes),
        "overlap": args.overlap,
        "batch_size": args.batch_size,
        "threshold": args.threshold,
        "region": args.region,
        "tissue": args.tissue,
        "mode": args.mode,
        "cam": args.cam,
        "precision": args.precision,
        "mpp": args.mpp,
        "device": args.device,
        "threads": args.threads,
        "readers": args.readers,
        "memory_limit_bytes": args.memory_limit,
        "normalise": args.normalise,
        "on_bad_tile": args.on_bad_tile,
    }


def _notice(model: str, display: Display) -> None:
    """The terms of a model's weights, the first time it is used; what is wrong with it each slide will say."""
    from wsiengine.models.registry import first_use, load_model

    try:
        card = load_model(model)
    except WsiError:
        return
    if first_use(card):
        terms = f" (terms: {card.terms})" if card.terms else ""
        text = f"{card.name} {card.version}: {card.licence}{terms}. {card.intended_use}"
        display(Event("terms", {"text": text}))


def find_slides(arguments: Sequence[str], missing: list[SlideNotFound]) -> list[str]:
    """Slides named by paths, folders, globs and URLs, in order, each once.

    Args:
        arguments: As the user gave them. A missing file is reported when its turn comes.
        missing: Takes an error for each folder and pattern without slides; the others go on.
    """
    found: list[str] = []
    for argument in arguments:
        path = Path(argument)
        if "://" in argument or path.is_file():
            found.append(argument)
        elif path.is_dir() and _is_result(path):
            hint = "give the slide itself, or `wsiengine export` to draw the results anew."
            missing.append(SlideNotFound(f"{argument} holds the results of a run, not slides.", hint=hint))
        elif path.is_dir():
            inside = _slides_of(sorted(p for p in path.iterdir() if _is_slide(p)))
            if not inside:
                hint = "give the folder that holds the slide files themselves (.svs, .ndpi, .tiff, …)."
                missing.append(SlideNotFound(f"The folder {argument} holds no slides.", hint=hint))
            found += inside
        elif has_magic(argument):
            inside = _slides_of(sorted(p for name in glob(argument, recursive=True) if (p := Path(name)).is_file()))
            if not inside:
                missing.append(SlideNotFound(f"No file matches {argument}.", hint="check the pattern and the folder."))
            found += inside
        else:
            found.append(argument)
    return list(dict.fromkeys(found))


def _slides_of(paths: Sequence[Path]) -> list[str]:
    """DICOM slides have a file per level: one of each series stands for all."""
    if not any(path.suffix.lower() == ".dcm" for path in paths):
        return [str(path) for path in paths]
    from wsiengine.slides.dicom import one_of_each_series

    return [str(path) for path in one_of_each_series(paths)]


def _is_result(folder: Path) -> bool:
    """Whether a run of ours was written here: its pictures are no slides."""
    return (folder / "run.json").is_file() and (folder / "probability.zarr").is_dir()


def _is_slide(path: Path) -> bool:
    """By its name; hidden files (macOS leaves ``._slide.svs`` beside ``slide.svs``) are none."""
    return path.suffix.lower() in SLIDE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def output_folders(slides: Sequence[str], output: Path | None) -> list[Path]:
    """Where each slide's results go: the folder itself for one slide, sub-folders by slide name for several."""
    from wsiengine.naming import default_folder

    if len(slides) == 1:
        return [output or default_folder(slides[0])]
    root = output or Path(os.curdir)
    names = [default_folder(slide).name if output is None else Path(slide).stem for slide in slides]
    whole = [f"{Path(slide).name}.wsiengine" if output is None else Path(slide).name for slide in slides]
    unique = [name if names.count(name) == 1 else full for name, full in zip(names, whole, strict=True)]
    seen: dict[str, int] = {}
    folders = []
    for name in unique:  # the same file name in several folders: number them
        seen[name] = seen.get(name, 0) + 1
        folders.append(root / (name if seen[name] == 1 else f"{name}.{seen[name]}"))
    return folders


def _summary_table(rows: Sequence[tuple[str, bool, str]], display: Display) -> None:
    display.line("", "")
    width = max(len(Path(slide).name) for slide, _, _ in rows)
    for slide, ok, words in rows:
        display.line("done" if ok else "failed", f"{Path(slide).name:<{width}}  {words}")
    good = sum(ok for _, ok, _ in rows)
    display.line(
        "summary", f"{good} of {len(rows)} slides finished" + ("" if good == len(rows) else ", see the errors")
    )
