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
    lines = [" | ".join(line) for line in (header, *rows)]
    first = f"| {lines[0]} |"
    rule = f"| {' | '.join(['---'] * len(header))} |"
    if tight:
        first, rule = first.replace("|  |", "| |"), "|---" * len(header) + "|"
    return "\n".join([first, rule, *(f"| {line} |" for line in lines[1:])])


__all__ = ["markdown_table"]
