# SPDX-License-Identifier: Apache-2.0
"""Tables that print: as text, in notebooks as HTML, with rich as a rich table."""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from rich.table import Table


class Tabular(ABC):
    """What a table needs to print: a title, the names of its columns, and rows of as many cells."""

    columns: ClassVar[tuple[str, ...]]

    @abstractmethod
    def title(self) -> str:
        """What the table is about, on one line."""

    @abstractmethod
    def cells(self) -> Iterable[tuple[str, ...]]:
        """The rows."""

    def __str__(self) -> str:
        """Format as a plain-text table."""
        rows = list(self.cells())
        columns = [
            [cell.rjust(width) if right else cell.ljust(width) for cell in column]
            for column in zip(self.columns, *rows, strict=True)
            for width, right in [(max(map(len, column)), _numbers(column[1:]))]
        ]
        return "\n".join([self.title(), *("  ".join(row).rstrip() for row in zip(*columns, strict=True))])

    def _repr_html_(self) -> str:
        rows = list(self.cells())
        sides = ["right" if _numbers(column) else "left" for column in zip(*rows, strict=True)]
        sides = sides or ["left"] * len(self.columns)
        head, *body = (
            "".join(
                f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>'
                for cell, side in zip(row, sides, strict=True)
            )
            for tag, row in (("th", self.columns), *(("td", row) for row in rows))
        )
        lines = "".join(f"<tr>{row}</tr>" for row in body)
        return (
            f"<table><caption>{html.escape(self.title())}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
        )

    def __rich__(self) -> Table:
        """Format as a rich table."""
        from rich.table import Table

        rows = list(self.cells())
        table = Table(title=self.title())
        for number, name in enumerate(self.columns):
            table.add_column(name, justify="right" if _numbers([row[number] for row in rows]) else "left")
        for row in rows:
            table.add_row(*row)
        return table


def _numbers(cells: Sequence[str]) -> bool:
    """Whether a column is one of numbers, which are written below each other to the right."""
    return bool(cells) and all(cell[:1].isdecimal() or cell in ("-", "none") for cell in cells)


def percent(shares: Iterable[float]) -> str:
    """Shares as whole percents.

    Example:
        >>> percent([0.5, 0.495])
        '50% 50%'
    """
    return " ".join(f"{share:.0%}" for share in shares)
