"""A target's responses to prompts: how they are asked for, and the file of responses.

`specforge_lk.data.sample_local` and `specforge_lk.data.sample_server` sample them.

A prompt is ``{"id", "prompt"}``, a user's only turn, or ``{"id", "messages"}``, a chat that waits
for an answer; it may have ``tools``. A response is a row of conversations, see
`specforge_lk.data.conversations`. Its field ``sampling`` says what distribution it is a sample of,
such as ``{"temperature": 0.7, "top_p": 0.9}``: every row says it, because files are concatenated,
shuffled and compressed. `sampling_of` reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from specforge_lk.data.conversations import Chat
from specforge_lk.data.jsonl import LineFile, numbered_rows
from specforge_lk.data.messages import Message, read_messages
from specforge_lk.data.rows import MalformedRow
from specforge_lk.data.tool_calls import tools_in
from specforge_lk.serving import Sampling

#: A row ``{"id", "prompt"}`` or ``{"id", "messages"}``.
Prompt = Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """What is asked of a target for each prompt.

    Attributes:
        sampling: The distribution that tokens are sampled from.
        max_new_tokens: Longest response, the end-of-turn token included.
        seed: With the prompt's id it decides a response.
        chat_template_args: Further arguments of the chat template, such as ``enable_thinking``.

    Raises:
        ValueError: max_new_tokens is below 1.
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 160
    seed: int = 0
    chat_template_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")

    def number(self, key: str) -> int:
        """Return a number below 2^63 that belongs to the seed and one prompt's id."""
        digest = hashlib.sha256(f"{self.seed}:{key}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1


def messages_of(prompt: Prompt) -> list[Message]:
    """Return the messages of a prompt, which wait for the assistant's answer."""
    if "messages" in prompt:
        return read_messages(prompt["messages"], "messages")
    return [{"role": "user", "content": prompt["prompt"]}]


def prompt_ids_of(chat: Chat, prompt: Prompt) -> list[int]:
    """Return a prompt's tokens in the chat template, up to the assistant's turn.

    Together with ``max_new_tokens`` their number must not exceed the target's context.
    """
    return chat.prompt_ids(messages_of(prompt), tools_in(prompt))


def recorded(sampling: Sampling) -> dict[str, float | int]:
    """Return the field ``sampling`` of a row: the temperature, and what is not the default."""
    return {
        item.name: value
        for item in fields(sampling)
        if (value := getattr(sampling, item.name)) != item.default or item.name == "temperature"
    }


def sampling_of(row: Mapping[str, Any]) -> Sampling | None:
    """Return what distribution a row's response is a sample of; None where the row does not say.

    Rows of older files do not, nor those of servers that may have truncated the distribution.

    Raises:
        MalformedRow: the field cannot be read; the message names the row, the field and the value.
    """
    found = row.get("sampling")
    if found is None:
        return None
    where = f"row {row.get('id')!r}: the field 'sampling'"
    known = {item.name: type(item.default) for item in fields(Sampling)}
    if not isinstance(found, dict) or "temperature" not in found:
        raise MalformedRow(
            f'{where} must be such as {{"temperature": 0.7, "top_p": 0.9}}, got {found!r}'
        )
    for name, value in found.items():
        if name not in known:
            raise MalformedRow(f"{where} has {name!r}, which is none of {', '.join(known)}")
        number = int if known[name] is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, number):
            kind = "an integer" if known[name] is int else "a number"
            raise MalformedRow(f"{where}: {name} must be {kind}, got {value!r}")
    try:
        return Sampling(**found)
    except ValueError as error:
        raise MalformedRow(f"{where}: {error}") from None


