"""Benchmark prompts and held-out conversations, as token ids of the target's chat template."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

#: How a benchmark names a dataset of the Hugging Face hub instead of a file.
HUB_PREFIX = "hub:"


class DataError(ValueError):
    """A benchmark or held-out file that cannot be read; the message says what to change."""


def read_rows(source: str) -> list[dict]:
    """Rows of a JSONL file (also gzipped), or of a hub dataset ``hub:REPO[:CONFIG][@SPLIT]``."""
    if source.startswith(HUB_PREFIX):
        from datasets import load_dataset

        name, _, split = source.removeprefix(HUB_PREFIX).partition("@")
        repo, _, config = name.partition(":")
        return [dict(row) for row in load_dataset(repo, config or None, split=split or "test")]
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{source}: no such file; give a JSONL file or hub:REPO[:CONFIG][@SPLIT]")
    opener = gzip.open if path.suffix == ".gz" else open
    rows = []
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{source}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f"{source}, line {number}: not a JSON object")
            rows.append(row)
    if not rows:
        raise DataError(f"{source}: the file has no rows")
    return rows


def user_turns(row: dict, source: str) -> list[str]:
    """User messages of a benchmark row: MT-bench ``turns``, or one ``prompt`` or ``question``."""
    if isinstance(row.get("turns"), list) and row["turns"]:
        return [str(turn) for turn in row["turns"]]
    for key in ("prompt", "question"):
        if isinstance(row.get(key), str):
            return [row[key]]
    raise DataError(
        f"{source}: a row with the fields {sorted(row)} has none of turns, prompt, question; "
        "rename the field that holds the prompt"
    )


def encode_chat(tokenizer: Any, messages: list[dict]) -> list[int]:
    """Token ids of a conversation up to the point where the target answers."""
    return _encode(tokenizer, _render(tokenizer, messages, add_generation_prompt=True))


def _render(tokenizer: Any, messages: list[dict], add_generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise DataError("the target's tokenizer has no chat_template; add one to its directory")
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )


def _encode(tokenizer: Any, text: str) -> list[int]:
    # The template already writes the special tokens.
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass(frozen=True)
class Conversation:
    """A tokenised held-out conversation.

    Attributes:
        tokens: [L] int64.
        response: [L] bool, tokens the target generates: the assistant's text and the token that
            ends it, not what the template puts around them.
    """

    tokens: torch.Tensor
    response: torch.Tensor


def encode_conversation(
    tokenizer: Any, row: dict, eos_ids: frozenset[int], source: str
) -> Conversation:
    """Tokenise ``{"conversations": [{"role", "content"}, …]}`` and mark the assistant's tokens.

    Responses are tokenised apart from what precedes them, because that is how they were generated.
    """
    messages = row.get("conversations")
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("content"), str) and m.get("role")
        for m in messages
    ):
        raise DataError(
            f"{source}: row {row.get('id')!r} has no `conversations` list of "
            '{"role": …, "content": …}; write held-out responses with `specforge-lk generate`'
        )
    tokens: list[int] = []
    response: list[bool] = []
    rendered = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prefix = _render(tokenizer, messages[:index], add_generation_prompt=True)
        full = _render(tokenizer, messages[: index + 1], add_generation_prompt=False)
        if not (prefix.startswith(rendered) and full.startswith(prefix)):
            raise DataError(
                f"{source}: row {row.get('id')!r}: the target's chat template rewrites earlier "
                "turns, so the response cannot be located; keep one turn per conversation"
            )
        context = _encode(tokenizer, prefix[len(rendered) :])
        answer = _encode(tokenizer, full[len(prefix) :])
        ends = [i for i, token in enumerate(answer) if token in eos_ids]
        generated = ends[0] + 1 if ends else len(answer)
        tokens += context + answer
        response += [False] * len(context) + [i < generated for i in range(len(answer))]
        rendered = full
    return Conversation(torch.tensor(tokens, dtype=torch.long), torch.tensor(response).bool())
