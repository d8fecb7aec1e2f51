# SPDX-License-Identifier: Apache-2.0
"""Tables that print: as text, in notebooks as HTML, with rich as a rich table."""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections.abc import Iterable
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
        rows = [self.columns, *self.cells()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self.title(), *lines])

    def _repr_html_(self) -> str:
        head, *body = (
            "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
            for tag, row in (("th", self.columns), *(("td", row) for row in self.cells()))
        )
        rows = "".join(f"<tr>{row}</tr>" for row in body)
        return (
            f"<table><caption>{html.escape(self.title())}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        )

    def __rich__(self) -> Table:
        """Format as a rich table."""
        from rich.table import Table

        table = Table(*self.columns, title=self.title())
        for row in self.cells():
            table.add_row(*row)
        return table


def percent(shares: Iterable[float]) -> str:
    """Shares as whole percents.

    Example:
        >>> percent([0.5, 0.495])
        '50% 50%'
    """
    return " ".join(f"{share:.0%}" for share in shares)
