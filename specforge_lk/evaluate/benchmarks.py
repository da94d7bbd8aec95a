"""Benchmarks without noise: the target answers once, and all drafts are measured along that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from specforge_lk.data.conversations import Message
from specforge_lk.data.jsonl import open_lines, read_jsonl
from specforge_lk.data.prompts import DataError
from specforge_lk.data.responses import (
    Prompt,
    Request,
    ResponseFile,
    pending,
    prompt_ids_of,
    settings_of,
)
from specforge_lk.data.sample_local import sample_responses
from specforge_lk.decode.target import Target
from specforge_lk.evaluate.settings import Settings, Track, digest, fingerprint
from specforge_lk.serving import Sampling


@dataclass(frozen=True)
class Answers:
    """A target's responses to a benchmark's prompts.

    Attributes:
        rows: rows of conversations, the last message of each a response.
        prompt: [C] row of the benchmark that each belongs to.
        skipped: turns left out: too long.
    """

    rows: list[dict[str, Any]]
    prompt: np.ndarray
    skipped: int


def respond(
    target: Target,
    target_path: str,
    name: str,
    prompts: Sequence[Sequence[str]],
    sampling: Sampling,
    settings: Settings,
    folder: Path,
    track: Track,
) -> Answers:
    """Sample the target's responses to a benchmark, turn by turn, or read those of before.

    Args:
        target: the target model.
        target_path: where it was loaded from.
        name: the benchmark's.
        prompts: user turns of every prompt.
        sampling: how the target samples.
        settings: see `Settings`.
        folder: where the files of responses are kept.
        track: opens a progress display.

    Raises:
        DataError: no prompt fits into the target's context.
    """
    chat = target.chat
    request = Request(sampling, settings.max_new_tokens, settings.seed, chat.arguments)
    dtype = str(target.head.weight.dtype).removeprefix("torch.")
    made_with = settings_of(target_path, dtype, request)
    # Another target, seed or prompt has a file of its own, and so has a target changed in place.
    identity = fingerprint(made_with, digest(target_path), prompts)
    path = folder / f"{quote(name, safe='')}-{sampling}-{identity}.jsonl"
    longest = settings.longest_prompt(target.max_positions)
    chats: dict[int, list[Message]] = {index: [] for index in range(len(prompts))}
    skipped = 0
    rows: dict[str, dict[str, Any]] = {}
    with open_lines(path, made_with) as lines:
        stored = ResponseFile(lines)
        for turn in range(settings.turns):
            asked: dict[str, Prompt] = {}
            for index, said in list(chats.items()):
                if turn >= len(prompts[index]):
                    del chats[index]
                    continue
                messages = [*said, {"role": "user", "content": prompts[index][turn]}]
                key = f"{index}/{turn}"
                row: Prompt = {"id": key, "messages": messages}
                if len(prompt_ids_of(chat, row)) > longest:
                    # What was too long once stays without an answer, and without further questions.
                    del chats[index]
                    skipped += 1
                    continue
                asked[key] = row
            _sample(target, pending(list(asked.values()), stored), request, settings, stored, track)
            rows |= {row["id"]: row for row in read_jsonl(path) if row["id"] in asked}
            chats = {index: rows[f"{index}/{turn}"]["conversations"] for index in chats}
    if not rows:
        raise DataError(
            f"none of {len(prompts)} prompts of {name} fits ({skipped} are too long); raise "
            "--max-length, or lower --max-new-tokens"
        )
    order = sorted(rows, key=lambda key: tuple(map(int, key.split("/"))))
    prompt = np.array([int(key.split("/")[0]) for key in order])
    return Answers([rows[key] for key in order], prompt, skipped)


def _sample(
    target: Target,
    prompts: list[Prompt],
    request: Request,
    settings: Settings,
    stored: ResponseFile,
    track: Track,
) -> None:
    """Sample responses in batches of prompts of like length, each kept once it is complete."""
    if not prompts:
        return
    chat = target.chat
    prompts.sort(key=lambda prompt: len(prompt_ids_of(chat, prompt)))
    what = f"the target's responses, {request.sampling}"
    with track(what, len(prompts) * request.max_new_tokens) as progress:
        for start in range(0, len(prompts), settings.batch_size):
            batch = prompts[start : start + settings.batch_size]
            rows = sample_responses(
                target.model, target.tokenizer, batch, request, advance=progress.advance
            )
            stored.append(rows)


__all__ = ["Answers", "respond"]
