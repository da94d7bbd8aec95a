"""Read prompts: those to sample responses to, and those of benchmarks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specforge_lk.data.conversations import check_recorded
from specforge_lk.data.jsonl import Place, numbered_rows
from specforge_lk.data.messages import check_media, messages_in, with_system
from specforge_lk.data.rows import LeftOut, MalformedRow, agreed, fields_of, row_id, usable_rows
from specforge_lk.data.tool_calls import tools_in

#: Fields that hold a chat.
_CHATS = {"messages", "conversations"}
#: Fields of a benchmark that hold what the user says.
_TURNS = ("turns", "prompt", "question")
#: How a benchmark names a data set of the Hugging Face hub instead of a file.
HUB_PREFIX = "hub:"


class DataError(ValueError):
    """A benchmark or held-out file that cannot be read; the message says what to change."""


def read_prompts(
    path: Path,
    malformed: LeftOut | None = None,
    limit: int | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> dict[Place, dict[str, Any]]:
    """Read prompts, each with its place in the file; without an id a row's number is its id.

    A row has ``prompt``, a user's only turn, or ``messages`` that wait for an answer, and perhaps
    ``system`` and ``tools``.

    Args:
        path: JSONL of prompts.
        malformed: What becomes of rows that are none; by default the first is an error.
        limit: Only the first rows.
        arguments: Of the chat template; a row may name them, too.

    Raises:
        ValueError: a row is no prompt, an id occurs twice, or a row names other arguments.
    """
    prompts: dict[Place, dict[str, Any]] = {}
    seen: set[str] = set()

    def read(row: dict[str, Any]) -> dict[str, Any]:
        number = next(numbers)
        check_recorded(row, arguments or {})
        prompt = _prompt(row, row_id(row) or str(number))
        if prompt["id"] in seen:
            raise MalformedRow(
                f"id {prompt['id']!r} occurs twice; give every row an id of its own, or leave ids "
                "out: then a row's number in the file is its id"
            )
        seen.add(prompt["id"])
        return prompt

    numbers = itertools.count()
    malformed = malformed or LeftOut()
    rows = itertools.islice(numbered_rows(path, malformed), limit)
    for place, _, prompt in usable_rows(rows, read, malformed):
        prompts[place] = prompt
    return prompts


def _prompt(row: dict[str, Any], key: str) -> dict[str, Any]:
    check_media(row, "its field ")
    tools = tools_in(row)
    more = {} if tools is None else {"tools": tools}
    text = row.get("prompt")
    if isinstance(text, list):
        raise MalformedRow("its field 'prompt' is a list; rename it to 'messages' if it is a chat")
    if not isinstance(text, str | None) or (text is None and not _CHATS & set(row)):
        raise MalformedRow(
            f"no text in its field 'prompt', and no 'messages'; its fields are {fields_of(row)}; "
            "rename the one that holds what the user says to 'prompt'"
        )
    alone = None if text is None else with_system(row, [{"role": "user", "content": text}])
    chat = messages_in(row) if text is None or any(row.get(name) for name in _CHATS) else None
    messages = agreed({"prompt": alone, "messages": chat}) or []
    if messages[-1]["role"] == "assistant":
        raise MalformedRow("its last message is the assistant's; leave that out of a prompt")
    if alone is not None and len(alone) == 1:
        return {"id": key, "prompt": text, **more}
    return {"id": key, "messages": messages, **more}


def read_rows(source: str, malformed: LeftOut | None = None) -> list[dict]:
    """Read the rows of a benchmark; see `placed_rows`."""
    return [row for _, row in placed_rows(source, malformed)]


def placed_rows(
    source: str, malformed: LeftOut | None = None
) -> list[tuple[Place, dict[str, Any]]]:
    """Read the rows of a benchmark with their places.

    Args:
        source: A JSONL file (also gzipped), or a hub data set ``hub:REPO[:CONFIG][@SPLIT]``.
        malformed: What becomes of lines that are no rows; by default the first is an error.

    Raises:
        DataError: there is no such file, or it has no rows.
        ValueError: a line is not a JSON object.
    """
    if source.startswith(HUB_PREFIX):
        from datasets import load_dataset

        name, _, split = source.removeprefix(HUB_PREFIX).partition("@")
        repo, _, config = name.partition(":")
        try:
            data = load_dataset(repo, config or None, split=split or "test")
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(
                f"{source} cannot be read ({reason}); check it, or give a JSONL file"
            ) from error
        return [(Place(Path(source), n, row.get("id")), dict(row)) for n, row in enumerate(data, 1)]
    try:
        rows = list(numbered_rows(Path(source), malformed))
    except FileNotFoundError as error:
        raise DataError(f"{error}; a data set of the hub is hub:REPO[:CONFIG][@SPLIT]") from error
    if not rows:
        raise DataError(f"{source} has no rows; give a file with one JSON object a line")
    return rows


def user_turns(row: dict, source: str) -> list[str]:
    """Return the user messages of a benchmark row: its ``turns``, ``prompt`` or ``question``.

    A field may have the first turns of another, as MT-bench's ``prompt`` has.

    Raises:
        DataError: the row has none of these fields, two that differ, or a turn is no text.
    """
    found = {key: turns for key in _TURNS if (turns := _turns(row.get(key), f"{source}: {key}"))}
    longest = max(found, key=lambda key: len(found[key]), default=None)
    for key, turns in found.items():
        if longest is not None and turns != found[longest][: len(turns)]:
            raise DataError(f"{source}: its fields {longest!r} and {key!r} differ; remove one")
    if longest is not None:
        return found[longest]
    raise DataError(
        f"{source}: a row with the fields {fields_of(row)} has none of turns, prompt, question; "
        "rename the field that holds the prompt"
    )


def _turns(found: Any, name: str) -> list[str] | None:
    """Return a field as turns; None where it has none."""
    if isinstance(found, str):
        return [found]
    if not isinstance(found, list) or not found:
        return None
    for index, turn in enumerate(found):
        if not isinstance(turn, str):
            raise DataError(
                f"{name}[{index}] must be text, got {str(turn)[:40]!r}; write what the user says, "
                "and nothing else"
            )
    return found
