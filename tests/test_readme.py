"""What the README and the other pages say is so: snippets run, commands parse, tables and figures match the code."""

import argparse
import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import wsiengine
from tests import planted_slides as planted
from tests.documents import PAGES, ROOT, anchors, blocks, first_cells, links, name_of, section
from wsiengine.classes import COLOURS
from wsiengine.cli import COMMANDS, _parser
from wsiengine.geometry import Box, Size
from wsiengine.inference import infer

README, USAGE, OUTPUTS, PYTHON = (
    ROOT / name for name in ("README.md", "docs/usage.md", "docs/outputs.md", "docs/python.md")
)
SIZE = Size(1403, 2011)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = planted.paint(SIZE, [(planted.A, Box(400, 500, 900, 1100))], tissue=Box(100, 150, 1300, 1850))
    return planted.write(tmp_path_factory.mktemp("slide") / "slide.svs", pixels)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_on_a_page_runs(page: Path, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slide.svs").symlink_to(slide)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for line, code in blocks(page, "python"):
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)  # errors name the page's own line


def test_the_readme_needs_eight_lines() -> None:
    _, code = blocks(README, "python")[0]
    assert len([line for line in code.splitlines() if line.strip()]) == 8


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")], ids=name_of)
def test_commands_on_a_page_exist(page: Path) -> None:
    commands = [command for _, block in blocks(page, "bash") for line in block.splitlines() for command in parts(line)]
    assert commands
    for words in commands:
        program = Path(words[0]).name
        if program == "wsiengine":
            assert parses(words[1:]), words
        elif program.startswith("python") and words[1] == "-m" and words[2].startswith("wsiengine"):
            assert importlib.util.find_spec(words[2]), words
        elif program.startswith("python") and words[1] != "-m":
            assert (ROOT / words[1]).is_file(), words


def parts(line: str) -> list[list[str]]:
    """A line of shell as commands, each a list of words; comments and settings of variables dropped."""
    commands = [shlex.split(text, comments=True) for text in line.split("&&")]
    return [words for command in commands if (words := [w for w in command if not re.match(r"[A-Z_]+=", w)])]


def parses(words: list[str]) -> bool:
    command = next((word for word in words if not word.startswith("-")), None)
    try:
        return bool(_parser(command)[0].parse_args(words))
    except SystemExit as stop:
        return stop.code == 0  # --help, --version


def test_a_wrong_command_would_be_seen() -> None:
    for wrong in ("infer", "infer slide.svs --overlop 0.3", "nothing slide.svs", "export out --format xml"):
        assert not parses(wrong.split()), wrong


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_a_command_are_all_described(command: str) -> None:
    described = section(USAGE, command)
    assert f"[`{command}`](#{command})" in USAGE.read_text("utf-8")
    assert COMMANDS[command] in USAGE.read_text("utf-8")
    known = {option for parser in all_parsers(command) for option in option_names(parser)} - {"-h", "--help", "--debug"}
    told = {
        option
        for text in re.findall(r"`([^`]*)`", described)
        for option in re.findall(r"(?<![\w-])--?[a-z][\w-]*", text)
    }
    missing = {name for name in known if name.startswith("--")} - told
    assert not missing, f"not in docs/usage.md: {missing}"
    rows = {word for cell in first_cells(described) for word in re.findall(r"(?<![\w-])--?[a-z][\w-]*", cell)}
    assert rows <= known, f"no such options: {rows - known}"


def test_recipes_are_described_as_they_are() -> None:
    from wsiengine.recipe import _DEFAULTS, parse_recipe

    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section(USAGE, "infer").split("### Recipes")[1], re.MULTILINE))
    assert list(rows) == list(_DEFAULTS)
    for name, settings in _DEFAULTS.items():
        like = rows["macenko"] if rows[name].startswith("the same") else rows[name]
        for key, value in settings.items():
            assert f"`{key}={json.dumps(value).strip(chr(34))}`" in like, (name, key)
    for recipe in ("macenko", "macenko+clahe", "clahe:region_um=64,clip=2"):
        assert recipe in section(USAGE, "infer")
        assert parse_recipe(recipe)


