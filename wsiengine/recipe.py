"""The recipe of normalisation, as a card's JSON or as ``--normalise`` write it, checked in words. Pure: no slide.

On the command line steps are joined by ``+`` and settings follow a colon::

    macenko
    macenko+clahe
    reinhard:target=reference.png+clahe:region_um=64,clip=2

A target picture is fitted when the recipe is read, so that a recipe holds numbers only and two recipes are equal when
they do the same.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsiengine.errors import CardError, PlanError, WsiError

Settings = dict[str, Any]

# Strong amounts (99th percentile) and vectors of the reference of Macenko et al. 2009; for Lab a round mean over
# colorectal H&E of three laboratories; H-DAB vectors of Ruifrok & Johnston 2001.
_HE = {"vectors": [[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]], "strengths": [1.9705, 1.0308]}
_HDAB = {"vectors": [[0.650, 0.704, 0.286], [0.268, 0.570, 0.776]], "strengths": [1.2, 1.1]}
_HE_LAB = {"mean": [60.0, 30.0, -24.0], "deviation": [13.0, 8.5, 9.5]}
TARGETS: dict[str, dict[str, Settings]] = {
    "density": {"builtin:he": _HE, "builtin:hdab": _HDAB},
    "lab": {"builtin:he": _HE_LAB},
}

_STAIN: Settings = {"target": "builtin:he", "stains": "he", "residual": True}
_DEFAULTS: dict[str, Settings] = {
    "window": {"low": 0, "high": 65535},
    "macenko": _STAIN,
    "vahadane": _STAIN,
    "standard": _STAIN,
    "reinhard": {"target": "builtin:he"},
    "grey": {},
    "demean": {},
    "whiten": {"mode": "channel"},
    "background": {"sigma_um": 50.0},
    "clahe": {"region_um": 64.0, "clip": 2.0, "channel": "lab"},
    "tile_clahe": {"clip": 2.0, "grid": 8},
    "tile_whiten": {"mode": "channel"},
}
_CHOICES = {"stains": ("he", "hdab"), "mode": ("channel", "pca"), "channel": ("lab", "haematoxylin")}
_NARROWEST_DEG = 8  # between the two vectors of a target
# Steps of published studies that look at each tile by itself: seams and all, after every step that knows the slide.
TILE_STEPS = ("tile_clahe", "tile_whiten")
STAIN_STEPS = ("macenko", "vahadane", "standard", "reinhard")
READING_STEPS = ("window",)  # done while a 12- or 16-bit picture is read


@dataclass(frozen=True, slots=True)
class Recipe:
    """Steps in the order in which they are applied; every setting is filled in."""

    steps: tuple[Mapping[str, Any], ...] = ()

    def __str__(self) -> str:
        """Unambiguous: part of a run's identity."""
        return "+".join(_text(step) for step in self.steps) or "none"

    def __bool__(self) -> bool:
        return bool(self.steps)

    @property
    def window(self) -> tuple[float, float] | None:
        """Values of a 12- or 16-bit picture that become black and white; None for 8 bits."""
        return next(((s["low"], s["high"]) for s in self.steps if s["step"] == "window"), None)


def parse_recipe(steps: Sequence[Mapping[str, Any]] | str) -> Recipe:
    """A recipe from a card's list of steps or from a command line's text; ``none`` or nothing is the empty recipe.

    Raises:
        PlanError: The text names an unknown step, setting or value, or steps in the wrong order.
        CardError: The card's list does.
    """
    kind: type[WsiError] = PlanError if isinstance(steps, str) else CardError
    raw = _split(steps) if isinstance(steps, str) else list(steps)
    parsed = tuple(_step(step, kind) for step in raw)
    order = [list(_DEFAULTS).index(step["step"]) for step in parsed]
    if (
        order != sorted(order)
        or len(set(order)) < len(order)
        or sum(step["step"] in STAIN_STEPS for step in parsed) > 1
    ):
        names = " + ".join(step["step"] for step in parsed)
        raise kind(
            f"the recipe {names} cannot be applied: one stain step first (or a window before it), then grey, demean, "
            "whiten, background, CLAHE, and last what is done tile by tile, each once.",
            hint="for example macenko+clahe.",
        )
    return Recipe(parsed)


