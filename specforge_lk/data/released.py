"""Turn released prompts and completions into SpecForge conversations, as their rows stream in.

The authors of the LK losses released what they trained on, one data set per target
(``nebius/Llama-3.3-70B-Instruct-Infinity-Instruct-0625`` and its siblings, which are the hub
collection ``nebius/infinity-instruct-completions``): rows with an ``id``, the messages of a
``conversation`` and the target's ``generated_message``. Fields that are not needed are ignored; a
row that lacks one that is needed is named.
"""

from __future__ import annotations

import itertools
import logging
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specforge_lk.data.jsonl import LineFile, Malformed, Place, numbered_rows
from specforge_lk.data.messages import (
    THOUGHTS,
    Message,
    as_trained,
    check_media,
    ended,
    read_message,
    read_messages,
    unpacked,
    with_system,
)
from specforge_lk.data.rows import LeftOut, MalformedRow, fields_of, row_id, usable_rows
from specforge_lk.data.tool_calls import tools_in

#: Rows between two writes to disk: the most that a crash can cost.
WRITE_EVERY = 500

#: Suffix of a single file that the package `datasets` reads -> its loader.
_LOADERS = {".parquet": "parquet", ".json": "json"}
#: Fields of a completion of which one has to be there.
_NEEDED = ("content", "tool_calls", "function_call", "value", *THOUGHTS)
#: What of a completion is kept: what chat templates read, and whether it is trained on.
_SAID = ("role", "content", "tool_calls", *THOUGHTS, "weight")


@dataclass(frozen=True)
class Source:
    """Rows of a data set as they stream in.

    Attributes:
        name: hub id, folder or file.
        size: how many rows it says it has; None if it does not say.
        read: the rows with their places, without as many as its first argument says; the second
            says what becomes of lines that are no rows.
    """

    name: str
    size: int | None
    read: Callable[[int, Malformed], Iterator[tuple[Place, dict[str, Any]]]]


def open_rows(source: str, subset: str | None = None, split: str = "train") -> Source:
    """Open a data set as a stream of rows.

    Args:
        source: hub id, folder in a hub data set's layout, or one .parquet, .jsonl or .json file
            (.gz as well).
        subset: configuration of a data set that has several.
        split: which split; a single file has ``train`` only.

    Raises:
        OSError: there is no such data set.
        ValueError: it has no such subset or split, or the file is empty or of no known kind.
    """
    path = Path(source)
    kind = Path(path.name.removesuffix(".gz")).suffix
    if not path.is_file():
        if kind in (".jsonl", *_LOADERS) and not path.is_dir():
            raise FileNotFoundError(f"{path} does not exist; give a file, a folder or a hub id")
        return _streamed(source, source, name=subset, split=split)
    if kind not in (".jsonl", *_LOADERS):
        raise ValueError(f"{path} is none of .jsonl, {', '.join(_LOADERS)}; rename or convert it")
    for option, given, held in (("--subset", subset, None), ("--split", split, "train")):
        if given != held:
            raise ValueError(
                f"{path} is a single file, which has no {option} {given}; leave it out"
            )
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty; download or write it again")
    if kind == ".jsonl":
        return Source(
            source,
            None,
            lambda start, broken: itertools.islice(numbered_rows(path, broken), start, None),
        )
    return _streamed(source, _LOADERS[kind], data_files=str(path), split=split)


def _streamed(source: str, *load: Any, **more: Any) -> Source:
    """Open what the package `datasets` reads."""
    import datasets

    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # it logs what it raises, too
    with _named(source, "check --source, --subset and --split, or download it again"):
        rows = datasets.load_dataset(*load, **more, streaming=True)
    splits = rows.info.splits or {}
    size = splits[rows.split].num_examples if rows.split in splits else None

    def read(start: int, broken: Malformed) -> Iterator[tuple[Place, dict[str, Any]]]:
        number = start
        stream = iter(rows.skip(start))
        while True:
            damage = f"after row {number} it is cut, damaged or in another encoding"
            with _named(source, f"{damage}: mend it, or download it again"):
                row = next(stream, None)
            if row is None:
                return
            number += 1
            yield Place(Path(source), number, row.get("id")), row

    return Source(source, size, read)


