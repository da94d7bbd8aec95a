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
from typing import Any

from specforge_lk.data.rows import MalformedRow, agreed, fields_of
from specforge_lk.data.tool_calls import CALL, read_calls

#: One chat message, ``{"role": ..., "content": ...}`` and whatever else chat templates read.
Message = dict[str, Any]
#: Fields of a message that hold what the target thought before it answered.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")

#: Fields that hold a row's messages.
_FIELDS = ("conversations", "messages")
#: Fields that hold a system turn beside the messages.
_SYSTEM = ("system", "system_prompt")
#: Names that other layouts have for the roles.
_ROLES = {
    **{"human": "user", "gpt": "assistant", "observation": "tool"},
    **{"function": "tool", CALL: "assistant"},
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
#: Fields that say it in a word, and what they hold where an answer was cut.
_CUT = {"truncated": True, "is_truncated": True, "is_finished": False}
#: Names of fields that hold thoughts, by whatever program.
_THINKS = re.compile(r"think|thought|reasoning", re.IGNORECASE)
#: Types of parts of a content that hold text.
_TEXT_PARTS = ("text", "input_text", "output_text")
#: Fields of a row or message with what stands in the prompt beside text.
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


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
    check_media(row, "its field ")
    read = agreed({name: read_messages(value, name) for name, value in found.items()}) or []
    _check_thoughts_beside(row, read)
    return with_system(row, as_trained(row, read))


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
        row: a row or message with a field of `_REASONS` or `_CUT`.

    Raises:
        MalformedRow: the reason is not known.
    """
    found = [_ended(name, row[name]) for name in _REASONS if row.get(name) is not None]
    found += [False for name, cut in _CUT.items() if row.get(name) is cut]
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


def answer_ended(row: Mapping[str, Any], answer: Message) -> bool:
    """Return whether an answer ends, as its row or the engine's reason says.

    Raises:
        MalformedRow: they say what is not known.
    """
    said = row.get("finished")
    if said is not None and not isinstance(said, bool):
        raise MalformedRow(f"its field finished must be true or false, got {said!r}")
    found = [reason for reason in (said, ended(answer), ended(row)) if reason is not None]
    return found[0] if found else True


def sampled_ids(row: Mapping[str, Any]) -> list[int] | None:
    """Return the field ``response_ids``.

    Raises:
        MalformedRow: it is no list of token ids.
    """
    ids = row.get("response_ids")
    if ids is None:
        return None
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise MalformedRow(f"its field response_ids must be token ids, got {str(ids)[:40]!r}")
    return list(ids)


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
    if speaker == CALL:
        rest[CALL], content = content, None
    calls = read_calls(rest, name)
    if calls and role != "assistant":
        raise MalformedRow(f"{name} is the {role}'s and has tool calls; only an assistant's may")
    marks = {key: rest.pop(key) for key in (*_TRAINED, *_TRAINED_PARTS) if key in rest}
    check_media(rest, f"{name}.")
    # What engines return of an answer that is a call alone, or was cut while the target thought.
    alone = bool(calls) or (role == "assistant" and any(map(rest.get, THOUGHTS)))
    message = {"role": role, "content": _text(content, name, alone), **rest}
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


def _check_thoughts_beside(row: Mapping[str, Any], messages: list[Message]) -> None:
    """Refuse thoughts beside the messages; a word, such as "on", is a setting of them."""
    said = [str(m[key]) for m in messages for key in ("content", *THOUGHTS) if m.get(key)]
    for key in THOUGHTS:
        text = row.get(key)
        if isinstance(text, str) and len(text.split()) > 1:
            if any(text.strip() in one for one in said):
                continue
            raise MalformedRow(
                f"its field {key} is beside the messages, and not read; put it into the answer as "
                f"{THOUGHTS[0]} if the target said it, or remove it"
            )


def check_media(held: Mapping[str, Any], name: str) -> None:
    """Refuse images and the like, which the target saw and no tokens are made of.

    Raises:
        MalformedRow: a row or message has some.
    """
    for key in _MEDIA:
        if held.get(key):
            raise MalformedRow(
                f"{name}{key} is not read, so the target would see another prompt than it was "
                "asked; remove the row, or that field if the messages are all there was"
            )


def _text(content: Any, name: str, alone: bool) -> str:
    """Return a content as text: parts joined, nothing where calls or thoughts stand alone."""
    if isinstance(content, str):
        return content
    if content is None and alone:
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


__all__ = [
    "THOUGHTS",
    "Message",
    "answer_ended",
    "as_trained",
    "check_media",
    "ended",
    "messages_in",
    "read_message",
    "read_messages",
    "sampled_ids",
    "unpacked",
    "with_system",
]
