"""The command line: flags in, the same public calls that Python users make, words out.

Each command lives in ``wsiengine/commands/<name>.py`` and is imported only when it is asked for.

Exit codes: 0 all went well · 1 a slide failed, or another error in words · 2 wrong usage · 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from wsiengine import __version__
from wsiengine.stopping import EXIT_CODE, STOPPED, stopping_soon

COMMANDS = {
    "infer": "run a model over slides: map, annotations for QuPath, overlay",
    "info": "what a slide is: format, reader, sizes, levels, µm/px",
    "tissue": "the tissue mask of a slide, as picture and GeoJSON",
    "stain": "the stain of a slide: vectors, before and after normalisation",
    "models": "list the models, show a card, add others' models",
    "export": "another threshold, smoothing or format from a finished run",
    "evaluate": "score a model on labelled images",
    "train": "train a model on labelled images",
    "quantise": "a model in int8 or float16, measured on labelled tissue",
    "demo": "draw a slide, run on it, check the result",
    "doctor": "versions, devices, threads and caches of this installation",
}
_EPILOG = "Research software, not a medical device. `wsiengine COMMAND --help` tells more."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    _missing_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((a for a in arguments if not a.startswith("-")), None)
    parser, chosen = _parser(command)
    args = parser.parse_args(arguments)
    if chosen is None:
        parser.print_help()
        return 2
    _unicode_output()
    return _run(chosen, args)


def _missing_streams() -> None:
    """Where we were started with one of them closed (``>&-``), nobody speaks or listens; else a file would take it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115, PTH123  (for as long as we run)
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def _run(command: Any, args: argparse.Namespace) -> int:
    from wsiengine.terminal import make_display

    message = getattr(command, "STOPPED", STOPPED)
    try:
        with stopping_soon(message):
            return int(command.run(args))
    except KeyboardInterrupt:
        print(message, file=sys.stderr)
        return EXIT_CODE
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away: nothing left to tell it
        return 1
    except Exception as error:  # the last line of defence: a user gets words, --debug gets the traceback
        if args.debug:
            raise
        make_display(as_json=getattr(args, "json", False)).error(error)
        return 1


def _parser(command: str | None) -> tuple[argparse.ArgumentParser, Any]:
    parser = argparse.ArgumentParser(
        prog="wsiengine", description="Whole-slide-image inference.", epilog=_EPILOG, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"wsiengine {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    chosen = None
    for name, text in COMMANDS.items():
        sub = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        if name == command:
            chosen = import_module(f"wsiengine.commands.{name}")
            chosen.add_arguments(sub)
            sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser, chosen


def _unicode_output() -> None:
    """µ, × and · reach the screen, or are replaced: never an encoding error in the middle of a run."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
