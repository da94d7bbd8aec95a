"""What becomes of rows that cannot be used: the first ends a command, or all are counted.

`specforge_lk.data.jsonl` reads rows; here something is made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from specforge_lk.data.jsonl import MOST_LEFT_OUT, Malformed, Place, RowError

_Made = TypeVar("_Made")
_Held = TypeVar("_Held")
#: Most fields of a row that a message names.
_NAMED = 8


class MalformedRow(ValueError):
    """A row that is no conversation or prompt; the message names the field and the value."""


class LeftOut(Malformed):
    """What becomes of rows that cannot be used, with a share of them that may be left out.

    Attributes:
        most: the largest share of the rows.
        rows: how many there were, those that were left out with them.
    """

    def __init__(self, skip: bool = False, most: float = MOST_LEFT_OUT) -> None:
        super().__init__(skip)
        self.most = most
        self.rows = 0

    def refuse(self, error: ValueError) -> None:
        """Count a row that cannot be used.

        Raises:
            ValueError: ``error``, unless such rows are left out.
        """
        if not self.skip:
            raise type(error)(f"{error}; --skip-malformed leaves such rows out") from error
        super().refuse(error)
        self.rows += 1

    def check(self, source: Path | str, further: Sequence[str] = ()) -> None:
        """Refuse a source without rows, or of which too much was left out.

        Args:
            source: its name.
            further: what is wrong with rows that are left out for other reasons than that they are
                malformed.

        Raises:
            ValueError: there are no rows, or more than ``most`` of them were left out.
        """
        if not self.rows:
            raise ValueError(f"{source} has no rows; give a file with one JSON object a line")
        missing = [*self.left_out, *further]
        if len(missing) > self.most * self.rows:
            raise ValueError(
                f"{source}: {len(missing)} of {self.rows} rows would be left out, more than a "
                f"share of {self.most:g}; mend the file, or allow more with --max-left-out. The "
                f"first: {missing[0]}"
            )


def agreed(found: Mapping[str, _Held | None]) -> _Held | None:
    """Return what fields that mean the same hold; None where none holds anything.

    Raises:
        MalformedRow: they differ.
    """
    given = [(name, value) for name, value in found.items() if value is not None]
    for name, value in given[1:]:
        if value != given[0][1]:
            raise MalformedRow(f"its fields {given[0][0]!r} and {name!r} differ; remove one")
    return given[0][1] if given else None


def row_id(row: Mapping[str, Any]) -> str | None:
    """Return the id of a row as text; None where it has none.

    Raises:
        MalformedRow: it is neither text nor a number.
    """
    found = row.get("id")
    if isinstance(found, bool) or not isinstance(found, str | int | float | None):
        raise MalformedRow(f"its field id must be text or a number, got {str(found)[:40]!r}")
    return None if found is None else str(found)


def fields_of(row: Mapping[str, Any]) -> str:
    """Return the names of a row's first fields, for a message."""
    names = sorted(map(str, row))
    return f"{names[:_NAMED]}" + (f" and {len(names) - _NAMED} more" if names[_NAMED:] else "")


def usable_rows(
    rows: Iterator[tuple[Place, dict[str, Any]]],
    read: Callable[[dict[str, Any]], _Made],
    malformed: LeftOut,
) -> Iterator[tuple[Place, dict[str, Any], _Made]]:
    """Yield rows with what is made of each, without those of which nothing can be made.

    Args:
        rows: rows with their places, see `specforge_lk.data.jsonl.numbered_rows`.
        read: what is made of a row.
        malformed: what becomes of rows that ``read`` refuses with a `MalformedRow`.

    Raises:
        RowError: a row is malformed and is not left out.
        ValueError: ``read`` found something that is wrong with more than the row.
    """
    for place, row in rows:
        try:
            made = read(row)
        except MalformedRow as error:
            malformed.refuse(RowError(f"{place}: {error}"))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        else:
            malformed.rows += 1
            yield place, row, made


__all__ = ["LeftOut", "MalformedRow", "agreed", "fields_of", "row_id", "usable_rows"]
