"""Tools, and calls of them: read in the forms that programs write, and seen in what is rendered.

Engines give a chat template the arguments of calls as objects, so they are objects here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from specforge_lk.data.jsonl import distinct_fields
from specforge_lk.data.rows import MalformedRow, agreed

#: Field of OpenAI's older calls, and role of LLaMA-Factory's turns that are one, as JSON.
CALL = "function_call"
#: Names under which programs have the arguments of a call, but for chat templates'.
_ARGUMENTS = ("parameters", "args", "kwargs", "input", "arguments_json")


def read_calls(rest: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Take the calls out of a message, with their arguments as objects.

    Args:
        rest: the message.
        name: its name, for errors.

    Raises:
        MalformedRow: a call has no name, or arguments that are no object or are not read.
    """
    found: dict[str, Any] = {}
    for key in ("tool_calls", CALL):
        value, where = rest.pop(key, None), f"{name}.{key}"
        if isinstance(value, str) and value:
            value = _json(value, where)
        if not value:
            continue
        if key == CALL:  # without what says its type; OpenAI's is one, LLaMA-Factory's may be more
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
    others = [key for key in _ARGUMENTS if inner.get(key)]
    if others and not arguments:
        raise MalformedRow(f"{name}.function.{others[0]} is not read; rename it to arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments or "{}", f"{name}.function.arguments")
    if not isinstance(arguments, dict | None):
        raise MalformedRow(
            f"{name}.function.arguments is no JSON object: {str(inner['arguments'])[:40]!r}"
        )
    inner = {**inner, "arguments": {} if arguments is None else arguments}
    return {**call, "function": inner} if "function" in call else inner


def _json(text: str, name: str) -> Any:
    """Read JSON of which nothing is lost when a template writes it again."""
    try:
        return json.loads(
            text,
            object_pairs_hook=distinct_fields,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except (ValueError, RecursionError) as error:
        why = "" if isinstance(error, json.JSONDecodeError) else f" ({error})"
        raise MalformedRow(f"{name} is no JSON object: {text[:40]!r}{why}") from None


def _finite(text: str) -> float:
    if math.isfinite(number := float(text)):
        return number
    raise ValueError(f"{text[:40]} is no number of JSON")


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


def marked(
    message: Mapping[str, Any], mark: str, thoughts: Sequence[str]
) -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
    """Return an answer with a mark in place of each of its parts, to see which a template shows.

    Args:
        message: the answer.
        mark: what no template has.
        thoughts: fields of it that hold its thoughts.

    Returns:
        The marked answer, and of every part what it is, its text, and its mark.
    """
    probe = dict(message)
    parts: list[tuple[str, str, str]] = []

    def put(what: str, text: str) -> str:
        parts.append((what, text, f"{mark}{len(parts)}z"))
        return parts[-1][2]

    if thought := next((message[key] for key in thoughts if message.get(key)), ""):
        probe.update(dict.fromkeys(thoughts, put("thoughts", thought)))
    if message["content"].strip():
        probe["content"] = put("content", message["content"])
    if calls := message.get("tool_calls"):
        probe["tool_calls"] = []
        for call in calls:
            inner = call.get("function", call)
            name, arguments = inner["name"], inner["arguments"]
            inner = {**inner, "name": put("tool calls", name)}
            if arguments:
                key = put(f"arguments of the call {name!r}", "")
                inner["arguments"] = {**arguments, key: key}
            probe["tool_calls"].append({**call, "function": inner} if "function" in call else inner)
    return probe, parts


__all__ = ["CALL", "marked", "read_calls", "tools_in"]