def test_events_are_described_as_they_are() -> None:
    sources = [path.read_text("utf-8") for path in (ROOT / "wsiengine").rglob("*.py")]
    kinds = {kind for source in sources for kind in re.findall(r'\bEvent\("(\w+)"', source)} | {"error"}
    [told] = re.findall(r"`event` is (.*?)\. \|$", section(USAGE, "infer"), re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", told)) == kinds


def all_parsers(command: str) -> list[argparse.ArgumentParser]:
    """The parser of a command, and those of its actions."""
    found = [subparser(_parser(command)[0], command)]
    for action in found[0]._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += action.choices.values()
    return found


def subparser(parser: argparse.ArgumentParser, command: str) -> argparse.ArgumentParser:
    [actions] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return actions.choices[command]


def option_names(parser: argparse.ArgumentParser) -> list[str]:
    return [name for action in parser._actions for name in action.option_strings]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_of(page)} links to {target}"
        assert not anchor or anchor in anchors(file), f"{name_of(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_are_finished(page: Path) -> None:
    text = page.read_text("utf-8")
    assert not re.findall(r"@@|TODO|TBD|FIXME|\?\?\?", text)
    assert text.count("```") % 2 == 0


def test_outputs_are_described_as_they_are(slide: Path, tmp_path: Path) -> None:
    tiles = wsiengine.inference.Outputs(tiles=True)
    result = infer(slide, "planted", tmp_path / "out", outputs=tiles, profile=True, cam="Mark A")
    files = {cell.strip("`") for cell in first_cells(OUTPUTS.read_text("utf-8").split("## ")[0])} - {"file"}
    assert files == {path.name for path in result.folder.iterdir()}
    assert {cell.strip("`") for cell in first_cells(section(OUTPUTS, "run.json"))} - {"key"} == set(result.run)
    told = section(OUTPUTS, "annotations.geojson")
    for annotation in result.annotations:
        for name in annotation.measurements:
            assert f"`{re.sub(r' Mark .', ' <class>', name)}`" in told, name
    from wsiengine.annotations import read_geojson

    for name in read_geojson(result.folder / "tiles.geojson")[0].measurements:
        assert f"`{re.sub(r' Mark .', ' <class>', name)}`" in told, name


def test_colours_are_described_as_they_are() -> None:
    rows = re.findall(r"^\| ([A-Z][\w ]+) \| (\d+), (\d+), (\d+) \|$", OUTPUTS.read_text("utf-8"), re.MULTILINE)
    assert {name: (int(r), int(g), int(b)) for name, r, g, b in rows} == COLOURS


def test_every_public_name_is_described() -> None:
    text = PYTHON.read_text("utf-8")
    names = set(wsiengine.__all__) - {"__version__"}
    assert len(names) == 15, "docs/python.md says fifteen"
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", text)] == []


def test_figures_of_crc5_are_those_of_its_card() -> None:
    card = json.loads((ROOT / "wsiengine/models/zoo/crc5/card.json").read_text("utf-8"))
    [stated] = re.findall(r"^\| crc5 (\S+) \| (.*) \|$", README.read_text("utf-8"), re.MULTILINE)
    assert stated[0] == card["version"]
    numbers = re.findall(r"0\.\d+", stated[1])
    assert numbers
    assert [n for n in numbers if n not in card["description"]] == []


def test_ci_runs_the_commands_of_the_readme() -> None:
    text = README.read_text("utf-8")
    script = (ROOT / ".ci/run").read_text("utf-8")
    for name in re.findall(r"^readme (\w+)$", script, re.MULTILINE):
        assert re.search(rf"^<!-- {name} -->\n```bash\n[^\n]+\n```$", text, re.MULTILINE), f"{name} is not one command"
    assert script.rstrip().endswith("readme test"), "the tests' closing line is the last of all"
