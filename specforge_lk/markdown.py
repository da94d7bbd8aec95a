"""Tables in markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, tight: bool = False
) -> str:
    """Return a table as lines of text, without a newline at its end.

    Args:
        header: The titles of the columns.
        rows: A cell per column each.
        tight: Write the line under the header as ``|---|---|`` and an empty title as one space.
            Some committed pages have it so, and a table is compared with them byte for byte.
    """
    lines = [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)]
    if tight:
        titles = "|".join(f" {title} " if title else " " for title in header)
        lines[:2] = [f"|{titles}|", "|---" * len(header) + "|"]
    return "\n".join(lines)


__all__ = ["markdown_table"]
