"""Changes of loaded drafts and of their target that conditions are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from specforge_lk.decode.target import Target
from specforge_lk.doctor.measure import Edit, TargetEdit


def layers(wanted: Sequence[int]) -> Edit:
    """Let the draft read the outputs of these decoder layers, counted from 0."""

    def apply(draft: Any, target: Target) -> None:
        draft.capture_layers = tuple(wanted)

    return Edit(f"layers: {', '.join(map(str, wanted))}", apply)


def features_in(dtype: str) -> Edit:
    """Round the features that the draft reads to a dtype."""

    def apply(draft: Any, target: Target) -> None:
        original = draft.teacher_forced

        def rounded(
            tokens: torch.Tensor, features: torch.Tensor, starts: torch.Tensor, heads: int
        ) -> Iterator[torch.Tensor]:
            features = features.to(getattr(torch, dtype)).to(features.dtype)
            return original(tokens, features, starts, heads)

        draft.teacher_forced = rounded

    return Edit(f"features in {dtype}", apply)


def vocabulary(ids: torch.Tensor, name: str) -> Edit:
    """Let the rows of the draft's LM head stand for other target ids [V_d]."""

    def apply(draft: Any, target: Target) -> None:
        draft.draft_ids = ids.to(target.device)

    return Edit(f"draft vocabulary: {name}", apply)


def mask_token(token: int) -> Edit:
    """Let another token stand for those that are not known yet."""

    def apply(draft: Any, target: Target) -> None:
        draft.mask_token = token

    return Edit(f"mask token: {token}", apply)


def _lend_embeddings(draft: Any, target: Target) -> None:
    shared = target.model.get_input_embeddings().weight.detach()
    holder = getattr(draft, "_decoder", draft)
    holder.embed_tokens = nn.Embedding.from_pretrained(shared)


def _lend_head(draft: Any, target: Target) -> None:
    draft._head = target.head


def _transform_lent(draft: Any, target: Target) -> None:
    class Beside:
        """The target, whose lent LM head makes whole logits."""

        lent_logits = staticmethod(target.head_logits)
        embed = staticmethod(target.embed)
        vocab_size = target.vocab_size

    if hasattr(draft, "_head"):
        draft._head = _Function(target.head_logits)
    else:
        draft._target = (Beside(),)


class _Function(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self._function(states)


def _normalize_output(draft: Any, target: Target) -> None:
    draft._normalize = True


def _feed_normalized(draft: Any, target: Target) -> None:
    draft._feed_normalized = True


def _round_frequencies(draft: Any, target: Target) -> None:
    frequencies = draft._rotary.inv_freq
    draft._rotary.inv_freq = frequencies.bfloat16().to(frequencies.dtype)


def _zero_first(draft: Any, target: Target) -> None:
    run, norm = draft._run, draft._norm_e
    at: list[torch.Tensor] = []

    class ZeroFirst(nn.Module):
        def forward(self, embedded: torch.Tensor) -> torch.Tensor:
            return norm(embedded.masked_fill((at[-1] == 0)[..., None], 0))

    def remembering(
        tokens: torch.Tensor, states: torch.Tensor, positions: torch.Tensor, *rest: Any
    ) -> torch.Tensor:
        at[:] = [positions]
        return run(tokens, states, positions, *rest)

    draft._norm_e, draft._run = ZeroFirst(), remembering


LEND_EMBEDDINGS = Edit("embeddings: the target's", _lend_embeddings)
LEND_HEAD = Edit("LM head: the target's", _lend_head)
TRANSFORM_LENT = Edit("lent LM head: with the target's transform", _transform_lent)
#: vLLM's meaning of ``norm_output``: the state after the output norm is fed back.
FEED_NORMALIZED = Edit("state fed back: after the output norm", _feed_normalized)
#: vLLM's output norm, which ``norm_output`` does not switch off.
NORMALIZE_OUTPUT = Edit("output norm: before the LM head", _normalize_output)
ROUND_FREQUENCIES = Edit("rotary frequencies: in bfloat16", _round_frequencies)
ZERO_FIRST = Edit("embedding at position 0: zero", _zero_first)


def head_in(dtype: str) -> TargetEdit:
    """Round the target's LM head to a dtype."""

    @contextmanager
    def during(target: Target) -> Iterator[None]:
        weight = target.head.weight
        rounded = weight.detach().to(getattr(torch, dtype)).to(weight.dtype)
        # A parameter of the LM head alone, so that an embedding tied to it stays as it is.
        target.head.weight = nn.Parameter(rounded, requires_grad=False)
        try:
            yield
        finally:
            target.head.weight = weight

    return TargetEdit(f"the target's LM head in {dtype}", during)


@contextmanager
def _plain(target: Target) -> Iterator[None]:
    target.head_logits = target.lent_logits  # type: ignore[method-assign]
    try:
        yield
    finally:
        del target.head_logits


PLAIN_LOGITS = TargetEdit("the target's logits without their transform", _plain)


__all__ = [
    "FEED_NORMALIZED",
    "LEND_EMBEDDINGS",
    "LEND_HEAD",
    "NORMALIZE_OUTPUT",
    "PLAIN_LOGITS",
    "ROUND_FREQUENCIES",
    "TRANSFORM_LENT",
    "ZERO_FIRST",
    "features_in",
    "head_in",
    "layers",
    "mask_token",
    "vocabulary",
]
