"""Every error that a user can meet, as one tree.

::

    WsiError                      base: catch this one
    ├── SlideError                the slide cannot be used
    │   ├── SlideNotFound         (FileNotFoundError)  no such file, or a folder without slides
    │   ├── UnsupportedSlide      (ValueError)         not a brightfield slide, or a format nobody here reads
    │   ├── UnreadableSlide       (OSError)            damaged or truncated
    │   └── ResolutionError       (ValueError)         µm/px missing, absurd, or far from the model's
    ├── ModelError                the model cannot be used
    │   ├── UnknownModel          (LookupError)        no such bundled or registered model, no such file
    │   ├── CardError             (ValueError)         the card is invalid, or disagrees with the ONNX file
    │   ├── IntegrityError        (ValueError)         wrong sha256, a pickle, a file outside the model's folder
    │   ├── DownloadError         (OSError)            a model could not be fetched
    │   ├── ProviderError         (RuntimeError)       asked for CUDA and got something else
    │   ├── DeviceMemoryError     (MemoryError)        the device has no room for a batch
    │   └── ScoreError            (ArithmeticError)    the model returned NaN or infinity
    ├── PlanError                 (ValueError)         the run cannot be planned
    │   ├── NothingToAnalyse                           no tissue, or no tile inside the region
    │   ├── RegionError                                the region is unusable or outside the slide
    │   └── MemoryLimitError                           the plan would not fit
    ├── OutputError               (OSError)            the output folder cannot be used
    │   ├── OutputConflict                             it holds another slide's, model's or parameters' run
    │   └── OutputInUse                                another run is writing to it
    └── DependencyError           (ImportError)        a package is missing, or two exclude each other

A message says what we got and what we needed; ``hint`` says what to try.
"""


class WsiError(Exception):
    """Base of all errors meant for the user.

    Args:
        message: What happened: what we got, what we needed.
        hint: What the user can try next, as a sentence.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nTry: {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple:
        return _rebuild, (type(self), self.message, self.hint)


def _rebuild(kind: type[WsiError], message: str, hint: str | None) -> WsiError:
    return kind(message, hint=hint)


class SlideError(WsiError):
    """The slide cannot be used."""


class SlideNotFound(SlideError, FileNotFoundError):
    """No such file, or a folder without slides."""


class UnsupportedSlide(SlideError, ValueError):
    """Not a brightfield slide, or a format that no reader here takes."""


class UnreadableSlide(SlideError, OSError):
    """The file is damaged, truncated, or a region of it cannot be decoded."""


class ResolutionError(SlideError, ValueError):
    """µm/px is missing, absurd, or far from what the model needs."""


class ModelError(WsiError):
    """The model cannot be used."""


class UnknownModel(ModelError, LookupError):
    """No bundled or registered model of that name, and no such file."""


class CardError(ModelError, ValueError):
    """The model card is invalid, or disagrees with the ONNX file."""


class IntegrityError(ModelError, ValueError):
    """Wrong sha256, a pickle, or a file outside the model's folder."""


class DownloadError(ModelError, OSError):
    """A model could not be fetched: no such address, no connection, or one that broke."""


class ProviderError(ModelError, RuntimeError):
    """The requested device cannot be had."""


class DeviceMemoryError(ModelError, MemoryError):
    """The device has no room for a batch."""


class ScoreError(ModelError, ArithmeticError):
    """The model returned NaN or infinity."""


class PlanError(WsiError, ValueError):
    """The run cannot be planned."""


class NothingToAnalyse(PlanError):
    """There is no tissue, or no tile inside the region."""


class RegionError(PlanError):
    """The region is unusable or lies outside the slide."""


class MemoryLimitError(PlanError):
    """The plan would not fit into memory."""


class OutputError(WsiError, OSError):
    """The output folder cannot be used."""


class OutputConflict(OutputError):
    """The output folder holds the run of another slide, model or parameters."""


class OutputInUse(OutputError):
    """Another run is writing to the output folder."""


class DependencyError(WsiError, ImportError):
    """A package is missing, or two exclude each other."""
