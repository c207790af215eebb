"""The output folder: who may write to it, what state it is in, and how results get into place.

States: empty · unfinished (``.work/journal`` exists) · finished (``run.json`` exists; it is moved in last).

Whatever names are changed is synced in the order in which it must be believed after a power cut: the way to the journal
before its first record, all results before ``run.json``, ``run.json`` before the journal goes.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from wsiengine import __version__
from wsiengine.errors import OutputConflict, OutputError, OutputInUse
from wsiengine.journal import FolderLock, Journal, Recovered, in_words, read_journal, sync_folder, sync_tree
from wsiengine.scratch import Scratch

RESULTS = ("annotations.geojson", "probability.zarr", "overlay.png", "run.json")
OPTIONAL_RESULTS = (
    "attribution.png",
    "attribution.zarr",
    "profile.png",
    "objects.zarr",
    "tiles.geojson",
    "annotations.part*.geojson",
    "tiles.part*.geojson",
)
_DRAFTS = "results"
_OVERWRITING = "overwriting"  # holds the version that began to replace another run
_WORDS = {
    "slide": "the slide",
    "model": "the model",
    "version": "the version of wsiengine",
    "card": "the model's card",
    "mpp": "the slide's µm/px",
    "overlap": "the overlap",
    "region": "the region",
    "tissue": "the tissue mask",
    "normalise": "the normalisation",
    "provider": "the device",
    "batch_size": "the batch size",
    "cam": "the class of the activation map",
    "on_bad_tile": "what happens to unreadable tiles",
    "threshold": "the threshold",
    "smoothing_um": "the smoothing",
    "tolerance_um": "the tolerance",
    "min_area_um2": "the least area",
    "tiles": "the wish for tile objects",
    "classes": "the choice of classes",
}


def kept_batch_size(folder: Path, identity: Mapping[str, Any]) -> int | None:
    """Tiles per batch of the run in ``folder``, finished or not, if that alone tells it from ``identity``.

    Only runs on a GPU have one: a run that met a full device went on with less, and so must whoever resumes it.
    """
    finished, journal = finished_run(folder), folder / ".work" / "journal"
    there = finished.get("identity", {}) if finished else read_journal(journal).header if journal.exists() else {}
    theirs, ours = dict(there.get("parameters", {})), dict(identity["parameters"])
    kept, asked = theirs.pop("batch_size", None), ours.pop("batch_size", None)
    same = {**there, "parameters": theirs} == {**identity, "parameters": ours}
    return int(kept) if same and kept and kept != asked else None


def finished_run(folder: Path) -> dict[str, Any] | None:
    """``run.json`` of a finished run; None where there is none.

    Raises:
        OutputError: There is one, but it cannot be read.
    """
    path = folder / "run.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise OutputError(f"{folder} is a file, not a folder.", hint="give another folder with -o.") from None
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read: {error}.", hint="--overwrite starts the run anew.") from error


class Workspace:
    """The ``.work`` folder of one run: lock, journal and half-made results. A context manager.

    On entry it takes the lock and says whether the run is finished; :meth:`journal` opens or resumes the journal;
    :meth:`publish` moves the results into place.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.folder = folder
        self.work = folder / ".work"
        self.finished: dict[str, Any] | None = None
        self._identity = dict(identity)
        self._overwrite = overwrite
        self._lock: FolderLock | None = None
        self._dropped = False  # what has the name of our .work since then is another's

    def __enter__(self) -> "Workspace":
        if not self._overwrite and self._look():
            self._tidy()
            return self
        self._lock = self._locked()
        try:
            if self._overwrite:
                if not self._overwriting():
                    self._clear()
            elif not self._look():
                self._refuse_strangers()
        except BaseException:  # Ctrl-C too must let the lock go; the error goes on
            self._leave()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        taken = self._taken() if isinstance(error, OutputError) else None
        self._leave()
        if taken is not None:  # then that is why something could not be written
            raise taken from error

    def _locked(self) -> FolderLock:
        while True:
            make_folder(self.work)
            try:
                return FolderLock(self.work / "lock")
            except OutputError as error:  # a run that ends takes its .work away: also just after we made sure of it
                if self.work.exists() or not isinstance(error.__cause__, FileNotFoundError):
                    raise

    def _check(self) -> None:
        """To be called before anything is changed.

        Raises:
            OutputInUse: Another run has taken the folder over.
        """
        if self._lock is not None:
            self._lock.check()

    def _leave(self) -> None:
        """Let the lock go, and leave no empty ``.work`` behind."""
        if self._lock is None:
            return
        if self._taken():  # all is another's, but for drafts in a folder of our own
            if self._lock.owner:
                shutil.rmtree(self.results, ignore_errors=True)
        elif not self._dropped and not (self.work / "journal").exists():
            self._drop()
        self._lock.release()

    def _drop(self) -> None:
        """Take away ``.work`` with the lock in it: another run may begin."""
        shutil.rmtree(self.work, ignore_errors=True)
        self._dropped = True

    def _taken(self) -> OutputInUse | None:
        """What says that another run has taken the folder over, if so."""
        try:
            self._check()
        except OutputInUse as error:
            return error
        except OutputError:  # the share does not answer: nobody can say
            pass
        return None

    @property
    def results(self) -> Path:
        """Where results are made: of this run alone, where another might take the folder over meanwhile."""
        owner = "" if self._lock is None else self._lock.owner
        return self.work / (f"{_DRAFTS}.{owner}" if owner else _DRAFTS)

    def journal(self) -> tuple[Journal, Recovered]:
        """The journal of this run, with what an interrupted run left in it.

        Raises:
            OutputConflict: The unfinished run is of another slide, model or parameters.
        """
        journal, recovered = self._open_journal()
        journal.guard = self._check
        return journal, recovered

    def _open_journal(self) -> tuple[Journal, Recovered]:
        path = self.work / "journal"
        if not path.exists():
            return self._new_journal()
        there = read_journal(path)
        if not there.begun and _flat(there.header) != _flat(self._identity):
            return self._new_journal()  # it ended before its first block: there is nothing to lose
        refuse_other(self.folder, there.header, self._identity, "an unfinished run")
        return Journal.resume(path, apart=self._lock is not None and self._lock.took_over)

    def _new_journal(self) -> tuple[Journal, Recovered]:
        return Journal.create(self.work / "journal", self._identity), Recovered(self._identity, {}, ())

    def scratch(self) -> Scratch:
        """Makes the arrays that grow with the slide; their files lie beside the journal."""
        return Scratch(self.work)

    def draft(self) -> Path:
        """An empty folder for the results to be made in."""
        self._check()
        self._drop_drafts()
        make_folder(self.results)
        return self.results

    def _drop_drafts(self) -> None:
        for path in self.work.glob(f"{_DRAFTS}*"):
            shutil.rmtree(path, ignore_errors=True)  # a run that slept may wake, and take its own away

    def publish(self) -> None:
        """Sync the drafted results, move them into place by rename, ``run.json`` last, and drop ``.work``."""
        sync_tree(self.results)
        self._check()  # syncs take as long as a share hangs
        self._drop_old_extras()
        for path in sorted(self.results.iterdir()):
            if path.name != "run.json":
                self._check()
                _remove(self.folder / path.name)
                path.rename(self.folder / path.name)
        sync_folder(self.folder)
        self._check()
        (self.results / "run.json").rename(self.folder / "run.json")
        sync_folder(self.folder)
        self.forget()

    def _drop_old_extras(self) -> None:
        """Optional files of an attempt that was killed while it published, and that wanted more of them than this."""
        for pattern in OPTIONAL_RESULTS:
            for path in self.folder.glob(pattern):
                if not (self.results / path.name).exists():
                    _remove(path)

    def forget(self) -> None:
        """Drop the journal and all unfinished work."""
        self._check()
        (self.work / "journal").unlink()
        self._drop()

    def _look(self) -> bool:
        """Whether this very run is finished; refuses another's."""
        run = finished_run(self.folder)
        if run is None:
            return False
        refuse_other(self.folder, run.get("identity", {}), self._identity, "a finished run")
        self.finished = run
        return True

    def _tidy(self) -> None:
        """Drop the ``.work`` of a run that ended between publishing and tidying up, unless that is going on now."""
        if self.work.exists():
            try:
                self._lock = FolderLock(self.work / "lock")
            except OutputError:  # in use, or in a folder that may only be read: the results are there all the same
                return
            self._drop()

    def _overwriting(self) -> bool:
        """Whether an interrupted run of these very arguments has cleared the folder already: then it goes on.

        Only a run of the same version counts: ``--overwrite`` is also the way to drop what an older one got wrong.
        """
        marker, journal = self.work / _OVERWRITING, self.work / "journal"
        if not marker.exists() or marker.read_text() != __version__ or not journal.exists():
            return False
        try:
            return _flat(read_journal(journal).header) == _flat(self._identity)
        except OutputError:  # damaged
            return False

    def _refuse_strangers(self) -> None:
        """Files of our names that no run of ours accounts for are not overwritten silently."""
        if (self.work / "journal").exists():
            return
        there = [name for name in RESULTS if (self.folder / name).exists()]
        if there:
            raise OutputConflict(
                f"{self.folder} already holds {', '.join(there)}, but no record of the run that made it.",
                hint="give another folder with -o, or --overwrite to replace it.",
            )

    def _clear(self) -> None:
        """Forget what is there, the marker of completion first."""
        for name in (_OVERWRITING, "journal", "journal.new"):
            _remove(self.work / name)
        self._drop_drafts()
        for name in ("run.json", *RESULTS, *OPTIONAL_RESULTS):
            for path in self.folder.glob(name):
                _remove(path)
        with in_words(self.folder):
            sync_folder(self.folder)
            (self.work / _OVERWRITING).write_text(__version__)


