"""Sample a target's responses to prompts, resumably, with local transformers.

`specforge_lk.data.sample_server` does the same with a server.

All the randomness of a response is one vector of uniforms drawn from (seed, prompt id) before the
first token. So a response does not depend on which prompts share its batch, beyond the rounding
of the arithmetic, and an interrupted run continues as if it had not stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from specforge_lk.data.conversations import prompt_ids, read_rows
from specforge_lk.data.jsonl import LineFile, open_lines

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

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
        """A number below 2^63 that belongs to the seed and one prompt's id."""
        digest = hashlib.sha256(f"{self.seed}:{key}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1


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
            raise ValueError(
                f"{path}: row {key!r} has no text in its field 'prompt'; "
                "specforge-lk data --prompts-only writes such rows"
            )
        if key in prompts:
            raise ValueError(
                f"{path}: id {key!r} occurs twice; give every row an id of its own, or leave ids "
                "out: then a row's number in the file is its id"
            )
        prompts[key] = {"id": key, "prompt": row["prompt"]}
    return list(prompts.values())


class Answered(NamedTuple):
    """What is remembered of a response in the file: a set has hundreds of thousands of them."""

    prompt: int
    tokens: int | None
    finished: bool

    @classmethod
    def of(cls, row: dict[str, Any]) -> Answered:
        """Of a conversation row."""
        ids = row.get("response_ids")
        prompt = row["conversations"][0]["content"]
        return cls(hash(prompt), None if ids is None else len(ids), row["finished"])


class ResponseFile:
    """A response file by the ids of its rows, and the way to add more."""

    def __init__(self, lines: LineFile) -> None:
        self._lines = lines
        self.answered = {row["id"]: Answered.of(row) for row in read_rows(lines.path)}

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add rows; when this returns they survive a crash."""
        self._lines.append(rows)
        self.answered.update({row["id"]: Answered.of(row) for row in rows})


@contextlib.contextmanager
def open_responses(path: Path, settings: dict[str, Any]) -> Iterator[ResponseFile]:
    """Open a response file to continue it, alone; see `open_lines`.

    Raises:
        ValueError: the file was begun with other settings, or another process writes to it.
    """
    with open_lines(path, settings) as lines:
        yield ResponseFile(lines)


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
    encoded = [
        prompt_ids(tokenizer, [{"role": "user", "content": prompt["prompt"]}]) for prompt in prompts
    ]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for prompt, ids in zip(prompts, encoded, strict=True):
        if context and len(ids) + sampling.max_new_tokens > context:
            raise ValueError(
                f"prompt {prompt['id']!r} has {len(ids)} tokens, and with max_new_tokens "
                f"{sampling.max_new_tokens} exceeds the target's context of {context}"
            )
    keys = [prompt["id"] for prompt in prompts]
    responses = _sample(model, encoded, keys, sampling, _end_ids(model, tokenizer), advance)
    texts = [
        tokenizer.decode(
            response.ids[:-1] if response.finished else response.ids,
            clean_up_tokenization_spaces=False,
        )
        for response in responses
    ]
    return [
        conversation_row(prompt, text, response.finished, response.ids)
        for prompt, text, response in zip(prompts, texts, responses, strict=True)
    ]


def conversation_row(
    prompt: dict[str, str], text: str, finished: bool, ids: list[int] | None
) -> dict[str, Any]:
    """Return a row of a response file; see `specforge_lk.data.conversations`."""
    messages = [
        {"role": "user", "content": prompt["prompt"]},
        {"role": "assistant", "content": text},
    ]
    row = {"id": prompt["id"], "conversations": messages, "finished": finished}
    return row if ids is None else {**row, "response_ids": ids}


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

    generator = torch.Generator().manual_seed(sampling.number(key))
    return torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64)


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a response, as the target's generation settings name them."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    return [ids] if isinstance(ids, int) else list(ids or ())


def settings_of(target: str, dtype: str, sampling: Sampling) -> dict[str, Any]:
    """Return what must stay equal while one response file is written.

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
    "Answered",
    "Response",
    "ResponseFile",
    "Sampling",
    "conversation_row",
    "generate",
    "open_responses",
    "pending",
    "read_prompts",
    "settings_of",
]
