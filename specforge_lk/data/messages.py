"""The messages of a row: who says what, with which tools, in the form that chat templates take.

Rows come from many programs. What they mean alike becomes one form here, the one that vLLM and
SGLang give a chat template: `role` and `content` as text, and the arguments of tool calls as
objects. What has no such form is refused, with its field. The rules are in
`specforge_lk.data.conversations`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from specforge_lk.data.rows import MalformedRow, fields_of

#: One chat message, ``{"role": ..., "content": ...}`` and whatever else chat templates read.
Message = dict[str, Any]
#: Fields of a message that hold what the target thought before it answered.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")

#: Fields that hold a row's messages.
_FIELDS = ("conversations", "messages")
#: Fields that hold a system turn beside the messages.
_SYSTEM = ("system", "system_prompt")
#: Role of LLaMA-Factory's turns that are a call, as JSON in their content.
_CALL = "function_call"
#: Names that other layouts have for the roles.
_ROLES = {
    **{"human": "user", "gpt": "assistant", "observation": "tool"},
    **{"function": "tool", _CALL: "assistant"},
}
#: Roles that a message may name in the field ``from``.
_SPEAKERS = {*_ROLES, *_ROLES.values(), "system", "developer"}
#: Fields of OpenAI, Mistral, axolotl, Tinker and ms-swift that say whether an answer is trained on.
_TRAINED = ("weight", "train", "training", "trainable", "loss")
#: Fields of axolotl that say which part of an answer is.
_TRAINED_PARTS = ("train_detail", "training_detail")
#: Fields that mean the one in some programs, and the contrary in others.
_MASKS = ("mask", "masked")
#: Fields with the reason why an answer ended: of OpenAI and engines, of Ollama, of Anthropic.
_REASONS = ("finish_reason", "done_reason", "stop_reason")
#: Reasons -> whether the target itself ended the answer.
_ENDED = {
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn"), True),
    **dict.fromkeys(("tool_calls", "function_call", "tool_use"), True),
    **dict.fromkeys(("length", "max_tokens", "stop_sequence"), False),
    **dict.fromkeys(("abort", "error", "content_filter"), False),
}
#: Names of fields that hold thoughts, by whatever program.
_THINKS = re.compile(r"think|thought|reasoning", re.IGNORECASE)
#: Types of parts of a content that hold text.
_TEXT_PARTS = ("text", "input_text", "output_text")

_Held = TypeVar("_Held")


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


def messages_in(row: Mapping[str, Any]) -> list[Message]:
    """Return the messages of a row, from its field ``conversations`` or ``messages``.

    Raises:
        MalformedRow: it has none, or both and they differ, or a message cannot be read.
    """
    found = {name: row[name] for name in _FIELDS if row.get(name) is not None}
    if not found:
        others = [repr(name) for name, value in row.items() if _is_chat(value)]
        if len(others) == 1:
            raise MalformedRow(f"rename its field {others[0]} to 'conversations'")
        if others:
            raise MalformedRow(
                f"its fields {' and '.join(others)} hold messages; put those of one conversation, "
                "the answer last, into 'conversations'"
            )
        raise MalformedRow(
            f"it has no messages in a field 'conversations'; its fields are {fields_of(row)}; "
            "rename the one that holds a list of role and content"
        )
    read = agreed({name: read_messages(value, name) for name, value in found.items()})
    return with_system(row, as_trained(row, read or []))


def as_trained(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """Return messages, the answers with weight 0 where the row says that it is not trained on.

    Raises:
        MalformedRow: the row has a weight that is neither 0 nor 1.
    """
    # Other fields of these names are figures, such as a loss.
    marks = {key: row[key] for key in _TRAINED if row.get(key) is False}
    if row.get("weight") is not None:
        marks["weight"] = row["weight"]
    if _trained(marks, "its field "):
        return messages
    return [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages]


def ended(row: Mapping[str, Any]) -> bool | None:
    """Return whether the target ended an answer itself; None where its reasons do not say.

    Args:
        row: a row or message with the field ``finish_reason``, ``done_reason`` or ``stop_reason``.

    Raises:
        MalformedRow: the reason is not known.
    """
    found = [_ended(name, row[name]) for name in _REASONS if row.get(name) is not None]
    known = [said for said in found if said is not None]
    return all(known) if known else None


def _ended(name: str, reason: Any) -> bool | None:
    if isinstance(reason, dict):  # SGLang's own
        if isinstance(reason.get("matched"), str):
            return False
        reason = reason.get("type")
    said = _ENDED.get(reason.lower()) if isinstance(reason, str) else None
    if name == "stop_reason" and said is None:
        # vLLM's: the stop string that cut an answer, or the id of the token that ended it.
        return False if isinstance(reason, str) else None
    if said is None:
        raise MalformedRow(
            f"its field {name} is {str(reason)[:40]!r}, which is none of {', '.join(_ENDED)}; "
            "put finished true or false in its place: whether the target ended the answer itself"
        )
    return said


def with_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """Return messages after the system turn that a row has in a field of its own, if any.

    Raises:
        MalformedRow: the messages have another one, or the field is no text.
    """
    found = {name: row.get(name) or None for name in _SYSTEM}
    for name, value in found.items():
        if not isinstance(value, str | None):
            raise MalformedRow(f"its field {name!r} must be text, got {str(value)[:40]!r}")
    text = agreed(found)
    if text is None:
        return messages
    first = {"role": "system", "content": text}
    if messages[:1] == [first]:
        return messages
    if any(message["role"] == "system" for message in messages):
        raise MalformedRow(f"it has the system turn {text[:40]!r}, and another in its messages")
    return [first, *messages]


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and {"role", "from"} & set(m) for m in value[:1])
    )


def tools_in(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the tools that a row's prompt offers, a list or its JSON; None without any.

    OpenAI's older ``functions`` are read as well.

    Raises:
        MalformedRow: the field ``tools`` is no list of objects.
    """
    functions = _objects(row, "functions")
    wrapped = functions and [{"type": "function", "function": one} for one in functions]
    return agreed({"tools": _objects(row, "tools"), "functions": wrapped})


