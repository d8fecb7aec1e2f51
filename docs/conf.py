# SPDX-License-Identifier: Apache-2.0
"""The documentation site: Sphinx over the Markdown pages of this folder (``make docs``)."""

import sys
import tomllib
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))  # the sources beside these pages, not another moeshard that is installed

project = "moeshard"
author = "the moeshard authors"
release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["examples"]
html_theme = "furo"
html_title = f"moeshard {release}"
html_copy_source = False

myst_heading_anchors = 3
# Links to folders are for readers of the repository: tests/test_docs.py checks every link.
suppress_warnings = ["myst.xref_missing"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes of dataclasses are documented once

KINDS = {"function": "autofunction", "exception": "autoexception", "class": "autoclass", "data": "autodata"}
MEMBERS = {"class": "   :members:\n   :special-members: __call__\n", "exception": "", "function": "", "data": ""}


def setup(app: object) -> None:
    """Sphinx calls this."""
    app.connect("source-read", add_public_names)  # type: ignore[attr-defined]


def add_public_names(app: object, page: str, source: list[str]) -> None:
    """Append every public name to the page ``api``, by the file that it is in."""
    if page == "index":  # pages of parts that this branch does not have
        lines = source[0].splitlines()
        source[0] = "\n".join(line for line in lines if not line.isidentifier() or (DOCS / f"{line}.md").exists())
    if page != "api":
        return
    import moeshard

    parts = []
    for room, names in {**moeshard._ROOMS, "errors": sorted(set(moeshard.__all__) - set(moeshard._ROOM_OF))}.items():
        directives = []
        for name in names:
            kind = kind_of(getattr(moeshard, name))
            directives.append(f".. {KINDS[kind]}:: moeshard.{name}\n{MEMBERS[kind]}")
        rst = "\n".join(directives)
        parts.append(f"\n## {', '.join(names)}\n\n`moeshard/{room}`\n\n```{{eval-rst}}\n{rst}\n```\n")
    source[0] += "".join(parts)


def kind_of(value: object) -> str:
    """Which directive documents it."""
    if isinstance(value, type):
        return "exception" if issubclass(value, BaseException) else "class"
    return "function" if callable(value) and hasattr(value, "__name__") else "data"
