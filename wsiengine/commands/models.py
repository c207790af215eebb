"""``wsiengine models``: what can be run, what a card says, and adding others' models."""

import argparse
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsiengine.models.parts import AgainstTiles, ClassInfo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    listing = actions.add_parser("list", help="all bundled and added models (the default)")
    show = actions.add_parser("show", help="the card of a model")
    show.add_argument("name", metavar="NAME", help="name or folder")
    add = actions.add_parser("add", help="check a model and remember it: a folder, file, archive or https address")
    add.add_argument("source", metavar="SOURCE", help="holds card.json, or config.json of the WSInfer zoo")
    add.add_argument("--trust", action="store_true", help="convert TorchScript, which can run any code when opened")
    add.add_argument("--sha256", metavar="HEX", help="that the fetched file must have")
    add.add_argument("--name", help="another name than the model's own")
    for sub in (listing, show):
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print as JSON")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    if args.action == "show":
        return _show(args.name, as_json=args.json)
    if args.action == "add":
        return _add(args)
    return _list(as_json=args.json)


def _add(args: argparse.Namespace) -> int:
    from wsiengine.models.adding import Asked, add

    card = add(args.source, Asked(args.trust, args.sha256, args.name, _progress()))
    print(f"added    {card.name} {card.version}: `wsiengine infer SLIDE --model {card.name}`")
    print(f"licence  {card.licence}" + (f" ({card.terms})" if card.terms else ""))
    return 0


def _progress() -> Callable[[int, int | None], None]:
    """Tells of every tenth of a download."""
    told = 0

    def tell(done: int, total: int | None) -> None:
        nonlocal told
        step = max((total or 0) // 10, 10 << 20)
        if done // step > told or done == total:
            told = 0 if done == total else done // step
            of = f" of {total / 1e6:,.1f}" if total else ""
            print(f"fetch    {done / 1e6:,.1f}{of} MB", flush=True)

    return tell


def _list(*, as_json: bool) -> int:
    from wsiengine.models.registry import list_models

    entries = list_models()
    if as_json:
        print(json.dumps([_entry_facts(e) for e in entries], ensure_ascii=False, indent=2))
        return 0
    for entry in entries:
        facts = _entry_facts(entry)
        words = facts["problem"] or f"{facts['task']} · {facts['input']} · {', '.join(facts['classes'])}"
        print(f"{entry.name:<12}{facts['version'] or '':<6}{facts['source']:<12}{words}")
    return 0


def _entry_facts(entry: object) -> dict:
    card = getattr(entry, "card", None)
    return {
        "name": getattr(entry, "name", None),
        "version": card.version if card else None,
        "source": getattr(entry, "source", None),
        "task": card.task if card else None,
        "input": f"{card.input.size_px} px at {card.input.resolution}" if card else None,
        "classes": [c.name for c in card.map_classes] if card else [],
        "licence": card.licence if card else None,
        "problem": getattr(entry, "problem", None),
    }


def _show(name: str, *, as_json: bool) -> int:
    from wsiengine.models.registry import load_model

    card = load_model(name)
    if as_json:
        print(json.dumps(card.to_json(), ensure_ascii=False, indent=2))
        return 0
    lines = [
        ("model", f"{card.name} {card.version} · {card.task}"),
        ("about", card.description),
        ("use", card.intended_use),
        ("licence", card.licence + (f" ({card.terms})" if card.terms else "")),
        ("input", f"{card.input.size_px} px at {card.input.resolution}, cell {card.output_stride_px} px"),
        ("file", f"{card.model_resource.file} · sha256 {card.sha256}"),
    ]
    if card.gate:
        lines.append(("gate", f"below {card.gate.minimum:g}: {card.gate.otherwise}"))
    if card.uncertain:
        lines.append(("uncertain", f"best class below {card.uncertain.below:g}: {card.uncertain.name}"))
    lines += [(name, _precision_words(of)) for name, of in card.precision.items() if isinstance(of, dict)]
    if card.dense and card.dense.against_tiles:
        lines.append(("dense", _dense_words(card.dense.against_tiles)))
    for label, text in lines:
        if text:
            print(f"{label:<11}{text}")
    for info in card.classes:
        print(f"{'class':<11}{_class_words(info)}")
    if card.second:
        print(f"{'then':<11}a second model looks at each object, {card.second.input.size_px} px")
        for info in card.second.classes:
            print(f"{'type':<11}{_class_words(info)}")
        for info in card.second.head.classes if card.second.head else ():
            print(f"{'verdict':<11}{_class_words(info)}")
    if card.training_command:
        print(f"{'trained by':<11}{card.training_command}")
    if card.evaluation_command:
        print(f"{'figures by':<11}{card.evaluation_command}")
    return 0


def _precision_words(found: Mapping[str, Any]) -> str:
    """What a number format costs, in words; empty where the card does not say."""
    if not {"agreement", "loss_points", "tiles"} <= found.keys():
        return ""
    points = found["loss_points"]
    lost = f"{points:.1f} points of balanced accuracy lost" if points >= 0.05 else "no balanced accuracy lost"
    return f"the same answer on {100 * found['agreement']:.1f} % of {found['tiles']:,} held-out tiles, {lost}"


def _dense_words(found: "AgainstTiles") -> str:
    """What dense windows change, in words."""
    right = f"{100 * found.right_dense:.1f} % right, as isolated tiles {100 * found.right_tiles:.1f} %"
    return f"the class of isolated tiles on {100 * found.agreement:.1f} % of {found.tiles:,} labelled tiles; {right}"


def _class_words(info: "ClassInfo") -> str:
    asserted = f" → shown as {info.asserted_as}" if info.asserted_as else ""
    evidence = " · ".join(f"{k.replace('_', ' ')}: {v}" for k, v in info.evidence.items())
    return f"{info.name}{asserted}" + (f" · {evidence}" if evidence else "")