def _split(text: str) -> list[Settings]:
    """``a:k=v,k=v+b`` → steps; values that look like JSON numbers, lists or words true and false are read as such."""
    if text.strip() in ("", "none"):
        return []
    steps = []
    for part in text.split("+"):
        name, _, settings = part.strip().partition(":")
        step: Settings = {"step": name}
        for setting in filter(None, settings.split(",")):
            key, equals, value = setting.partition("=")
            if not equals:
                raise PlanError(f"in {text!r}, {setting!r} is not a setting.", hint="write it as clahe:clip=2.")
            step[key.strip()] = _value(value.strip())
        steps.append(step)
    return steps


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _step(step: Mapping[str, Any], kind: type[WsiError]) -> Settings:
    name = step.get("step") if isinstance(step, Mapping) else None
    if not isinstance(name, str) or name not in _DEFAULTS:
        raise kind(f"{name!r} is no step of normalisation.", hint=f"use {', '.join(_DEFAULTS)}, or none.")
    defaults = dict(_DEFAULTS[name])
    if step.get("stains") == "hdab" and "stains" in defaults:
        defaults["target"] = "builtin:hdab"
    unknown = set(step) - {"step"} - set(defaults)
    if unknown:
        raise kind(
            f"the step {name} has no setting {', '.join(sorted(map(str, unknown)))}.",
            hint=f"its settings are {', '.join(defaults) or 'none'}.",
        )
    filled: Settings = {"step": name, **defaults, **step}
    for key, value in filled.items():
        _check(name, key, value, kind)
    if name == "window" and filled["low"] >= filled["high"]:
        raise kind(f"window: high must be above low, not {filled['high']:g} and {filled['low']:g}.")
    if "target" in filled:
        filled["target"] = _target(filled, kind)
    return filled


def _check(name: str, key: str, value: Any, kind: type[WsiError]) -> None:
    if key in _CHOICES and value not in _CHOICES[key]:
        raise kind(f"{name}: {key} must be {' or '.join(_CHOICES[key])}, not {value!r}.")
    number = _is_number(value) and math.isfinite(value)
    if key in ("clip", "region_um", "sigma_um") and not (number and value > 0):
        raise kind(f"{name}: {key} must be a number above zero, not {value!r}.")
    if key in ("low", "high") and not number:
        raise kind(f"{name}: {key} must be a number, not {value!r}.")
    if key == "grid" and not (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 64):
        raise kind(f"{name}: grid must be a whole number from 1 to 64, not {value!r}.")
    if key == "residual" and not isinstance(value, bool):
        raise kind(f"{name}: residual must be true or false, not {value!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _target(step: Settings, kind: type[WsiError]) -> Settings:
    """The target as numbers: built in, written out, or fitted to a reference picture."""
    space = "lab" if step["step"] == "reinhard" else "density"
    target = step["target"]
    if isinstance(target, Mapping):
        return _written_target(dict(target), TARGETS[space]["builtin:he"], kind)
    if isinstance(target, str) and target in TARGETS[space]:
        return TARGETS[space][target]
    if isinstance(target, str) and target.startswith("builtin:"):
        raise kind(f"{step['step']} has no target {target!r}.", hint=f"use {', '.join(TARGETS[space])} or a picture.")
    if kind is CardError:  # a card is complete in itself and checked by its sums: it opens no picture
        raise kind(f"{step['step']}: a card's target is built in or written as numbers, not {target!r}.")
    if not isinstance(target, str) or not Path(target).is_file():
        raise kind(f"the target {target!r} of {step['step']} is no picture that can be found.")
    from wsiengine.fitting import fit_target

    return fit_target(step["step"], Path(target), step.get("stains", "he"))


def _written_target(target: Settings, model: Settings, kind: type[WsiError]) -> Settings:
    def shape(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [shape(v) for v in value]
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

    if set(target) != set(model) or any(shape(target[key]) != shape(model[key]) for key in model):
        raise kind(f"a target is written as {json.dumps(model)}, not {json.dumps(target, default=str)}.")
    spread = target["strengths"] if "strengths" in target else target["deviation"]
    if min(spread) <= 0:
        raise kind(f"the strengths or deviations of a target must be above zero, not {json.dumps(spread)}.")
    if "vectors" in target and not _two_stains(*target["vectors"]):
        raise kind(
            f"the vectors of a target must be two different stains of numbers from zero up, not "
            f"{json.dumps(target['vectors'])}.",
            hint=f"two stains absorb at least {_NARROWEST_DEG}° apart.",
        )
    return target


def _two_stains(one: Sequence[float], two: Sequence[float]) -> bool:
    """Whether both absorb light and point in different directions: else no matrix can tell them apart."""
    lengths = math.hypot(*one) * math.hypot(*two)
    if min(*one, *two) < 0 or lengths == 0:
        return False
    return sum(a * b for a, b in zip(one, two, strict=True)) / lengths < math.cos(math.radians(_NARROWEST_DEG))


def _text(step: Mapping[str, Any]) -> str:
    """A step with the settings that differ from the defaults; numbers of a target that is not built in follow."""
    defaults = _DEFAULTS[step["step"]]
    space = "lab" if step["step"] == "reinhard" else "density"
    names = {json.dumps(target, sort_keys=True): name for name, target in TARGETS[space].items()}
    shown = {k: v for k, v in step.items() if k != "step"}
    if "target" in shown:
        text = json.dumps(shown["target"], sort_keys=True)
        shown["target"] = names.get(text, text)
    settings = [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in shown.items() if v != defaults.get(k)]
    return step["step"] + (":" + ",".join(settings) if settings else "")
