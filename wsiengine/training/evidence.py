"""Writes on the card of a bundled model what ``wsiengine evaluate`` says of it::

    python -m wsiengine.training.evidence --model wsiengine/models/zoo/crc5 --data DIR --folds 0

The command that was run stands on the card, so that whoever has the data gets the same figures. The sets that it takes
(``--sets own``) are ``sets.json`` in the model's folder. Prints the rows of the table in docs/crc5.md.
"""

import argparse
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from wsiengine.cli import main as wsiengine
from wsiengine.errors import WsiError
from wsiengine.labelled_sets import FILE
from wsiengine.models.integrity import file_sha256

ABOUT = "Normal, adenoma and adenocarcinoma in H&E-stained colorectal tissue; MobileNetV2, fine-tuned."


def command(model: str, data: str, folds: str) -> list[str]:
    """What gives the figures; on the card ``data`` is ``DIR``."""
    return ["wsiengine", "evaluate", "--model", model, "--data", f"{data}/crc", "--sets", "own", "--folds", folds]


def measure(folder: Path, data: Path, folds: str) -> dict[str, Any]:
    """The report of the command.

    Raises:
        WsiError: The command failed; it has said why.
    """
    said = io.StringIO()
    with redirect_stdout(said):
        code = wsiengine([*command(str(folder), str(data), folds)[1:], "--json"])
    if code:
        raise WsiError(f"{folder} could not be evaluated: {said.getvalue().strip()}")
    found: dict[str, Any] = json.loads(said.getvalue())
    return found


def write_evidence(folder: Path, report: Mapping[str, Any], folds: str) -> None:
    """Write a report into ``figures.json`` and onto ``card.json``."""
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    figures = {k: v for k, v in figures.items() if k != "false_diagnosis"} | {"held_out": dict(report)}
    _write(folder / "figures.json", figures, 1)
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    sets = json.loads((folder / FILE).read_text(encoding="utf-8"))
    card["description"] = describe(figures, sets)
    for info in card["classes"]:
        trained = info.get("asserted_as", info["name"])
        evidence = info["evidence"]
        (evidence[trained] if "asserted_as" in info else evidence).update(
            _tested(report["image"]["per_class"][trained])
        )
    card["evaluation_command"] = shlex.join(command(card["name"], "DIR", folds))
    listed = {r["file"]: r for r in card["resources"]}
    for name in ("figures.json", FILE):
        listed[name] = {"file": name, "sha256": file_sha256(folder / name)}
    card["resources"] = list(listed.values())
    _write(folder / "card.json", card, 2)


def _tested(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "cases_tested": found["cases"],
        "images_tested": found["n"],
        "recall": _short(found["recall"]),
        "recall_likeliest_class": _short(found["recall_likeliest"]),
        "auroc": _short(found["auroc"]),
    }


def describe(figures: Mapping[str, Any], sets: Mapping[str, Any]) -> str:
    """The card's description: lower bounds first, by both accounts."""
    image = figures["held_out"]["image"]
    strict, likeliest = image["balanced_accuracy"], image["balanced_accuracy_likeliest"]
    scales = ", ".join(f"{name} {_down_across(one['mpp'])}" for name, one in sets.items())
    return (
        f"{ABOUT} Held-out balanced accuracy of images, lower bound of 95 % by cases first: {_span(strict)} where "
        f"uncertain places and those without epithelium count as wrong, {_span(likeliest)} with the likeliest class "
        f"({image['n']} images of {image['cases']} cases, {figures['split']}){_elsewhere(figures)}. "
        f"µm/px taken for the training sets (down × across), measured against GlaS: {scales}."
    )


def page_rows(report: Mapping[str, Any]) -> list[str]:
    """The rows of the table in docs/crc5.md."""
    rows = []
    for level in ("image", "tile", "case"):
        parts = {"all": report, **report.get("sets", {})}
        for name, part in parts.items():
            found = part[level]
            spans = [found[key] for key in ("balanced_accuracy", "balanced_accuracy_likeliest")]
            bounds = " | ".join(f"{s['low']:.3f} | **{s['value']:.3f}** | {s['high']:.3f}" for s in spans)
            recall, ranking = (_three(found["per_class"], key) for key in ("recall", "auroc"))
            rows.append(
                f"| {level}, {name} | {bounds} | {found['n']:,} ({found['cases']}) | {recall} | {ranking} | "
                f"{found['calibration_error']:.3f} |"
            )
    return rows


def _three(classes: Mapping[str, Mapping[str, Any]], key: str) -> str:
    digits = 3 if key == "auroc" else 2
    return " · ".join("–" if of[key] is None else f"{of[key]:.{digits}f}" for of in classes.values())


def _elsewhere(figures: Mapping[str, Any]) -> str:
    """The same training on laboratories that it did not see: each left out, or all but one."""
    splits = figures.get("splits", {})
    titles = [t for t in splits if t.startswith("without-")] or [t for t in splits if t.startswith("only-")]
    found = [
        f"{source} {f['balanced_accuracy']}"
        for title in titles
        for source, f in splits[title]["rule"].items()
        if source != "all"
    ]
    return f"; shorter trainings of its kind on a laboratory that they did not see: {', '.join(found)}" if found else ""


def _span(found: Mapping[str, float]) -> str:
    return f"from {found['low']:.3f}: {found['value']:.3f} (to {found['high']:.3f})"


def _down_across(mpp: float | Sequence[float]) -> str:
    across, down = mpp if isinstance(mpp, Sequence) else (mpp, mpp)
    return f"{down} × {across}"


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _write(file: Path, value: Any, indent: int) -> None:
    file.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m wsiengine.training.evidence", description="Measure a model.")
    parser.add_argument("--model", type=Path, required=True, help="the model's folder; its card is rewritten")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds crc/")
    parser.add_argument("--folds", default="0", help="that it was not trained on (default 0)")
    asked = parser.parse_args(arguments)
    report = measure(asked.model, asked.data, asked.folds)
    write_evidence(asked.model, report, asked.folds)
    print("\n".join(page_rows(report)))


if __name__ == "__main__":
    main()