@contextmanager
def _named(source: str, remedy: str) -> Iterator[None]:
    """Say of what `datasets` raises which source it is about, and what to do."""
    try:
        yield
    except (OSError, ValueError, EOFError, StopIteration, zlib.error) as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else "it has no rows"
        raise ValueError(f"{source} cannot be read ({reason}); {remedy}") from error


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
            MalformedRow: it lacks a field, or has something else in one.
        """
        if (key := row_id(row)) is None:
            raise MalformedRow(
                f"it has no id; its fields are {fields_of(row)}; give every row an id of its own"
            )
        check_media(row, "its field ")
        messages = _messages(row)
        tools = tools_in(row)
        more = {} if tools is None else {"tools": tools}
        if self.prompts_only:
            alone = len(messages) == 1 and set(messages[0]) == {"role", "content"}
            prompt = {"prompt": messages[0]["content"]} if alone else {"messages": messages}
            return {"id": key, **prompt, **more, "source_row": number}
        completion = row.get(self.completion)
        if not isinstance(completion, dict) or not any(map(completion.get, _NEEDED)):
            raise MalformedRow(
                f"no text in {self.completion}.content; its fields are {fields_of(row)}; name the "
                "field of the completion with --completion"
            )
        if not completion.get("role") and not completion.get("from"):
            completion = {**completion, "role": "assistant"}
        said = read_message(completion, self.completion)
        if said["role"] != "assistant":
            raise MalformedRow(
                f"{self.completion} is the {said['role']}'s, and must be the assistant's; name "
                "the field of the completion with --completion"
            )
        kept = {key: said[key] for key in _SAID if key in said and said[key] is not None}
        converted: dict[str, Any] = {
            "id": key,
            "conversations": as_trained(row, [*messages, kept]),
            **more,
        }
        for of in (completion, row):  # a response that was cut has no end-of-turn token
            if "finished" not in converted and (finished := ended(of)) is not None:
                converted["finished"] = finished
        return {**converted, "source_row": number}


def _messages(row: dict[str, Any]) -> list[Message]:
    """Return the messages of a prompt, the last of which is not the assistant's."""
    conversation = unpacked(row.get("conversation"))
    if not isinstance(conversation, list) or not conversation:
        raise MalformedRow(
            "it has no messages in its field conversation; its fields are "
            f"{fields_of(row)}; rename the one that holds them"
        )
    only = conversation[0]
    if len(conversation) == 1 and isinstance(only, dict) and not ({"role", "from"} & set(only)):
        conversation = [{"role": "user", **only}]
    messages = with_system(row, read_messages(conversation, "conversation"))
    for index, message in enumerate(messages):
        if not message["content"] and not message.get("tool_calls"):
            raise MalformedRow(f"no text in conversation[{index}].content")
    if messages[-1]["role"] in ("assistant", "system"):
        raise MalformedRow(
            f"the last message of its field conversation is the {messages[-1]['role']}'s, not the "
            "user's; leave it out, or give the whole conversation to capture"
        )
    return messages


@dataclass
class Counts:
    """Rows of a run.

    Attributes:
        before: how many earlier runs have read.
        missing: how many of these they have left out.
        added: how many this run has written.
    """

    before: int = 0
    missing: int = 0
    added: int = 0


def convert(
    source: Source,
    out: LineFile,
    layout: Layout,
    *,
    limit: int | None = None,
    malformed: LeftOut | None = None,
    advance: Callable[[int, int], None] = lambda items, work: None,
) -> Counts:
    """Append every row of a data set that is not in ``out`` yet, in order.

    Args:
        source: the data set.
        out: the file, begun by the same call or empty.
        layout: which fields are read.
        limit: only the first rows of the data set.
        malformed: what becomes of rows that cannot be converted, or whose id an earlier one has;
            by default the first is an error.
        advance: called with the rows read, for the rate and towards the total.

    Raises:
        RowError: a row is malformed; all rows before it are in ``out``.
        ValueError: the data set is not the one that ``out`` was begun from.
    """
    malformed = malformed or LeftOut()
    counts, last_id, seen = _held(out)
    malformed.rows += counts.before
    rows = source.read(max(0, counts.before - 1), malformed)
    if last_id is not None:
        _, again = next(rows, (None, {}))
        if str(again.get("id")) != last_id:
            raise ValueError(
                f"{out.path} was begun from other data: its last row is row {counts.before}, id "
                f"{last_id!r}, but there the data set has id {again.get('id')!r}; write to a new "
                "file"
            )
    if limit is not None:
        rows = itertools.islice(rows, max(0, limit - counts.before))
    numbers = itertools.count(counts.before)
    advance(0, counts.before)

    def read(row: dict[str, Any]) -> dict[str, Any]:
        advance(1, 1)
        made = layout.convert(row, next(numbers))
        if made["id"] in seen:
            raise MalformedRow("an earlier row has its id, too; give every row an id of its own")
        seen.add(made["id"])
        return made

    waiting: list[dict[str, Any]] = []

    def write() -> None:
        ready = waiting[:]
        waiting.clear()  # first, so that an interrupted append is not repeated
        out.append(ready)
        counts.added += len(ready)

    try:
        for _, _, made in usable_rows(rows, read, malformed):
            waiting.append(made)
            if len(waiting) == WRITE_EVERY:
                write()
    finally:
        write()
    return counts


def _held(out: LineFile) -> tuple[Counts, str | None, set[str]]:
    """Return what a file has from earlier runs: its counts, its last id, and all of its ids.

    Raises:
        ValueError: a row of it is none that `convert` writes.
    """
    counts, last, seen = Counts(), None, set()
    for place, row in numbered_rows(out.path, whole_characters=False):
        try:
            counts.before, last = row["source_row"] + 1, str(row["id"])
        except (LookupError, TypeError) as error:
            raise ValueError(
                f"{place} is no row of this command ({error!r}); remove the line, or write to a "
                "new file"
            ) from error
        seen.add(last)
    counts.missing = counts.before - len(seen)
    return counts, last, seen


__all__ = ["Counts", "Layout", "MalformedRow", "Source", "convert", "open_rows"]
