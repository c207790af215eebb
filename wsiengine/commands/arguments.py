"""Arguments that several commands share, and their values in words."""

import argparse
import re

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def memory(text: str) -> int:
    """Bytes of ``4GB``, ``800 MiB``, ``2e9``.

    >>> memory("4GiB"), memory("800m"), memory("1000")
    (4294967296, 838860800, 1000)
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?)i?b?\s*", text, re.IGNORECASE)
    try:
        value = float(match[1]) * _UNITS[match[2].lower()] if match else 0
    except ValueError:
        value = 0
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory: write 4GB or 800MB")
    return int(value)


def fraction(text: str) -> float:
    """A number in [0, 1]; ``30%`` is 0.3."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number between 0 and 1 (0.3) or percentage (30%)")
    return value


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def not_negative(text: str) -> float:
    """A number of 0 or more.

    >>> not_negative("0.00"), not_negative("2.5")
    (0.0, 2.5)
    """
    return 0.0 if re.fullmatch(r"\s*0+\.?0*\s*", text) else positive(text)


def whole(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def names(text: str) -> tuple[str, ...]:
    """
    >>> names("Target cell, Burr")
    ('Target cell', 'Burr')
    """
    found = tuple(name.strip() for name in text.split(",") if name.strip())
    if not found:
        raise argparse.ArgumentTypeError("names of classes are needed, with commas between them")
    return found


def add_mpp(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--mpp", type=positive, metavar="UM", help="µm per level-0 pixel, where the file states none or a wrong one"
    )


def add_drawing(parser: argparse._ActionsContainer) -> None:
    """How regions are drawn from probabilities."""
    parser.add_argument(
        "--threshold",
        "--min-score",
        type=fraction,
        metavar="P",
        help="least probability of the best class, below it `Uncertain`; of a detector's objects, the least score",
    )
    parser.add_argument(
        "--smoothing", type=not_negative, metavar="UM", help="smooth the map by this many µm before drawing regions"
    )
    parser.add_argument(
        "--min-area", type=not_negative, metavar="UM2", help="leave out what is smaller than this many µm²"
    )
    parser.add_argument(
        "--classes", type=names, metavar="A,B", help="of a detector's objects only those of these classes"
    )
    parser.add_argument("--tiles", action="store_true", help="also write each tile as a QuPath tile object")
