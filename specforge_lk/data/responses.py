"""A target's responses to prompts: the settings of sampling, and the file of responses.

`specforge_lk.data.sample_local` and `specforge_lk.data.sample_server` sample them.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from specforge_lk.data.jsonl import LineFile, read_jsonl


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.
        max_new_tokens: Longest response, the end-of-turn token included.
        seed: Non-negative; with the prompt's id it decides a response.
        top_p: Below 1, only the most likely tokens with this much probability (servers only).
    """

    temperature: float = 1.0
    max_new_tokens: int = 160
    seed: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def number(self, key: str) -> int:
        """Return a number below 2^63 that belongs to the seed and one prompt's id."""
        digest = hashlib.sha256(f"{self.seed}:{key}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1


class StoredResponse(NamedTuple):
    """In-memory summary of a stored response, without its text: a file has 10^5 rows and more.

    Attributes:
        prompt: Hash of the prompt's text.
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
        prompt = row["conversations"][0]["content"]
        return cls(hash(prompt), None if ids is None else len(ids), row["finished"])


class ResponseFile:
    """A response file, opened by `open_lines`: the ids of its rows, and the way to add more."""

    def __init__(self, lines: LineFile) -> None:
        self._lines = lines
        self.answered = {row["id"]: StoredResponse.of(row) for row in read_jsonl(lines.path)}

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add rows; when this returns they survive a crash."""
        self._lines.append(rows)
        self.answered.update({row["id"]: StoredResponse.of(row) for row in rows})


def pending(prompts: list[dict[str, str]], done: ResponseFile) -> list[dict[str, str]]:
    """Return the prompts that have no response yet, in order.

    Raises:
        ValueError: a response in the file answers another prompt of the same id.
    """
    for prompt in prompts:
        known = done.answered.get(prompt["id"])
        if known and known.prompt != hash(prompt["prompt"]):
            raise ValueError(
                f"the response {prompt['id']!r} belongs to another prompt; "
                "write to a new file, or give changed prompts new ids"
            )
    return [prompt for prompt in prompts if prompt["id"] not in done.answered]


def conversation_row(
    prompt: dict[str, str], text: str, finished: bool, ids: list[int] | None
) -> dict[str, Any]:
    """Return a row of a response file; see `specforge_lk.data.conversations`.

    Args:
        prompt: A row ``{"id", "prompt"}``.
        text: The response.
        finished: Whether it ends with the end-of-turn token.
        ids: The sampled tokens; None if they are not known.
    """
    messages = [
        {"role": "user", "content": prompt["prompt"]},
        {"role": "assistant", "content": text},
    ]
    row = {"id": prompt["id"], "conversations": messages, "finished": finished}
    return row if ids is None else {**row, "response_ids": ids}


def settings_of(target: str, dtype: str, sampling: Sampling) -> dict[str, Any]:
    """Return the settings that must stay equal while one response file is written.

    Args:
        target: Folder or hub id, or the name that a server has for it.
        dtype: Of local weights; ``server`` where a server decides.
        sampling: How responses are drawn.
    """
    settings = {"target": target, "dtype": dtype, **asdict(sampling)}
    if sampling.top_p == 1:  # files begun before there was top_p do not have it
        del settings["top_p"]
    return settings


__all__ = [
    "ResponseFile",
    "Sampling",
    "StoredResponse",
    "conversation_row",
    "pending",
    "settings_of",
]