def _objects(row: Mapping[str, Any], field: str) -> list[dict[str, Any]] | None:
    found = row.get(field)
    if isinstance(found, str) and found:
        try:
            found = json.loads(found)
        except (ValueError, RecursionError):
            raise MalformedRow(f"its field {field!r} is no JSON: {found[:40]!r}") from None
    if not found:
        return None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise MalformedRow(
            f"its field {field!r} must be a list of objects, got {str(found)[:40]!r}"
        )
    return found


def read_messages(found: Any, field: str) -> list[Message]:
    """Return messages in the form that chat templates take.

    An answer that is not trained on has ``"weight": 0``, whatever says so.

    Args:
        found: what a row holds: messages with role and content, or with from and value.
        field: its name, for errors.

    Raises:
        MalformedRow: it is no list of messages; the error names the field and the value.
    """
    found = unpacked(found)
    if not isinstance(found, list) or not found:
        raise MalformedRow(
            f"no messages in its field {field}, which must be a list of role and content, got "
            f"{str(found)[:40]!r}"
        )
    return [read_message(message, f"{field}[{index}]") for index, message in enumerate(found)]


def unpacked(found: Any) -> Any:
    """Return a list that a row has as JSON, as tables without nested columns do."""
    if not isinstance(found, str):
        return found
    try:
        read = json.loads(found)
    except (ValueError, RecursionError):
        return found
    return read if isinstance(read, list) else found


def read_message(found: Any, name: str) -> Message:
    """Return one message; see `read_messages`."""
    if not isinstance(found, dict):
        raise MalformedRow(f"{name} must have role and content, got {str(found)[:40]!r}")
    # Parquet writes null where another message has a field.
    rest = {key: value for key, value in found.items() if value is not None}
    speaker = _speaker(rest, name)
    role = _ROLES.get(speaker, speaker)
    content = agreed({f"{name}.{key}": rest.pop(key, None) for key in ("content", "value")})
    if speaker == _CALL:
        rest[_CALL], content = content, None
    calls = _calls(rest, name)
    if calls and role != "assistant":
        raise MalformedRow(f"{name} is the {role}'s and has tool calls; only an assistant's may")
    marks = {key: rest.pop(key) for key in (*_TRAINED, *_TRAINED_PARTS) if key in rest}
    message = {"role": role, "content": _text(content, name, bool(calls)), **rest}
    if role == "assistant":
        _check_thoughts(message, name)
        _check_masks(message, name)
    if calls:
        message["tool_calls"] = calls
    if role == "assistant" and not _trained(marks, f"{name}."):
        message["weight"] = 0
    return message


