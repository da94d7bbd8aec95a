"""How far a section is: a bar on a terminal, lines elsewhere."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

T = TypeVar("T")


def cells_of(section: str, cells: Sequence[T], console: Console) -> Iterator[T]:
    """Yield the cells one after the other, showing which one is being measured."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        bar = progress.add_task(section, total=len(cells))
        for number, cell in enumerate(cells, 1):
            progress.update(bar, description=f"{section}: {cell}")
            if not console.is_terminal:
                console.print(f"{section} {number}/{len(cells)}: {cell}")
            yield cell
            progress.advance(bar)