class StoredResponse(NamedTuple):
    """In-memory summary of a stored response, without its text: a file has 10^5 rows and more.

    Attributes:
        prompt: Hash of the prompt's messages.
        tokens: How many tokens were sampled; None if the server did not say.
        finished: Whether the response ends with the end-of-turn token.
    """

    prompt: int
    tokens: int | None
    finished: bool

    @classmethod
    def of(cls, row: dict[str, Any]) -> StoredResponse:
        """Summarize a conversation row."""
        ids = row.get("response_ids")
        prompt = _fingerprint(row["conversations"][:-1], row.get("tools"))
        return cls(prompt, None if ids is None else len(ids), row["finished"])


class ResponseFile:
    """A response file, opened by `open_lines`: the ids of its rows, and the way to add more."""

    def __init__(self, lines: LineFile) -> None:
        self._lines = lines
        # A server's text may have half a character, which is kept as it is.
        self.answered: dict[str, StoredResponse] = {}
        for place, row in numbered_rows(lines.path, whole_characters=False):
            try:
                self.answered[row["id"]] = StoredResponse.of(row)
            except (LookupError, TypeError) as error:
                raise ValueError(
                    f"{place} is no response ({error!r}); remove the line, or write to a new file"
                ) from error

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add rows; when this returns they survive a crash."""
        self._lines.append(rows)
        self.answered.update({row["id"]: StoredResponse.of(row) for row in rows})


def _fingerprint(messages: Sequence[Message], tools: Any) -> int:
    return hash(json.dumps([messages, tools], sort_keys=True))


def pending(prompts: Sequence[Prompt], done: ResponseFile) -> list[Prompt]:
    """Return the prompts that have no response yet, in order.

    Raises:
        ValueError: a response in the file answers another prompt of the same id.
    """
    for prompt in prompts:
        known = done.answered.get(prompt["id"])
        if known and known.prompt != _fingerprint(messages_of(prompt), tools_in(prompt)):
            raise ValueError(
                f"the response {prompt['id']!r} belongs to another prompt; "
                "write to a new file, or give changed prompts new ids"
            )
    return [prompt for prompt in prompts if prompt["id"] not in done.answered]


def conversation_row(
    prompt: Prompt,
    text: str | Message,
    finished: bool,
    ids: list[int] | None,
    sampling: Sampling | None,
    chat_template_args: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a row of a response file; see `specforge_lk.data.conversations`.

    Args:
        prompt: The prompt it answers.
        text: The response; a message where it has more than text, such as tool calls.
        finished: Whether it ends with the end-of-turn token.
        ids: The sampled tokens; None if they are not known.
        sampling: What they were sampled from; None if that is not known.
        chat_template_args: Arguments of the chat template, where they change the prompt's tokens.
    """
    said: Message = {"role": "assistant", "content": text} if isinstance(text, str) else text
    row = {
        "id": prompt["id"],
        "conversations": [*messages_of(prompt), said],
        "finished": finished,
    }
    if (tools := tools_in(prompt)) is not None:
        row["tools"] = tools
    if chat_template_args:
        row["chat_template_args"] = dict(chat_template_args)
    if ids is not None:
        row["response_ids"] = ids
    if sampling is not None:
        row["sampling"] = recorded(sampling)
    return row


def settings_of(target: str, dtype: str, request: Request) -> dict[str, Any]:
    """Return the settings that must stay equal while one response file is written.

    Args:
        target: Folder or hub id, or the name that a server has for it.
        dtype: Of local weights; ``server`` where a server decides.
        request: How responses are drawn. Its top_k, top_p and chat_template_args are there where
            they change something: files begun before there were such settings do not have them.
    """
    arguments = dict(request.chat_template_args)
    return {
        "target": target,
        "dtype": dtype,
        **recorded(request.sampling),
        "max_new_tokens": request.max_new_tokens,
        "seed": request.seed,
        **({"chat_template_args": arguments} if arguments else {}),
    }


__all__ = [
    "Prompt",
    "Request",
    "ResponseFile",
    "StoredResponse",
    "conversation_row",
    "messages_of",
    "pending",
    "prompt_ids_of",
    "recorded",
    "sampling_of",
    "settings_of",
]
