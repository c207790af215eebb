"""CSV files as spreadsheets save them and hands edit them: read, or refused in words."""

import csv
from pathlib import Path

from wsiengine.errors import WsiError


def read_sheet(file: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and the rows of a CSV file; a cell that a row lacks is empty, one too many is left out.

    Raises:
        WsiError: It is no CSV in UTF-8.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, restval="")
            names = list(reader.fieldnames or ())
            return names, [{name: row[name] for name in names} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise WsiError(f"{file} cannot be read as a table: {error}", hint="save it as CSV in UTF-8") from error
