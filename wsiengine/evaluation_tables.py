"""A report of :mod:`wsiengine.evaluation_report` as lines of text."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from wsiengine.evaluation_report import LEVELS
from wsiengine.wording import percent

_SPANS = (("balanced_accuracy", "no answer is wrong"), ("balanced_accuracy_likeliest", "likeliest class"))
_FIGURES = ("recall", "precision", "specificity", "npv", "f1", "auroc", "average_precision", "recall_likeliest")
_HEADS = ("recall", "precision", "specificity", "NPV", "F1", "AUROC", "AP", "recall, likeliest")


def table_lines(found: Mapping[str, Any], no_answer: Sequence[str]) -> list[str]:
    """The whole report.

    Args:
        found: The report.
        no_answer: What the model calls a place that it does not judge, and one of which it is not sure; those of the
            two that it knows.
    """
    return [
        *_headline(found),
        *_accounts(no_answer),
        "",
        *_classes(found),
        "",
        *_answers(found),
        *(["", _gate(found)] if "gate" in found else []),
    ]


def _parts(found: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(level, set, figures): all sets together, then each."""
    for level in (name for name in LEVELS if name in found):
        yield level, "all" if "sets" in found else "", found[level]
        for name, parts in found.get("sets", {}).items():
            if level in parts:
                yield level, name, parts[level]


def _headline(found: Mapping[str, Any]) -> Iterator[str]:
    wide = max(len(name) for _, name, _ in _parts(found)) + 2
    yield "balanced accuracy, lower bound first (95 %: 2,000 draws of whole cases within set and class)"
    spans = "".join(f"{title:<23}" for _, title in _SPANS)
    yield f"{'':<{wide + 8}}{spans}{'':>7}{'':>7}{'no':>9}{'':>8}"
    yield f"{'':<{wide + 8}}{'from   value  to       ' * 2}{'n':>7}{'cases':>7}{'answer':>9}{'ECE':>8}{'mAP':>8}"
    last = ""
    for level, name, part in _parts(found):
        three = ("low", "value", "high")
        spans = "".join("".join(f"{words(part[key][k]):<7}" for k in three) + "  " for key, _ in _SPANS)
        yield (
            f"{level if level != last else '':<7} {name:<{wide}}{spans}{part['n']:>7,}{part['cases']:>7,}"
            f"{percent(part['no_answer']):>9}{words(part['calibration_error']):>8}"
            f"{words(part['mean_average_precision']):>8}"
        )
        last = level


def _accounts(no_answer: Sequence[str]) -> list[str]:
    if not no_answer:
        return ["  this model gives every place a class: both accounts are the same"]
    return [
        f"  no answer is wrong: what a user of infer gets; a place called {' or '.join(no_answer)} has no class, and "
        "counts as a mistake",
        "  likeliest class:    the class of the highest probability, also where the model is not sure of it",
    ]


def _classes(found: Mapping[str, Any]) -> Iterator[str]:
    wide = max(len(name) for name in found["classes"])
    sets = max(len(name) for _, name, _ in _parts(found)) + 2
    widths = [max(len(head), 5) + 2 for head in _HEADS]
    heads = "".join(f"{head:>{width}}" for head, width in zip(_HEADS, widths, strict=True))
    yield f"{'':<{sets + 8}}{'class':<{wide}}{'n':>7}{'cases':>7}{heads}"
    for level, name, part in _parts(found):
        start = f"{level:<7} {name:<{sets}}"
        for label, of in part["per_class"].items():
            numbers = "".join(f"{words(of[k]):>{width}}" for k, width in zip(_FIGURES, widths, strict=True))
            yield f"{start}{label:<{wide}}{of['n']:>7,}{of['cases']:>7,}{numbers}"
            start = " " * len(start)


def _answers(found: Mapping[str, Any]) -> Iterator[str]:
    level = next(name for name in ("image", "slide", "cell") if name in found["answers"])
    table = found["answers"][level]
    called = list(next(iter(table.values()))["called"])
    wide = max(len(name) for name in ("what each label is called", *table))
    columns = "".join(f"{name:>{max(8, len(name)) + 2}}" for name in called)
    yield f"{'what each label is called':<{wide}}{level + 's':>8}{'cases':>7}{columns}"
    for label, of in table.items():
        apart = "" if label in found["classes"] else "   (apart: in no figure above)"
        shares = "".join(f"{percent(of['called'][name]):>{max(8, len(name)) + 2}}" for name in called)
        yield f"{label:<{wide}}{of['n']:>8,}{of['cases']:>7,}{shares}{apart}"


def _gate(found: Mapping[str, Any]) -> str:
    gate, least = found["gate"], percent(found["min_drawn"])
    text = f"gate (minimum {gate['minimum']:g}) on {gate['tiles']:,} tiles with masks: "
    if gate["shut_out"] is not None:
        text += f"{percent(gate['shut_out'])} of those with at least {least} drawn are shut out; "
    text += f"mean error of the fraction {words(gate['mean_absolute_error'])}"
    empty = gate.get("false_answers")
    if empty and empty["windows"]:
        text += (
            f"\n  windows of {empty['window_um']:g} µm without anything drawn: {percent(empty['rate'])} of "
            f"{empty['windows']:,} get a class all the same (mean over {empty['cases']} cases "
            f"{percent(empty['rate_mean_over_cases'])})"
        )
    return text


def words(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
