"""One command from labels to a finished model folder, for a group's own classes: :func:`run`.

One fold is never trained on: the figures in the card and the report come from it. Where training may stop early,
another fold decides when.
"""

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from wsiengine.classes import colour_of
from wsiengine.errors import WsiError
from wsiengine.evaluating import score_empty_windows, score_images
from wsiengine.evaluation_report import Account, report
from wsiengine.models.card import load_card
from wsiengine.models.runtime import Runtime
from wsiengine.training.backbones import build
from wsiengine.training.cells import STRIDE_PX, CellNet
from wsiengine.training.crc5 import BACKBONE
from wsiengine.training.data import Field, check_leak
from wsiengine.training.export import export_onnx
from wsiengine.training.figures import GATE_MINIMUM, softmax
from wsiengine.training.loop import Progress, Validate, predictor, train
from wsiengine.training.own import OwnRecipe
from wsiengine.training.report import write_report
from wsiengine.training.schedule import Recipe
from wsiengine.training.scoring import score
from wsiengine.training.slides import Cutting, cut_slides, find_slides, has_slides
from wsiengine.training.tables import FOLDS, Labels, read_labels

MODEL = "model.onnx"
DENSE_BLOCK_PX = 4096


def run(
    recipe: Path | str,
    data: Path,
    out: Path,
    *,
    say: Callable[[str], None] = print,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> Path:
    """Train, test on the held-out fold, export.

    Args:
        recipe: A recipe file, or ``default``.
        data: Labelled images (:mod:`wsiengine.training.tables`) or annotated slides (:mod:`wsiengine.training.slides`).
        out: Where to: ``training/`` (resumed if there), the model's files, ``report.json``, ``report.md`` and
            ``curves.png``.
        say: Told in a line what happens.
        tell: Told of every iteration.

    Returns:
        The model's folder, ready for ``--model``.

    Raises:
        WsiError: The recipe or the labels cannot be used.
    """
    own = OwnRecipe.read(recipe)
    chosen = gather(own, Path(data), out)
    weights = _weights(own, Path(data))
    plan = plan_of(own, chosen, pretrained=weights is not None)
    _check_classes(plan.classes, chosen)
    trained, held_out = plan.chosen(chosen), [f for f in chosen if f.fold == own.test_fold]
    validation = [f for f in chosen if f.fold in plan.validation_folds]
    _check_split(trained, validation, held_out, own)
    if weights is None:
        say(f"no weights for {own.backbone}: it starts from chance, which needs far more images")
    counts = f"train {len(trained)} images, test {len(held_out)}"
    say(counts + (f", stop by {len(validation)}" if validation else "") + f"; classes {', '.join(plan.classes)}")
    gated = any(f.mask is not None for f in trained)
    network = train(
        chosen,
        plan,
        backbone=weights,
        out=out / "training",
        tell=tell,
        validate=_validation(validation, plan, gated, own.tile_px) if validation else None,
    )
    export_onnx(network, out / MODEL, rows=tuple((i, 0.0) for i in range(len(plan.classes))), half=False)
    card = card_of(own, network, (plan.classes, trained), out / MODEL)
    _write_json(out / "card.json", card)
    figures = held_out_figures(out, held_out, own.threads)
    _write_json(out / "report.json", {"recipe": asdict(own), "held_out": figures})
    _write_json(out / "card.json", with_evidence(card, figures))
    write_report(out, own, {"train": trained, "stop": validation, "test": held_out}, figures)
    found = figures["image"]
    low, value, high = (found["balanced_accuracy"][k] for k in ("low", "value", "high"))
    interval = (
        f"{low:.3f}–{high:.3f}, {found['cases']} cases" if found["cases"] > 2 else "too few cases for an interval"
    )
    say(f"held out: balanced accuracy {value:.3f} ({interval})")
    if own.precision:
        from wsiengine.training.precisions import add_precisions

        add_precisions(out, own.precision, trained, held_out, say=say)
    return out


def gather(own: OwnRecipe, data: Path, out: Path) -> list[Field]:
    """The labelled images of a folder, or the tiles of its annotated slides, of wanted classes.

    Raises:
        WsiError: They cannot be used, or a label is unknown.
    """
    labels = Labels(own.classes, own.merge, own.ignore)
    if has_slides(data):
        how = Cutting(own.mpp, own.tile_px, own.tile_overlap, most=own.tiles_per_slide, seed=own.seed)
        return cut_slides(find_slides(data), labels, how, out / "training" / "tiles")
    return labels.chosen(read_labels(data, mpp=own.source_mpp))


def plan_of(own: OwnRecipe, chosen: list[Field], *, pretrained: bool) -> Recipe:
    """The training that a recipe stands for."""
    classes = own.classes or tuple(sorted({f.label for f in chosen}))
    folds = tuple(i for i in range(FOLDS) if i != own.test_fold and i not in own.validated)
    frozen, stages = own.frozen(len(build(own.backbone, 0.1).steps), pretrained=pretrained)
    counts = {name: sum(f.label == name and f.fold in folds for f in chosen) or 1 for name in classes}
    return Recipe(
        classes=classes,
        mpp=own.mpp,
        folds=folds,
        iterations=own.iterations,
        seed=own.seed,
        threads=own.threads,
        sides_px=(max(STRIDE_PX * 2, round(own.tile_px * 5 / 7 / STRIDE_PX) * STRIDE_PX), own.tile_px),
        batches=(own.batch, max(2, own.batch * 3 // 4)),
        rate=own.rate,
        head_rate=own.head_rate,
        schedule=own.schedule,
        frozen_blocks=frozen,
        stages=stages,
        class_weights=own.weights_of(counts),
        label_smoothing=own.label_smoothing,
        backbone=own.backbone,
        validation_folds=own.validated,
        patience=own.patience,
    )


def _check_classes(classes: tuple[str, ...], chosen: list[Field]) -> None:
    if len(classes) < 2:
        raise WsiError(
            f"there is one class, {', '.join(classes)}: needed two or more", hint="label something else, too"
        )
    for name in classes:
        cases = {f.case for f in chosen if f.label == name}
        if len(cases) < 2:
            raise WsiError(
                f"class {name} comes from {len(cases)} case{'s' * (len(cases) != 1)}: training and test need one each",
                hint="add cases, or say which files belong to which case in the column 'case'",
            )


def _check_split(trained: list[Field], validation: list[Field], held_out: list[Field], own: OwnRecipe) -> None:
    for side, fold in ((held_out, own.test_fold), *(((validation, f)) for f in own.validated)):
        if not side:
            what = "test_fold" if fold == own.test_fold else "validation_fold"
            raise WsiError(f"fold {fold} is empty: nothing to score there", hint=f"choose another {what}")
    for one, other in ((trained, held_out), (validation, held_out), (trained, validation)):
        check_leak(one, other)
        _check_copies(one, other)


def _check_copies(one: list[Field], other: list[Field]) -> None:
    """The same picture under two cases is a leak that names do not show."""
    seen = {sha256(f.image.read_bytes()).digest(): f for f in one}
    for field in other:
        twin = seen.get(sha256(field.image.read_bytes()).digest())
        if twin is not None:
            raise WsiError(
                f"{twin.image.name} (case {twin.case}) and {field.image.name} (case {field.case}) are the same "
                "picture, one in training and one in test",
                hint="remove one, or give both the same case",
            )


def _validation(fields: list[Field], plan: Recipe, gated: bool, tile_px: int) -> Validate:
    """Balanced accuracy of images; of two networks that are as often right, the one that is surer of it is better."""

    def validate(network: CellNet) -> dict[str, float]:
        scores = score(fields, predictor(network), plan.mpp, classes=plan.classes, gated=gated, tile_px=tile_px)
        images = scores.by_field()
        right = softmax(images.logits)[np.arange(len(images.labels)), images.labels]
        loss = float(-np.log(np.maximum(right, 1e-6)).mean())
        recalls = [(images.logits.argmax(1) == k)[images.labels == k] for k in range(len(plan.classes))]
        balanced = float(np.mean([r.mean() for r in recalls if len(r)]))
        return {
            "score": round(balanced - 0.01 * loss, 6),
            "balanced_accuracy": round(balanced, 4),
            "loss": round(loss, 4),
        }

    return validate


def _weights(own: OwnRecipe, data: Path) -> Path | None:
    """The file of weights; None where a backbone other than MobileNetV2 has none.

    Raises:
        WsiError: There is no such file.
    """
    if own.weights is None and own.backbone != "mobilenet_v2":
        return None
    places = [Path(own.weights)] if own.weights else [data / BACKBONE, data / BACKBONE.name]
    for place in places:
        if place.is_file():
            return place
    hint = "download mobilenet_v2_1.0_224 (int8) from the Coral test data and name it as 'weights' in the recipe"
    raise WsiError(
        f"the weights of {own.backbone} are not at {' or '.join(map(str, places))}",
        hint=hint if own.backbone == "mobilenet_v2" else "correct the path",
    )


def _evaluation(own: OwnRecipe) -> str:
    words = ["wsiengine", "evaluate", "--model", own.name, "--data", "DIR", "--folds", str(own.test_fold)]
    words += [word for label, name in own.merge.items() for word in ("--map", f"{label}={name}")]
    words += ["--source-mpp", f"{own.source_mpp:g}"] if own.source_mpp else []
    return shlex.join(words)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def held_out_figures(folder: Path, held_out: list[Field], threads: int) -> dict[str, Any]:
    """What ``wsiengine evaluate`` says of the finished folder on these fields."""
    card = load_card(folder / "card.json")
    runtime = Runtime(card, device="cpu", threads=threads)
    empty = score_empty_windows(card, held_out, runtime) if card.gate else None
    return report(score_images(card, held_out, runtime), Account.of(card), empty=empty)


def with_evidence(card: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    """The card with what the held-out fold says of each class."""
    tested = figures["image"]["per_class"]
    said = {name: {"cases_tested": of["cases"], "recall": of["recall"]} for name, of in tested.items()}
    classes = [info | {"evidence": info["evidence"] | said[info["name"]]} for info in card["classes"]]
    return card | {"classes": classes}


def card_of(
    own: OwnRecipe, network: CellNet, training: tuple[tuple[str, ...], list[Field]], model: Path
) -> dict[str, Any]:
    """Card v1 of a trained network, as yet without held-out fields; ``training``: its classes, and its fields."""
    classes, trained = training
    gated = any(f.mask is not None for f in trained)
    backbone = network.backbone

    def evidence(name: str) -> dict[str, Any]:
        return {"cases_trained": len({f.case for f in trained if f.label == name})}

    dense = None
    if backbone.halo_px is not None:
        dense = {"block_px": DENSE_BLOCK_PX, "halo_px": backbone.halo_px, "offset_px": backbone.offset_px}
    return {
        "schema_version": 1,
        "name": own.name,
        "version": "1.0",
        "task": "classify",
        "description": f"{', '.join(classes)}; {own.backbone}, trained on {len(trained)} images.",
        "classes": [{"name": n, "colour": list(colour_of(n)), "evidence": evidence(n)} for n in classes],
        "input": {"size_px": own.tile_px, "mpp": own.mpp, "layout": "NHWC", "dtype": "uint8", "range": [0, 255]},
        "outputs": {"scores": "logits", "cam": "cam"}
        | ({"gate": "epithelium", "gate_map": "epithelium_map"} if gated else {}),
        "activation": "softmax",
        "output_stride_px": STRIDE_PX,
        "dense": dense,
        "gate": {"minimum": GATE_MINIMUM, "otherwise": "No tissue of interest"} if gated else None,
        "resources": [{"file": model.name, "sha256": sha256(model.read_bytes()).hexdigest()}],
        "precision": {"weights": "float32", "arithmetic": "float32", "against_torch": "1e-4 in logits"},
        "licence": own.licence,
        "intended_use": own.intended_use,
        "training_command": f"wsiengine train RECIPE --data DIR (seed {own.seed}, {own.iterations} iterations)",
        "evaluation_command": _evaluation(own) if trained[0].source != "slides" else "",
    }
