# SPDX-License-Identifier: Apache-2.0
"""Every example runs: those in docstrings, and every code block of README.md and docs/ (tests/doc_blocks.py)."""

import doctest
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import family_models
import pytest
from doc_blocks import Block, blocks_of, program
from test_demo import checkpoint

import moeshard

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ROOMS = [
    room.name
    for room in pkgutil.walk_packages(moeshard.__path__, "moeshard.")
    if room.name.rpartition(".")[2] not in ("_core", "_cuda", "_worker", "__main__")
]
NAME = re.compile(r'from_pretrained\((?:[\w.]+, )?"([\w-]+/[\w.-]+)"')  # of a checkpoint on the hub

# What lies in the folder of a page under the names of the hub's checkpoints: small ones, with seeded weights.
CHECKPOINTS = {
    "google/switch-base-8": checkpoint,
    "google/switch-base-128": checkpoint,
    "mistralai/Mixtral-8x7B-v0.1": lambda folder: family_models.mixtral().save_pretrained(folder),
    "nomic-ai/nomic-embed-text-v2-moe": lambda folder: family_models.save_nomic(family_models.nomic(), folder),
}


@pytest.mark.parametrize("name", ROOMS)
def test_examples_of_a_room_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0, "see the captured output"


def pages(*languages: str) -> list[object]:
    """The pages that have blocks of these languages to run."""
    found = []
    for page in PAGES:
        blocks = [block for block in blocks_of(page) if block.language in languages]
        if any(not (block.skip or block.in_ci or block.part_of) for block in blocks):
            found.append(pytest.param(page, id=page.name))
    return found


def test_every_page_has_blocks_that_can_be_read() -> None:
    assert sum(len(blocks_of(page)) for page in PAGES) > 20


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", pages("python", "sh"))
def test_code_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    blocks = blocks_of(page)
    for name in NAME.findall(page.read_text()):
        if not (tmp_path / name).exists():
            CHECKPOINTS[name](tmp_path / name)  # a folder of that name wins over the hub
    for block in blocks:
        if block.file:
            (tmp_path / block.file).write_text(block.replaced())
    source = program(blocks)
    if source.strip():
        (tmp_path / f"{page.stem}.md.py").write_text(source)
        run([sys.executable, f"{page.stem}.md.py"], tmp_path)
    for block in blocks:
        if block.language != "sh" or block.skip or block.in_ci:
            continue
        command = ["bash", "-euo", "pipefail", "-c", block.replaced()]
        if block.hosts:
            if os.geteuid():
                pytest.skip("making two hosts needs root")
            command[-1] = command[-1].replace("HOST", "host-a")
            command = [str(ROOT / "tests/two_hosts.sh"), *command]
        said = run(command, ROOT if block.at_root else tmp_path)
        assert not block.hosts or "gloo" in said, "ranks of two hosts cannot share memory"


def run(command: list[str], folder: Path) -> str:
    """What a command says if it is run as a reader would: with this Python's commands, without the hub."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder / "modules"),
        "OMP_WAIT_POLICY": "passive",
    }
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=580, env=environment
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def blocks(*languages: str) -> list[object]:
    return [
        pytest.param(page, block, id=f"{page.name}:{block.line}")
        for page in PAGES
        for block in blocks_of(page)
        if block.language in languages
    ]


@pytest.mark.parametrize(("page", "block"), blocks("python", "sh", "c", "json"))
def test_what_is_not_run_is_valid_all_the_same(page: Path, block: Block) -> None:
    if block.part_of:
        source = (ROOT / block.part_of).read_text()
        assert block.code in source, f"not in {block.part_of}:\n{block.code}"
    elif block.language == "json":
        json.loads(block.code)
    elif block.language == "c":
        pytest.fail("C that no test compiles: say which file it is part of")
    elif block.language == "python":
        compile(block.code, page.name, "exec")
    elif block.in_ci:
        for command in re.sub(r" #.*", "", block.code).splitlines():
            assert in_ci(command), f".ci/run does not run: {command}"
    else:
        subprocess.run(["bash", "-n", "-c", block.code], check=True, timeout=60)


def in_ci(command: str) -> bool:
    """Whether .ci/run runs a command, perhaps with options of its own."""
    words = command.split()
    if not words:
        return True
    script = (ROOT / ".ci/run").read_text()
    if words[0] == "make":
        return bool(re.search(rf"^\s*make (?:[^#\n]* )?{words[1]}(?![\w-])", script, re.MULTILINE))
    return command.strip() in script


def test_markers_do_what_they_say(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "text\n\n<!-- example: setup\nx = 1\n-->\n```python\ny = x + HERE\n```\n\n<!-- example: check\nassert y == 3\n"
        "-->\n\nMore.\n\n<!-- example: skip: needs two hosts -->\n```python\nnever()\n```\n"
        "<!-- example: file a.py -->\n<!-- example: replace B => C -->\n```python\nB\n```\n"
        "<!-- example: CI -->\n```sh\nmake demo   # why\n```\n"
    )
    first, skipped, saved, command = blocks_of(page)
    first.replace.append(("HERE", "2"))
    exec(program([first, skipped, saved, command]), {})
    assert program([first]).splitlines()[3] == "x = 1" and program([first]).splitlines()[6] == "y = x + 2"
    assert program([first]).splitlines()[10] == "assert y == 3"
    assert skipped.skip == "needs two hosts"
    assert (saved.file, saved.replaced()) == ("a.py", "C\n")
    assert command.in_ci and in_ci("make demo") and not in_ci("make never")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("```\nx\n```\n", "expected one of python", id="no-language"),
        pytest.param("<!-- example: skip: no -->\n```python\n```\n", "say why", id="no-reason"),
        pytest.param("<!-- example: skipp: a b c -->\n```python\n```\n", "no such marker", id="misspelt"),
        pytest.param("<!-- example: root -->\n\ntext\n", "a marker without a block", id="lost"),
    ],
)
def test_markers_that_do_nothing_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(AssertionError, match=message):
        blocks_of(tmp_path / "page.md")


def test_a_replacement_that_replaces_nothing_is_refused() -> None:
    with pytest.raises(AssertionError, match="no 'old' to replace"):
        Block("python", "x\n", 1, replace=[("old", "new")]).replaced()
