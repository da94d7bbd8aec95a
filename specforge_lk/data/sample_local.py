"""Sample a target's responses to prompts with local transformers.

`specforge_lk.data.sample_server` does the same with a server.

All the randomness of a response is one vector of uniforms drawn from (seed, prompt id) before the
first token. So a response does not depend on which prompts share its batch, beyond the rounding
of the arithmetic, and an interrupted run continues as if it had not stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specforge_lk.data.conversations import Chat, response_text
from specforge_lk.data.responses import (
    Prompt,
    Request,
    conversation_row,
    messages_of,
    prompt_ids_of,
)
from specforge_lk.data.rows import MalformedRow
from specforge_lk.data.tool_calls import tools_in
from specforge_lk.decode.sampling import check_finite, distribution
from specforge_lk.serving import Sampling
from specforge_lk.target import eos_ids


@dataclass(frozen=True)
class Response:
    """The sampled token ids, and whether they end with the end-of-turn token."""

    ids: list[int]
    finished: bool


def sample_responses(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    request: Request,
    *,
    advance: Callable[[int, int], None] = lambda tokens, budget: None,
) -> list[dict[str, Any]]:
    """Sample one response to each prompt, all in one batch, and return conversation rows.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer, with a chat template.
        prompts: Rows ``{"id", "prompt"}`` or ``{"id", "messages"}``, at least one. The messages
            of a chat end with a user's turn; those of the row then end with the response to it.
        request: Sampling, length and seed.
        advance: Called after every step with the number of tokens sampled and how much of the
            ``max_new_tokens`` budget they used up (a response that ends frees all of its own).

    Raises:
        ValueError: a prompt and its response exceed the target's context;
            `fits` says so before.
    """
    chat = chat_of(model, tokenizer, request)
    encoded = [fits(model, chat, prompt, request) for prompt in prompts]
    keys = [prompt["id"] for prompt in prompts]
    responses = _sample(model, encoded, keys, request, sorted(chat.eos_ids), advance)
    texts = [response_text(tokenizer, response.ids, response.finished) for response in responses]
    return [
        conversation_row(
            *(prompt, text, response.finished, response.ids, request.sampling),
            chat.arguments
            if chat.changed_by_arguments(messages_of(prompt), tools_in(prompt))
            else None,
        )
        for prompt, text, response in zip(prompts, texts, responses, strict=True)
    ]


def chat_of(model: Any, tokenizer: Any, request: Request) -> Chat:
    """Return the chat template and the ends of responses that a request goes by."""
    ends = eos_ids(model.generation_config, tokenizer)
    return Chat(tokenizer, ends, request.chat_template_args)


def fits(model: Any, chat: Chat, prompt: Prompt, request: Request) -> list[int]:
    """Return a prompt's tokens.

    Raises:
        MalformedRow: the chat template refuses the prompt, or with a response it exceeds the
            target's context.
    """
    ids = prompt_ids_of(chat, prompt)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and len(ids) + request.max_new_tokens > context:
        raise MalformedRow(
            f"prompt {prompt['id']!r} has {len(ids)} tokens, and with max_new_tokens "
            f"{request.max_new_tokens} exceeds the target's context of {context}; "
            "lower --max-new-tokens, or shorten it"
        )
    return ids


def _sample(
    model: Any,
    encoded: list[list[int]],
    keys: list[str],
    request: Request,
    end_ids: list[int],
    advance: Callable[[int, int], None],
) -> list[Response]:
    """Sample from a left-padded batch; rows that have ended leave it in groups."""
    with torch.inference_mode():
        device = model.device
        longest = max(map(len, encoded))
        rows = [[0] * (longest - len(ids)) + ids for ids in encoded]
        attention = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in encoded]
        step_ids = torch.tensor(rows, device=device)
        mask = torch.tensor(attention, device=device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        uniforms = torch.stack([_uniforms(request, key) for key in keys]).to(device)
        ends = torch.tensor(end_ids, device=device)
        cache = None
        sampled: list[list[int]] = [[] for _ in keys]
        in_batch = list(range(len(keys)))  # which response each row of the batch is
        running = set(in_batch)
        for step in range(request.max_new_tokens):
            output = model(
                input_ids=step_ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            tokens = _draw(output.logits[:, -1], request.sampling, uniforms[:, step])
            ended = torch.isin(tokens, ends).tolist()
            alive = len(running)
            spent = alive
            for index, token, end in zip(in_batch, tokens.tolist(), ended, strict=True):
                if index in running:
                    sampled[index].append(token)
                    if end:
                        running.remove(index)
                        spent += request.max_new_tokens - step - 1
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


def _draw(logits: torch.Tensor, sampling: Sampling, uniform: torch.Tensor) -> torch.Tensor:
    """Draw tokens [B] from logits [B, V] by inverting the cumulative distribution at uniform [B].

    The sum runs in float64: in float32 the rare tokens at its end would be lost to rounding.

    Raises:
        NonFiniteLogits: a row of logits is no distribution.
    """
    check_finite(logits, "the target", "check its weights, and load it with --dtype float32")
    if sampling.temperature == 0:
        return logits.argmax(-1)
    cumulative = distribution(logits.float(), sampling).cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # Rounding can make it the total, beyond which there is no token.
    threshold = (uniform[:, None] * total).minimum(total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)


def _uniforms(request: Request, key: str) -> torch.Tensor:
    """Return the uniform numbers [max_new_tokens] in [0, 1) that belong to one prompt."""
    generator = torch.Generator().manual_seed(request.number(key))
    return torch.rand(request.max_new_tokens, generator=generator, dtype=torch.float64)


__all__ = ["Response", "chat_of", "fits", "sample_responses"]
