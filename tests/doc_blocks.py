# SPDX-License-Identifier: Apache-2.0
"""The code blocks of a Markdown page, and how a test runs them.

Python blocks of a page run in order in one program, as a reader would; then the shell blocks. An HTML comment before a
block changes that (readers do not see it):

    <!-- example: skip: REASON -->        it cannot run here (it must still be valid Python or shell)
    <!-- example: CI -->                  .ci/run runs these commands itself: it is checked that it does
    <!-- example: root -->                shell: in the root of the repository, not in an empty folder
    <!-- example: two hosts -->           shell: on each of two hosts, of which HOST is one (tests/two_hosts.sh)
    <!-- example: file NAME -->           it is saved as NAME for the blocks after it
    <!-- example: part of PATH -->        it must be found in that file, which has tests of its own
    <!-- example: replace OLD => NEW -->  before it runs
    <!-- example: setup                   Python that runs before it
    ...
    -->
    <!-- example: check                   Python that runs after it
    ...
    -->

A program made of a page has its code on the lines that it has in the page, so that tracebacks point there.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

LANGUAGES = ("python", "sh", "c", "json", "text")  # and the directives of the site's builder: {toctree} ...
MARKER = re.compile(r"<!-- example: (skip: |CI|root|two hosts|file |part of |replace |setup)(.*?)\s*-->", re.DOTALL)


@dataclass
class Block:
    """A fenced block.

    Attributes:
        language: one of LANGUAGES.
        code: its lines.
        line: of the page on which the code starts, from 1.
        skip: why it is not run; empty: it is.
        in_ci: .ci/run runs it.
        at_root: in the root of the repository.
    hosts: on two hosts.
        file: what it is saved as.
        part_of: the file that it must be found in.
        replace: (old, new) pairs.
        around: (first line in the page, code) of setup and check, in the page's order, which is how they run.
    """

    language: str
    code: str
    line: int
    skip: str = ""
    in_ci: bool = False
    at_root: bool = False
    hosts: bool = False
    file: str = ""
    part_of: str = ""
    replace: list[tuple[str, str]] = field(default_factory=list)
    around: list[tuple[int, str]] = field(default_factory=list)

    def replaced(self) -> str:
        """The code that runs."""
        code = self.code
        for old, new in self.replace:
            assert old in code, f"line {self.line}: there is no {old!r} to replace"
            code = code.replace(old, new)
        return code


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in its order.

    Raises:
        AssertionError: a marker without a block, a marker that does not exist, or a language that cannot be tested.
    """
    lines = page.read_text().splitlines()
    blocks: list[Block] = []
    pending: list[tuple[int, str]] = []  # markers of the block to come: line and text
    number = 0
    while number < len(lines):
        line, first = lines[number], number + 1  # of the page, or of what is in the block
        if line.startswith("<!--"):
            while "-->" not in lines[number]:
                number += 1
            text = "\n".join(lines[first - 1 : number + 1])
            if text.startswith("<!-- example: check"):
                assert blocks, f"{page.name}:{first}: a check without a block"
                blocks[-1].around.append((first + 1, _inside(text)))
            elif text.startswith("<!-- example:"):
                pending.append((first, text))
        elif fence := re.match(r"(\s*)```(\S*)\s*$", line):
            while lines[number + 1].strip() != "```":
                number += 1
            code = "".join(f"{inner[len(fence[1]) :]}\n" for inner in lines[first : number + 1])
            blocks.append(_marked(page, Block(fence[2], code, first + 1), pending))
            number += 1
            pending = []
        elif line.strip() and pending:
            break
        number += 1
    assert not pending, f"{page.name}:{pending[0][0]}: a marker without a block: {pending[0][1]}"
    return blocks


def _inside(comment: str) -> str:
    """The code in a comment of several lines."""
    return comment.partition("\n")[2].removesuffix("-->")


def _marked(page: Path, block: Block, comments: list[tuple[int, str]]) -> Block:
    where = f"{page.name}:{block.line}"
    assert block.language in LANGUAGES or block.language.startswith("{"), (
        f"{where}: ```{block.language}: expected one of {', '.join(LANGUAGES)}"
    )
    for at, text in comments:
        marker = MARKER.fullmatch(text)
        assert marker, f"{page.name}:{at}: no such marker: {text}"
        kind, rest = marker[1].strip(), marker[2].strip()
        if kind == "skip:":
            assert len(rest.split()) >= 3, f"{where}: skip: say why"
            block.skip = rest
        elif kind == "CI":
            block.in_ci = True
        elif kind == "root":
            block.at_root = True
        elif kind == "two hosts":
            block.hosts = True
        elif kind == "file":
            block.file = rest
        elif kind == "part of":
            block.part_of = rest
        elif kind == "replace":
            old, arrow, new = rest.partition(" => ")
            assert arrow, f"{where}: replace: expected OLD => NEW"
            block.replace.append((old, new))
        elif kind == "setup":
            block.around.append((at + 1, _inside(text)))
    return block


def program(blocks: list[Block]) -> str:
    """The Python blocks that run, each line where it is in the page."""
    placed: dict[int, str] = {}
    for block in blocks:
        if block.language == "python" and not (block.skip or block.file or block.part_of):
            for first, code in (*block.around, (block.line, block.replaced())):
                placed.update(enumerate(code.splitlines(), first))
    return "\n".join(placed.get(number, "") for number in range(1, max(placed, default=0) + 1)) + "\n"
