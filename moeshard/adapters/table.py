# SPDX-License-Identifier: Apache-2.0
"""The table of model families in docs/models.md; ``python -m moeshard.adapters.table docs/models.md`` writes it."""

import re
import sys
from importlib import import_module
from pathlib import Path

from . import FAMILIES, Family


def families() -> list[Family]:
    """What each adapter says of itself."""
    return [import_module(f".{name}", __package__).FAMILY for name in FAMILIES]


def markdown() -> str:
    """A table, then the quirks of each family."""
    rows = [
        "| models | what is replaced | transformers | experts | routing |",
        "|---|---|---|---|---|",
        *(f"| {f.name} | {f.replaces} | {f.transformers} | {f.experts} | {f.routing} |" for f in families()),
    ]
    quirks = [line for f in families() for line in (f"\n**{f.name}**\n", *(f"- {quirk}" for quirk in f.quirks))]
    return "\n".join([*rows, *quirks])


def main(path: Path) -> None:
    """Put the table between its marks in a page."""
    page = path.read_text()
    path.write_text(
        re.sub(r"(<!-- families -->\n).*?(\n<!-- end -->)", lambda m: m[1] + markdown() + m[2], page, flags=re.S)
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
