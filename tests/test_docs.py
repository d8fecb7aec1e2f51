# SPDX-License-Identifier: Apache-2.0
"""The documentation as a whole: its links lead somewhere, its pictures are small, notebooks are stored without outputs.

What the pages show is run by test_examples.py and `make notebooks`; `make docs` builds the site, warnings are errors.
"""

import importlib.util
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest

import moeshard
from moeshard import palette

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def script(name: str) -> ModuleType:
    """A script of docs/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in LINK.findall(text):
        if not target.startswith(("https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = re.findall(r"```\{toctree\}(.*?)```", (ROOT / "docs/index.md").read_text(), re.DOTALL)
    patterns = [line for block in contents for line in block.splitlines() if line and not line.startswith(":")]
    for page in PAGES[1:]:
        listed = [pattern for pattern in patterns if page.relative_to(ROOT / "docs").with_suffix("").match(pattern)]
        assert len(listed) == (page.name != "index.md"), f"{page.name}: {listed}"


def test_pictures_are_small_and_all_are_shown() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for picture in sorted((ROOT / "docs/images").iterdir()):
        assert f"images/{picture.name}" in text, picture.name
        assert picture.stat().st_size < 150_000, picture.name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs_and_checks_what_it_shows(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    assert any("assert " in "".join(cell["source"]) for cell in cells)
    assert f"notebooks/{path.name}" in (ROOT / "docs/notebooks.md").read_text()


def test_every_public_name_is_in_the_reference() -> None:
    conf = script("conf")
    page = [(ROOT / "docs/api.md").read_text()]
    conf.add_public_names(None, "api", page)
    for name in moeshard.__all__:
        assert f":: moeshard.{name}\n" in page[0], name
    other = [""]
    conf.add_public_names(None, "numerics", other)
    assert other == [""]


def test_a_picture_of_a_terminal_shows_its_last_state_and_needs_no_font_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    record = script("record_demo")
    program = (
        "import sys; sys.stdout.write('10 %\\r50 %\\r100 %\\n\\x1b[1mbold\\x1b[0m\\n'); print(sys.stdout.isatty())"
    )
    shown = record.screen(record.run([sys.executable, "-c", program]))
    assert shown.splitlines() == ["100 %", "\x1b[1mbold\x1b[0m", "True"]
    picture = record.svg(shown)
    assert "100&#160;%" in picture and "50&#160;%" not in picture
    assert not re.search(r"url\((?!#)|@font-face", picture)
    ElementTree.fromstring(picture)
    with pytest.raises(RuntimeError, match="status 3"):
        record.run([sys.executable, "-c", "raise SystemExit(3)"])


def test_colours_are_in_one_place_and_each_can_be_told_without_colour() -> None:
    sources = [*ROOT.glob("moeshard/**/*.py"), *ROOT.glob("docs/*.py"), *NOTEBOOKS]
    assert len(sources) > 40
    for path in sources:
        if path.name != "palette.py":
            assert not re.search(r"#[0-9A-Fa-f]{6}\b", path.read_text()), path.name
    colours = {*palette.RANKS, *palette.STEPS.values()}
    assert len(colours) == len(palette.RANKS)
    assert len({palette.area(colour)["hatch"] for colour in colours}) == len(colours)
    assert len({palette.line(colour)["marker"] for colour in colours}) == len(colours)


def test_the_figures_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = script("draw")
    monkeypatch.setattr(draw, "IMAGES", tmp_path)
    draw.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["columns.png", "steps.png", "waiting.png"]
