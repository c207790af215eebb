"""Your own labels: a folder per class, or a ``labels.csv``; and folds that keep every case on one side.

``labels.csv`` has the columns ``file`` and ``class`` (or ``grade``), and may have ``case`` (or ``patient``), ``fold``
(0–4), ``mask`` (tissue that the class is about), ``mpp`` (µm/px) and ``slide``. Without it, every sub-folder is a
class, and a folder below that is a case.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

from wsiengine.datasets.sheets import read_sheet
from wsiengine.errors import WsiError
from wsiengine.training.data import Field

FOLDS = 5
IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
NO_FOLD = -1
ALIASES = {"grade": "class", "patient": "case"}


@dataclass(frozen=True)
class Labels:
    """Which labels are wanted, and as what.

    Attributes:
        classes: Wanted; empty: all that there are.
        merge: Label → class, for those that are to be merged or renamed.
        ignore: Labels that are left out.
    """

    classes: tuple[str, ...] = ()
    merge: Mapping[str, str] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()

    def label_of(self, name: str, where: str) -> str | None:
        """The class that a label trains; None where it is left out.

        Raises:
            WsiError: The label is neither a class nor merged nor left out; ``where`` says whose it is.
        """
        label = self.merge.get(name, name)
        if name in self.ignore or label in self.ignore:
            return None
        if self.classes and label not in self.classes:
            raise WsiError(
                f"{where} is called '{name}', which is none of {', '.join(self.classes)}",
                hint="correct it, or name it in the recipe: under classes, merge or ignore",
            )
        if ":" in label:  # the card would refuse it, after the training
            raise WsiError(
                f"{where} is called '{label}': a model's class has no ':', which stands for derived classes in QuPath",
                hint='rename it in the recipe, as in "merge": {"Tumour: Positive": "Positive tumour"}',
            )
        return label

    def chosen(self, fields: Sequence[Field]) -> list[Field]:
        """The fields of wanted classes, relabelled."""
        found = [(f, self.label_of(f.finding, f"{f.image.parent.name}/{f.image.name}")) for f in fields]
        return [replace(f, label=label) for f, label in found if label is not None]


def check_folds(fields: Sequence[Field], where: str) -> None:
    """Refuse folds that only some rows have, and a case that is in two of them.

    Raises:
        WsiError: Naming up to five cases.
    """
    without = sum(f.fold == NO_FOLD for f in fields)
    if 0 < without < len(fields):
        raise WsiError(
            f"{where}: {without} of {len(fields)} rows have no fold",
            hint="give every row a fold, or leave the column out",
        )
    folds = defaultdict(set)
    for f in fields:
        folds[f.case].add(f.fold)
    if torn := sorted(case for case, of_case in folds.items() if len(of_case) > 1):
        raise WsiError(
            f"{where}: {len(torn)} case{'s are' if len(torn) > 1 else ' is'} in two folds: {', '.join(torn[:5])}",
            hint="a case belongs to one fold, so that it is never on both sides of a split",
        )


def read_labels(
    data: Path,
    *,
    merge: Mapping[str, str] | None = None,
    mpp: float | None = None,
    where: Mapping[str, str] | None = None,
) -> list[Field]:
    """Every labelled image below ``data``.

    Args:
        data: The folder.
        merge: Label -> class, for those that are to be merged or renamed.
        mpp: µm/px of images whose table does not say.
        where: Column -> value that a row of labels.csv must have.

    Raises:
        WsiError: Nothing there, a class without images, a file that is missing, µm/px unknown, half of the folds given.
    """
    if not data.is_dir():
        raise WsiError(
            f"there is no folder {data}", hint="give the folder that holds labels.csv, or one folder per class"
        )
    table = data / "labels.csv"
    rows = read_table(table, ("file", "class"), "image") if table.is_file() else _rows_of_folders(data)
    kept = _where(rows, where or {}, table)
    if any(row.get("fold") for row in rows):
        fields = [_field(data, row, merge or {}, mpp) for row in kept]
        check_folds(fields, str(table))
        return fields
    # Folds are those of the whole table, whichever rows are wanted.
    fields = split_by_case([_field(data, row, merge or {}, mpp) for row in rows])
    return [f for f, row in zip(fields, rows, strict=True) if row in kept]


def _where(rows: list[dict[str, str]], where: Mapping[str, str], table: Path) -> list[dict[str, str]]:
    """The rows that have these values."""
    for column, value in where.items():
        said = sorted({row.get(column, "") for row in rows} - {""})
        if value not in said:
            raise WsiError(
                f"no row of {table} has {column} = {value}",
                hint=f"there it is {', '.join(said[:8])}" if said else f"its columns are {', '.join(rows[0])}",
            )
        rows = [row for row in rows if row[column] == value]
    return rows


def split_by_case(fields: Sequence[Field], folds: int = FOLDS) -> list[Field]:
    """The same fields with folds: whole cases, every label of the set spread as evenly as its cases allow.

    The set's own labels count, not what they are mapped to: a fold that a training left out is the same fold for
    whoever evaluates it with other words.
    Cases go by a hash of their name into the fold that has fewest cases of their class, so that the same labels always
    give the same folds.
    """
    classes = defaultdict(list)
    for f in fields:
        classes[f.case].append(f.finding)
    main = {case: Counter(sorted(labels)).most_common(1)[0][0] for case, labels in classes.items()}
    place: dict[str, int] = {}
    load: Counter[tuple[str, int]] = Counter()
    for case in sorted(main, key=lambda name: sha256(name.encode()).digest()):
        fold = min(range(folds), key=lambda f: (load[main[case], f], sum(load[c, f] for c in set(main.values())), f))
        load[main[case], fold] += 1
        place[case] = fold
    return [replace(f, fold=place[f.case]) for f in fields]


def read_table(table: Path, needed: tuple[str, str], unit: str) -> list[dict[str, str]]:
    """The rows of a CSV file, columns by the names of :data:`ALIASES`; a cell that a row lacks is empty.

    Args:
        table: The file.
        needed: The columns without which it means nothing.
        unit: What a row stands for.

    Raises:
        WsiError: It is no CSV in UTF-8, has no rows, or a needed column is missing.
    """
    said, cells = read_sheet(table)
    rows = [{ALIASES.get(name, name): value for name, value in row.items()} for row in cells]
    missing = [name for name in needed if name not in {ALIASES.get(name, name) for name in said}]
    if missing or not rows:
        what = f"no column {' and '.join(missing)}" if missing else "no rows"
        raise WsiError(f"{table} has {what}", hint=f"it needs the columns {' and '.join(needed)}, one row per {unit}")
    return rows


def _rows_of_folders(data: Path) -> list[dict[str, str]]:
    folders = sorted(p for p in data.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(folders) < 2:
        raise WsiError(
            f"{data} has {len(folders)} folders and no labels.csv: needed two classes or more",
            hint="put the images of each class into a folder of its name, or beside each slide its annotations "
            "(a.svs and a.geojson)",
        )
    rows = []
    for folder in folders:
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES)
        if not files:
            raise WsiError(f"the class folder {folder} is empty", hint=f"add images ({', '.join(IMAGES)}) or remove it")
        for file in files:
            inside = file.relative_to(folder)
            case = f"{folder.name}/{inside.parts[0]}" if len(inside.parts) > 1 else str(file.relative_to(data))
            rows.append({"file": str(file.relative_to(data)), "class": folder.name, "case": case})
    return rows


def fold_and_mpp(row: Mapping[str, str], name: str) -> tuple[int, float | None]:
    """Fold and µm/px of a row, where it has any; ``name`` is what it is called in an error.

    Raises:
        WsiError: They are no numbers, or there is no such fold.
    """
    try:
        fold = int(row["fold"]) if row.get("fold") else NO_FOLD
        mpp = float(row["mpp"]) if row.get("mpp") else None
    except ValueError as error:
        raise WsiError(f"{name}: {error}", hint="mpp and fold are numbers") from error
    if fold not in range(NO_FOLD, FOLDS):
        raise WsiError(f"{name} is in fold {fold}", hint="folds are 0 to 4")
    return fold, mpp


def _field(data: Path, row: dict[str, str], merge: Mapping[str, str], mpp: float | None) -> Field:
    image = data / row["file"]
    if not image.is_file():
        raise WsiError(f"{data / 'labels.csv'} names {row['file']}, which is not there", hint="correct the row")
    label = row["class"].strip()
    if not label:
        raise WsiError(f"{data / 'labels.csv'}: {row['file']} has no class", hint="give it one, or remove the row")
    fold, stated = fold_and_mpp(row, f"{data / 'labels.csv'}: {row['file']}")
    said = mpp if stated is None else stated
    if said is None or not 0.05 <= said <= 20:
        raise WsiError(
            f"µm/px of {row['file']} is {'missing' if said is None else said}: needed 0.05 to 20",
            hint="add a column mpp, or say source_mpp in the recipe, or --source-mpp to evaluate and quantise",
        )
    return Field(
        image=image,
        mask=data / row["mask"] if row.get("mask") else None,
        source="data",
        label=merge.get(label, label),
        finding=label,
        case=row.get("case") or row["file"],
        fold=fold,
        mpp_yx=(said, said),
        slide=row.get("slide", ""),
    )
