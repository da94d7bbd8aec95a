"""Conversation JSONL: SpecForge's ``conversations`` rows, read and tokenized with a loss mask.

A row is ``{"id", "conversations": [{"role", "content"}, ...]}``. Rows written by ``specforge-lk
generate`` also have ``response_ids``, the sampled tokens of the last message, ``finished``,
whether they end with the end-of-turn token, and ``sampling``, what they were sampled from
(`specforge_lk.data.responses.sampling_of`). The ids are kept because text does not give them
back: at temperature 1 a model often samples another token sequence than its tokenizer makes of
the same text, and training on the latter would not be on-policy.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

#: One chat message, ``{"role": ..., "content": ...}``.
Message = dict[str, str]


@dataclass(frozen=True)
class Tokens:
    """The tokens of one conversation, as the target reads it.

    Attributes:
        input_ids: [L] token ids.
        loss_mask: [L] 1 on assistant tokens, the end-of-turn token included, else 0.
    """

    input_ids: list[int]
    loss_mask: list[int]


def prompt_ids(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Return the token ids of ``messages`` in the chat template, up to the assistant's turn."""
    return _render(tokenizer, messages, add_generation_prompt=True)


def response_text(tokenizer: Any, ids: list[int], finished: bool) -> str:
    """Return the text of sampled tokens, without the one that ends a finished response."""
    text = tokenizer.decode(ids[:-1] if finished else ids, clean_up_tokenization_spaces=False)
    return str(text)


def tokenize(row: dict[str, Any], tokenizer: Any, eos_ids: Collection[int]) -> Tokens:
    """Tokenize a conversation row and mark what the assistant said.

    Every assistant message is supervised. Where the row has ``response_ids`` they are the last
    message; otherwise the chat template and the tokenizer decide its tokens, up to the first that
    ends a response: one of ``eos_ids``, or the tokenizer's own, where servers stop too. The target
    is asked for nothing that follows.

    Args:
        row: See the module.
        tokenizer: The target's tokenizer.
        eos_ids: The tokens at which generation stops, see `specforge_lk.target.eos_ids`.

    Raises:
        ValueError: the row has no assistant message, or the chat template renders a
            conversation so that it does not begin with its own first messages.
    """
    messages = row.get("conversations")
    if not messages or not all({"role", "content"} <= set(message) for message in messages):
        raise ValueError(f"row {row.get('id')!r}: conversations must be a list of role and content")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"row {row.get('id')!r}: the last message must be the assistant's")
    ends = {*eos_ids, tokenizer.eos_token_id}
    input_ids: list[int] = []
    loss_mask: list[int] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = prompt_ids(tokenizer, messages[:index])
        if prompt[: len(input_ids)] != input_ids:
            raise ValueError(
                f"row {row.get('id')!r}: the chat template changes earlier turns; "
                "keep only the first question and answer of this conversation"
            )
        last = index == len(messages) - 1
        if last and "response_ids" in row:
            response = list(row["response_ids"])
        else:
            finished = row.get("finished", True) or not last
            response = _rendered(tokenizer, messages[: index + 1], prompt)
            end = next((i for i, token in enumerate(response) if token in ends), None)
            if end is not None:
                response = response[: end + finished]
        loss_mask += [0] * (len(prompt) - len(input_ids)) + [1] * len(response)
        input_ids = prompt + response
    return Tokens(input_ids, loss_mask)


def _rendered(tokenizer: Any, messages: list[Message], prompt: list[int]) -> list[int]:
    """Return the tokens of the last message and of what the chat template puts behind it."""
    rendered = _render(tokenizer, messages, add_generation_prompt=False)
    if rendered[: len(prompt)] != prompt:
        raise ValueError(
            "the chat template renders the assistant's turn differently from the prompt that "
            "asks for it; give the rows response_ids, as specforge-lk generate does"
        )
    return rendered[len(prompt) :]


def _render(tokenizer: Any, messages: list[Message], *, add_generation_prompt: bool) -> list[int]:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template; "
            "save one with it, or use an instruction-tuned target"
        )
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, return_dict=False
    )


__all__ = ["Message", "Tokens", "prompt_ids", "response_text", "tokenize"]
