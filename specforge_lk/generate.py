"""Sample a target's responses to prompts with local transformers, resumably.

All the randomness of a response is one vector of uniforms drawn from (seed, prompt id) before the
first token. So a response does not depend on which prompts share its batch, beyond the rounding
of the arithmetic, and an interrupted run continues as if it had not stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specforge_lk.conversations import prompt_ids, read_rows

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: from the whole vocabulary, neither top-k nor top-p.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.
        max_new_tokens: Longest response, the end-of-turn token included.
        seed: Non-negative; with the prompt's id it decides a response.
    """

    temperature: float = 1.0
    max_new_tokens: int = 160
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")


@dataclass(frozen=True)
class Response:
    """Sampled token ids; ``finished`` if they end with the end-of-turn token."""

    ids: list[int]
    finished: bool


def read_prompts(path: Path) -> list[dict[str, str]]:
    """Read ``{"id", "prompt"}`` rows; without an id the line's number is the id.

    Raises:
        ValueError: a row has no prompt text, or an id occurs twice.
    """
    prompts: dict[str, dict[str, str]] = {}
    for number, row in enumerate(read_rows(path)):
        key = str(row.get("id", number))
        if not isinstance(row.get("prompt"), str):
            raise ValueError(f"{path}: row {key!r} has no text in its field 'prompt'")
        if key in prompts:
            raise ValueError(f"{path}: id {key!r} occurs twice; ids must be unique")
        prompts[key] = {"id": key, "prompt": row["prompt"]}
    return list(prompts.values())


@contextlib.contextmanager
def open_responses(path: Path, settings: dict[str, Any]) -> Iterator[ResponseFile]:
    """Open a response file to continue it, alone.

    A last line torn by a crash is cut off. ``settings`` are kept beside the file and must be
    equal when it is continued.

    Raises:
        ValueError: the file was begun with other settings, or another process writes to it.
    """
    if path.suffix == ".gz":
        raise ValueError(f"{path}: a compressed file cannot be continued; name it .jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{path} is being written by another process") from error
        stream.seek(0)
        content = stream.read()
        whole = content.rfind(b"\n") + 1
        stream.truncate(whole)
        _check_settings(path.with_name(f"{path.name}.settings.json"), settings, new=whole == 0)
        yield ResponseFile(stream, {row["id"]: row for row in read_rows(path)})


class ResponseFile:
    """The rows of a response file by id, and the way to add more."""

    def __init__(self, stream: Any, rows: dict[str, dict[str, Any]]) -> None:
        self._stream = stream
        self.rows = rows

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add rows; when this returns they survive a crash."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._stream.write(lines.encode("utf-8"))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.rows.update({row["id"]: row for row in rows})


def pending(prompts: list[dict[str, str]], done: ResponseFile) -> list[dict[str, str]]:
    """Return the prompts that have no response yet, in order.

    Raises:
        ValueError: a response in the file answers another prompt of the same id.
    """
    for prompt in prompts:
        row = done.rows.get(prompt["id"])
        if row and row["conversations"][0]["content"] != prompt["prompt"]:
            raise ValueError(
                f"the response {prompt['id']!r} belongs to another prompt; "
                "write to a new file, or give changed prompts new ids"
            )
    return [prompt for prompt in prompts if prompt["id"] not in done.rows]


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[dict[str, str]],
    sampling: Sampling,
    *,
    advance: Callable[[int, int], None] = lambda tokens, budget: None,
) -> list[dict[str, Any]]:
    """Sample one response to each prompt, all in one batch, and return conversation rows.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer, with a chat template.
        prompts: Rows ``{"id", "prompt"}``.
        sampling: Temperature, length and seed.
        advance: Called after every step with the number of tokens sampled and how much of the
            ``max_new_tokens`` budget they used up (a response that ends frees all of its own).

    Raises:
        ValueError: a prompt and its response exceed the target's context.
    """
    messages = [[{"role": "user", "content": prompt["prompt"]}] for prompt in prompts]
    encoded = [prompt_ids(tokenizer, conversation) for conversation in messages]
    context = getattr(model.config, "max_position_embeddings", None)
    for prompt, ids in zip(prompts, encoded, strict=True):
        if context and len(ids) + sampling.max_new_tokens > context:
            raise ValueError(
                f"prompt {prompt['id']!r} has {len(ids)} tokens, and with max_new_tokens "
                f"{sampling.max_new_tokens} exceeds the target's context of {context}"
            )
    keys = [prompt["id"] for prompt in prompts]
    responses = _sample(model, encoded, keys, sampling, _end_ids(model, tokenizer), advance)
    return [
        {
            "id": prompt["id"],
            "conversations": [
                *conversation,
                {
                    "role": "assistant",
                    "content": tokenizer.decode(
                        response.ids[:-1] if response.finished else response.ids,
                        clean_up_tokenization_spaces=False,
                    ),
                },
            ],
            "finished": response.finished,
            "response_ids": response.ids,
        }
        for prompt, conversation, response in zip(prompts, messages, responses, strict=True)
    ]


