"""The messages of a row: who says what, with which tools, in the form that chat templates take.

Rows come from many programs. What they mean alike becomes one form here, the one that vLLM and
SGLang give a chat template: `role` and `content` as text, and the arguments of tool calls as
objects. What has no such form is refused, with its field. The rules are in
`specforge_lk.data.conversations`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from specforge_lk.data.jsonl import MOST_LEFT_OUT, Malformed, Place, RowError

#: One chat message, ``{"role": ..., "content": ...}`` and whatever else chat templates read.
Message = dict[str, Any]
#: Fields of a message that hold what the target thought before it answered.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")

#: Fields that hold a row's messages.
_FIELDS = ("conversations", "messages")
#: Names that other layouts have for the roles.
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
#: Roles that a message may name in the field ``from``.
_SPEAKERS = {*_ROLES, *_ROLES.values(), "system", "developer"}
#: Types of parts of a content that hold text.
_TEXT_PARTS = ("text", "input_text", "output_text")

_Made = TypeVar("_Made")


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

    def check_share(self, source: Path | str, further: int = 0) -> None:
        """Refuse a source of which too much was left out.

        Args:
            source: its name.
            further: rows left out for other reasons than that they are malformed.

        Raises:
            ValueError: more than ``most`` of the rows were left out.
        """
        count = len(self.left_out) + further
        if count > self.most * self.rows:
            first = f". The first: {self.left_out[0]}" if self.left_out else ""
            raise ValueError(
                f"{source}: {count} of {self.rows} rows would be left out, more than a share of "
                f"{self.most:g}; mend the file, or allow more with --max-left-out{first}"
            )


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


def messages_in(row: Mapping[str, Any]) -> list[Message]:
    """Return the messages of a row, from its field ``conversations`` or ``messages``.

    Raises:
        MalformedRow: it has none, or both and they differ, or a message cannot be read.
    """
    found = {name: row[name] for name in _FIELDS if row.get(name) is not None}
    if not found:
        other = next((name for name, value in row.items() if _is_chat(value)), None)
        if other is not None:
            raise MalformedRow(f"rename its field {other!r} to 'conversations'")
        raise MalformedRow(
            f"it has no messages in a field 'conversations'; its fields are {sorted(row)}; "
            "rename the one that holds a list of role and content"
        )
    read = [read_messages(value, name) for name, value in found.items()]
    if len(read) > 1 and read[0] != read[1]:
        raise MalformedRow("its fields 'conversations' and 'messages' differ; remove one")
    return read[0]


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and {"role", "from"} & set(message) for message in value[:1]
    )


def tools_in(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the tools that a row's prompt offers, a list or its JSON; None without any.

    Raises:
        MalformedRow: the field ``tools`` is no list of objects.
    """
    tools = row.get("tools")
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except ValueError:
            raise MalformedRow(f"its field 'tools' is no JSON: {tools[:40]!r}") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise MalformedRow(f"its field 'tools' must be a list of objects, got {str(tools)[:40]!r}")
    return tools


def read_messages(found: Any, field: str) -> list[Message]:
    """Return messages in the form that chat templates take.

    Args:
        found: what a row holds: messages with role and content, or with from and value.
        field: its name, for errors.

    Raises:
        MalformedRow: it is no list of messages; the error names the field and the value.
    """
    if not isinstance(found, list) or not found:
        raise MalformedRow(f"no messages in its field {field}: a list of role and content")
    return [_message(message, f"{field}[{index}]") for index, message in enumerate(found)]


def _message(found: Any, name: str) -> Message:
    if not isinstance(found, dict):
        raise MalformedRow(f"{name} must have role and content, got {str(found)[:40]!r}")
    # Parquet writes null where another message has a field.
    rest = {key: value for key, value in found.items() if value is not None}
    role = rest.pop("role", None)
    speaker = rest.pop("from", None)
    if role is None and speaker is not None and speaker not in _SPEAKERS:
        raise MalformedRow(
            f"{name}.from is {speaker!r}, which is none of {', '.join(sorted(_SPEAKERS))}; "
            "rename it to the role that the chat template has"
        )
    role = speaker if role is None else role
    if not isinstance(role, str) or not role:
        raise MalformedRow(f"it does not say whose {name} is: no role")
    calls = rest.pop("tool_calls", None)
    content = rest.pop("content", None)
    value = rest.pop("value", None)
    message = {
        "role": _ROLES.get(role, role),
        "content": _text(value if content is None else content, name, bool(calls)),
        **rest,
    }
    if calls:
        message["tool_calls"] = _calls(calls, f"{name}.tool_calls")
    return message


def _text(content: Any, name: str, with_calls: bool) -> str:
    """Return a content as text: parts joined, nothing where there are tool calls alone."""
    if isinstance(content, str):
        return content
    if content is None and with_calls:
        return ""
    if isinstance(content, list):
        return "".join(_part(part, f"{name}.content[{i}]") for i, part in enumerate(content))
    if content is None:
        raise MalformedRow(f"no text in {name}.content, and no tool_calls in their place")
    raise MalformedRow(f"{name}.content must be text, got {str(content)[:40]!r}")


def _part(part: Any, name: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind not in _TEXT_PARTS:
        raise MalformedRow(f"{name} is of type {kind!r}; only parts of type 'text' can be read")
    if not isinstance(part.get("text"), str):
        raise MalformedRow(f"{name}.text must be text, got {part.get('text')!r}")
    return part["text"]


def _calls(found: Any, name: str) -> list[dict[str, Any]]:
    """Return tool calls with their arguments as objects, as engines give them to templates."""
    if not isinstance(found, list):
        raise MalformedRow(f"{name} must be a list, got {str(found)[:40]!r}")
    calls = []
    for index, call in enumerate(found):
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise MalformedRow(f"{name}[{index}] has no function.name")
        arguments = inner.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError:
                arguments = None
            if not isinstance(arguments, dict):
                raise MalformedRow(
                    f"{name}[{index}].function.arguments is no JSON object: "
                    f"{inner['arguments'][:40]!r}"
                )
        inner = {**inner, "arguments": {} if arguments is None else arguments}
        calls.append({**call, "function": inner} if "function" in call else inner)
    return calls


__all__ = [
    "THOUGHTS",
    "LeftOut",
    "MalformedRow",
    "Message",
    "messages_in",
    "read_messages",
    "tools_in",
    "usable_rows",
]