def _speaker(rest: Message, name: str) -> str:
    """Take out who says a message."""
    role, speaker = rest.pop("role", None), rest.pop("from", None)
    for key, said in (("role", role), ("from", speaker)):
        if not isinstance(said, str | None) or said == "":
            raise MalformedRow(f"{name}.{key} must be text, got {str(said)[:40]!r}")
    if role is None and speaker is not None and speaker not in _SPEAKERS:
        raise MalformedRow(
            f"{name}.from is {speaker!r}, which is none of {', '.join(sorted(_SPEAKERS))}; "
            "rename it to the role that the chat template has"
        )
    mapped = {"role": _ROLES.get(role, role), "from": _ROLES.get(speaker, speaker)}
    agreed({f"{name}.{key}": said for key, said in mapped.items()})
    if role is None and speaker is None:
        raise MalformedRow(f"it does not say whose {name} is: no role")
    return role or speaker


def _trained(marks: Mapping[str, Any], name: str) -> bool:
    """Return whether an answer is trained on, as fields of it say."""
    for key in _TRAINED_PARTS:
        if marks.get(key):
            raise MalformedRow(
                f"{name}{key} has parts of an answer trained on, which cannot be done; give it "
                "weight 0 or 1, and remove that field"
            )
    found = {key: marks[key] for key in _TRAINED if key in marks}
    for key, value in found.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise MalformedRow(
                f"{name}{key} must be 0 or 1, false or true, got {str(value)[:40]!r}; an answer "
                "is trained on or not"
            )
    return agreed({f"{name}{key}": bool(value) for key, value in found.items()}) is not False


def _check_masks(message: Message, name: str) -> None:
    for key in _MASKS:
        if key in message:
            raise MalformedRow(
                f"{name}.{key} does not say whether the answer is trained on, since programs differ"
                " in what it means; give it weight 0 or 1, and remove that field"
            )


def _check_thoughts(message: Message, name: str) -> None:
    """Refuse thoughts in fields that are not read, so that no answer is taken without them."""
    for key, value in message.items():
        if key in THOUGHTS and not isinstance(value, str):
            raise MalformedRow(f"{name}.{key} must be text, got {str(value)[:40]!r}")
        if (
            key not in THOUGHTS
            and _THINKS.search(key)
            and value
            and not isinstance(value, int | float)
        ):
            raise MalformedRow(
                f"{name}.{key} is not read; rename it to {THOUGHTS[0]} if the target said it, or "
                "remove it"
            )
    agreed({f"{name}.{key}": message.get(key) or None for key in THOUGHTS})


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


def _calls(rest: Message, name: str) -> list[dict[str, Any]]:
    """Take out tool calls, with their arguments as objects, as engines give them to templates."""
    found: dict[str, Any] = {}
    for key in ("tool_calls", _CALL):
        value, where = rest.pop(key, None), f"{name}.{key}"
        if isinstance(value, str) and value:
            value = _json(value, where)
        if not value:
            continue
        if key == _CALL:  # without what says its type; OpenAI's is one, LLaMA-Factory's may be more
            bare = value if isinstance(value, list) else [value]
            value = [{"type": "function", "function": call} for call in bare]
        if not isinstance(value, list):
            raise MalformedRow(f"{where} must be a list, got {str(value)[:40]!r}")
        found[where] = [_call(call, f"{where}[{index}]") for index, call in enumerate(value)]
    return agreed(found) or []


def _call(call: Any, name: str) -> dict[str, Any]:
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise MalformedRow(f"{name} has no function.name")
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments or "{}", f"{name}.function.arguments")
    if not isinstance(arguments, dict | None):
        raise MalformedRow(
            f"{name}.function.arguments is no JSON object: {str(inner['arguments'])[:40]!r}"
        )
    inner = {**inner, "arguments": {} if arguments is None else arguments}
    return {**call, "function": inner} if "function" in call else inner


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise MalformedRow(f"{name} is no JSON object: {text[:40]!r}") from None


__all__ = [
    "THOUGHTS",
    "Message",
    "agreed",
    "as_trained",
    "ended",
    "messages_in",
    "read_message",
    "read_messages",
    "tools_in",
    "unpacked",
    "with_system",
]