def _sample(
    model: Any,
    encoded: list[list[int]],
    keys: list[str],
    sampling: Sampling,
    end_ids: list[int],
    advance: Callable[[int, int], None],
) -> list[Response]:
    """Decode a left-padded batch; rows that have ended leave the batch in groups."""
    import torch

    with torch.inference_mode():
        device = model.device
        longest = max(map(len, encoded))
        rows = [[0] * (longest - len(ids)) + ids for ids in encoded]
        attention = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in encoded]
        step_ids = torch.tensor(rows, device=device)
        mask = torch.tensor(attention, device=device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        uniforms = torch.stack([_uniforms(sampling, key) for key in keys]).to(device)
        ends = torch.tensor(end_ids, device=device)
        cache = None
        sampled: list[list[int]] = [[] for _ in keys]
        in_batch = list(range(len(keys)))  # which response each row of the batch is
        running = set(in_batch)
        for step in range(sampling.max_new_tokens):
            output = model(
                input_ids=step_ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            tokens = _draw(output.logits[:, -1], sampling.temperature, uniforms[:, step])
            ended = torch.isin(tokens, ends).tolist()
            alive = len(running)
            spent = alive
            for index, token, end in zip(in_batch, tokens.tolist(), ended, strict=True):
                if index in running:
                    sampled[index].append(token)
                    if end:
                        running.remove(index)
                        spent += sampling.max_new_tokens - step - 1
            advance(alive, spent)
            if not running:
                break
            # Copying the cache to shrink the batch costs about one step; do it seldom.
            if len(running) <= len(in_batch) * 7 / 8:
                keep = [row for row, index in enumerate(in_batch) if index in running]
                kept = torch.tensor(keep, device=device)
                cache.batch_select_indices(kept)
                in_batch = [in_batch[row] for row in keep]
                tokens, mask, positions = tokens[kept], mask[kept], positions[kept]
                uniforms = uniforms[kept]
            step_ids = tokens[:, None]
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(in_batch), 1)], dim=-1)
    return [Response(ids, ids[-1] in end_ids) for ids in sampled]


def _draw(logits: torch.Tensor, temperature: float, uniform: torch.Tensor) -> torch.Tensor:
    """Tokens [B] from logits [B, V] by inverting the cumulative distribution at uniform [B].

    The sum runs in float64: in float32 the rare tokens at its end would be lost to rounding.
    """
    import torch

    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
    threshold = uniform[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return tokens.clamp(max=logits.shape[-1] - 1)


def _uniforms(sampling: Sampling, key: str) -> torch.Tensor:
    """Uniform numbers [max_new_tokens] in [0, 1) that belong to one prompt."""
    import torch

    digest = hashlib.sha256(f"{sampling.seed}:{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64)


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a response, as the target's generation settings name them."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    return [ids] if isinstance(ids, int) else list(ids or ())


def _check_settings(path: Path, settings: dict[str, Any], *, new: bool) -> None:
    if not new:
        if not path.exists():
            raise ValueError(
                f"{path} is missing, so the settings of the responses beside it are unknown; "
                "write to a new file"
            )
        before = json.loads(path.read_text(encoding="utf-8"))
        for name in sorted(settings.keys() | before.keys()):
            if settings.get(name) != before.get(name):
                raise ValueError(
                    f"the file was begun with {name}={before.get(name)!r}, not "
                    f"{settings.get(name)!r}; use the same value, or write to a new file"
                )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def settings_of(target: str, dtype: str, sampling: Sampling) -> dict[str, Any]:
    """Return what must stay equal while one response file is written."""
    return {"target": target, "dtype": dtype, **asdict(sampling)}


__all__ = [
    "Response",
    "ResponseFile",
    "Sampling",
    "generate",
    "open_responses",
    "pending",
    "read_prompts",
    "settings_of",
]
