"""The pages of the documentation, as things to be tested: their code blocks, tables and links."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line of the first line of code, code) of every fenced block in a language."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, found.start()) + 2, found[2]) for found in _FENCE.finditer(text) if found[1] == language
    ]


def links(page: Path) -> list[str]:
    """Targets of the links outside code that stay inside the repository."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return [target for target in _LINK.findall(text) if "://" not in target and not target.startswith("mailto:")]


def anchors(page: Path) -> set[str]:
    """What ``page#…`` may point to: its headings, as hosting sites name them."""
    heads = re.findall(r"^#+ (.*)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads}


def section(page: Path, title: str) -> str:
    """The text under the heading ``## title``."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert found, f"{page.name} has no section {title!r}"
    return found[1]


def first_cells(text: str) -> list[str]:
    """The first cell of each row of the tables in a text."""
    rows = [line for line in text.splitlines() if line.startswith("| ") and not set(line) <= set("|- ")]
    return [row.split(" | ")[0].removeprefix("| ").strip() for row in rows]