_OTHER = "give another folder with -o, or --overwrite to start anew."


def refuse_other(
    folder: Path, there: Mapping[str, Any], wanted: Mapping[str, Any], what: str, hint: str = _OTHER
) -> None:
    """Raise :class:`OutputConflict`, naming the difference, unless both identities (or settings) are the same."""
    old, new = _flat(there), _flat(wanted)
    different = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if not different:
        return
    details = "; ".join(
        f"{_WORDS.get(key, key)} differs"
        + ("" if key in ("slide", "model", "card", "region") else f" ({old.get(key)} there, {new.get(key)} now)")
        for key in different
    )
    raise OutputConflict(
        f"{folder} holds {what} with other settings: {details}.",
        hint=hint,
    )


def refuse_gaps(folder: Path, files: Iterable[str]) -> None:
    """Raise :class:`OutputError` where somebody has taken away a file of a finished run."""
    gone = [name for name in files if not (folder / name).exists()]
    if gone:
        raise OutputError(
            f"{folder} holds a finished run, but no longer its {', '.join(gone)}.",
            hint="`wsiengine export` makes annotations anew from probability.zarr; --overwrite runs everything again.",
        )


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in identity.items() if k != "parameters"}, **identity.get("parameters", {})}


def make_folder(folder: Path) -> None:
    """Make a folder with those above it, and make their names durable."""
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in made:
            sync_folder(path.parent)
    except FileExistsError:
        raise OutputError(f"{folder} is a file, not a folder.", hint="give another folder with -o.") from None
    except OSError as error:
        raise OutputError(
            f"Cannot make the folder {folder}: {error.strerror}.", hint="give a writable folder with -o."
        ) from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
