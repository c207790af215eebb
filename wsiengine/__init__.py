"""wsiengine: whole-slide-image inference. Research software, not a medical device.

The public names are listed in ``__all__``; each is imported on first use, so that ``import wsiengine`` is instant.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Box": "geometry",
    "Card": "models.card",
    "Mpp": "geometry",
    "Plan": "planning",
    "Result": "result",
    "Size": "geometry",
    "Slide": "slides.base",
    "TissueMask": "tissue",
    "WsiError": "errors",
    "find_tissue": "tissue",
    "infer": "inference",
    "infer_many": "series",
    "load_model": "models.registry",
    "open_slide": "slides",
    "plan": "planning",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'wsiengine' has no attribute {name!r}")
    return getattr(import_module(f"wsiengine.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
