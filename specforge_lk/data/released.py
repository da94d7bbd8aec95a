"""Turn released prompts and completions into SpecForge conversations, as their rows stream in.

The authors of the LK losses released what they trained on, one data set per target
(``nebius/Llama-3.3-70B-Instruct-Infinity-Instruct-0625`` and its siblings, which are the hub
collection ``nebius/infinity-instruct-completions``): rows with an ``id``, the messages of a
``conversation`` and the target's ``generated_message``. Fields that are not needed are ignored; a
row that lacks one that is needed is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from specforge_lk.data.jsonl import LineFile
from specforge_lk.data.messages import (
    THOUGHTS,
    MalformedRow,
    Message,
    read_messages,
    tools_in,
)

#: Rows between two writes to disk: the most that a crash can cost.
WRITE_EVERY = 500

#: Suffix of a single file -> loader of the package `datasets`.
_LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
#: Fields of an assistant's message that chat templates read.
_SAID = ("content", "tool_calls", *THOUGHTS)


def open_rows(source: str, subset: str | None = None, split: str = "train") -> Any:
    """Open a data set as a stream of rows.

    Args:
        source: hub id, folder in a hub data set's layout, or one .parquet, .jsonl or .json file
            (.gz as well).
        subset: configuration of a data set that has several.
        split: which split; a single file has ``train`` only.

    Returns:
        A `datasets.IterableDataset`.

    Raises:
        OSError: there is no such data set.
        ValueError: it has no such subset or split, or the file is of no known kind.
    """
    from datasets import load_dataset

    path = Path(source)
    if not path.is_file():
        return load_dataset(source, subset, split=split, streaming=True)
    loader = _LOADERS.get(Path(path.name.removesuffix(".gz")).suffix)
    if loader is None:
        raise ValueError(f"{path} is none of {', '.join(_LOADERS)}")
    if subset is not None:
        raise ValueError(
            f"--subset {subset}: {path} is a single file, which has none; leave it out"
        )
    return load_dataset(loader, data_files=str(path), split=split, streaming=True)


def known_size(rows: Any) -> int | None:
    """Return how many rows a data set says it has; None if it does not say."""
    splits = rows.info.splits or {}
    return splits[rows.split].num_examples if rows.split in splits else None


@dataclass(frozen=True)
class Layout:
    """Which fields of a data set's row hold the completion, and what is made of a row.

    Attributes:
        completion: field of the completion, a message.
        prompts_only: make prompts for ``specforge-lk generate`` instead of conversations.
    """

    completion: str = "generated_message"
    prompts_only: bool = False

    def convert(self, row: dict[str, Any], number: int) -> dict[str, Any]:
        """Convert one row.

        Args:
            row: as the data set has it.
            number: its place in the data set, from 0; kept as ``source_row``.

        Raises:
            MalformedRow: it lacks a field.
        """
        name = f"row {number} (id {row.get('id')!r})"
        if row.get("id") is None:
            raise MalformedRow(f"{name} has no id; its fields are {sorted(row)}")
        messages = _messages(row, name)
        with _named(name):
            tools = tools_in(row)
        more = {} if tools is None else {"tools": tools}
        if self.prompts_only:
            alone = len(messages) == 1 and set(messages[0]) == {"role", "content"}
            prompt = {"prompt": messages[0]["content"]} if alone else {"messages": messages}
            return {"id": str(row["id"]), **prompt, **more, "source_row": number}
        completion = row.get(self.completion)
        completion = completion if isinstance(completion, dict) else {}
        said = {key: completion[key] for key in _SAID if completion.get(key)}
        if not said.get("content") and not said.get("tool_calls"):
            raise MalformedRow(
                f"{name} has no text in {self.completion}.content; its fields are {sorted(row)}"
            )
        with _named(name):
            messages += read_messages([{"role": "assistant", **said}], self.completion)
        converted = {"id": str(row["id"]), "conversations": messages, **more}
        reason = completion.get("finish_reason") or row.get("finish_reason")
        if reason is not None:  # a response cut at its longest has no end-of-turn token
            converted["finished"] = reason != "length"
        return {**converted, "source_row": number}


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except MalformedRow as error:
        raise MalformedRow(f"{name}: {error}") from error


def _messages(row: dict[str, Any], name: str) -> list[Message]:
    """Return the messages of a prompt, the last of which is not the assistant's."""
    conversation = row.get("conversation")
    if not isinstance(conversation, list) or not conversation:
        raise MalformedRow(
            f"{name} has no messages in its field conversation; its fields are {sorted(row)}"
        )
    only = conversation[0]
    if len(conversation) == 1 and isinstance(only, dict) and not ({"role", "from"} & set(only)):
        conversation = [{"role": "user", **only}]
    with _named(name):
        messages = read_messages(conversation, "conversation")
    for index, message in enumerate(messages):
        if not message["content"] and not message.get("tool_calls"):
            raise MalformedRow(f"{name} has no text in conversation[{index}].content")
    if messages[-1]["role"] in ("assistant", "system"):
        raise MalformedRow(
            f"{name}: the last message of its field conversation is the "
            f"{messages[-1]['role']}'s, not the user's"
        )
    return messages


@dataclass
class Counts:
    """How many rows of one run were in the file before, were added, and were malformed."""

    before: int = 0
    added: int = 0
    left_out: int = 0


def convert(
    rows: Any,
    out: LineFile,
    layout: Layout,
    *,
    limit: int | None = None,
    skip_malformed: bool = False,
    advance: Callable[[int, int], None] = lambda items, work: None,
) -> Counts:
    """Append every row of a data set that is not in ``out`` yet, in order.

    Args:
        rows: a `datasets.IterableDataset`.
        out: the file, begun by the same call or empty.
        layout: which fields are read.
        limit: only the first rows of the data set.
        skip_malformed: leave malformed rows out instead of raising.
        advance: called with the rows read, for the rate and towards the total.

    Raises:
        MalformedRow: a row lacks a field; all rows before it are in ``out``.
        ValueError: the data set is not the one that ``out`` was begun from.
    """
    counts = Counts()
    numbered = _remaining_rows(rows, out, counts)
    waiting: list[dict[str, Any]] = []
    if limit is not None:
        numbered = islice(numbered, max(0, limit - counts.before))
    advance(0, counts.before)

    def write() -> None:
        ready = waiting[:]
        waiting.clear()  # first, so that an interrupted append is not repeated
        out.append(ready)
        counts.added += len(ready)

    try:
        for number, row in numbered:
            try:
                waiting.append(layout.convert(row, number))
            except MalformedRow:
                if not skip_malformed:
                    raise
                counts.left_out += 1
            advance(1, 1)
            if len(waiting) == WRITE_EVERY:
                write()
    finally:
        write()
    return counts


def _remaining_rows(
    rows: Any, out: LineFile, counts: Counts
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Return the rows after the last one in ``out``, with their numbers."""
    last = out.last()
    if last is None:
        return enumerate(rows)
    number = last["source_row"]
    counts.before = number + 1
    numbered = enumerate(rows.skip(number), start=number)
    again: dict[str, Any] = next(numbered, (number, {}))[1]
    if str(again.get("id")) != last["id"]:
        raise ValueError(
            f"{out.path} was begun from other data: its last row is row {number}, id "
            f"{last['id']!r}, but there the data set has id {again.get('id')!r}; write to a new "
            "file"
        )
    return numbered


__all__ = ["Counts", "Layout", "MalformedRow", "convert", "known_size", "open_rows"]
