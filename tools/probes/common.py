"""What probes share: the smallest model, one batch, and what a patch level has."""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

#: A number, or a sentence for what is accepted or refused.
Figure = float | int | str
Figures = dict[str, Figure]

#: A batch of teacher-forced positions: target vocabulary, draft vocabulary.
BATCH, LENGTH, VOCABULARY, DRAFT_VOCABULARY = 4, 64, 2000, 500
#: The smallest draft and target configuration that SpecForge builds.
TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "vocab_size": 64,
    "tie_word_embeddings": False,
}


def outcome(action: Callable[[], Any], done: str = "accepted") -> str:
    """Return ``done``, or the error that ``action`` raised."""
    try:
        action()
    except Exception as error:
        return f"refused: {type(error).__name__}"
    return done


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Give a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def supported(function: Callable[..., Any], **options: Any) -> Any:
    """Call ``function`` with those of ``options`` that it has at this patch level."""
    known = inspect.signature(function).parameters
    return function(**{name: value for name, value in options.items() if name in known})


# ------------------------------------------------------------------------------ one batch


def batch(share: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return target logits [B, T, V], draft logits [B, T, V_d] and loss mask [B, T, 1].

    The draft knows the target, with noise; the draft vocabulary, the first V_d tokens, holds most
    of the target's mass but not every argmax. Masked positions that make ``share`` follow.
    """
    generator = torch.Generator().manual_seed(0)
    target = 3 * torch.randn(BATCH, LENGTH, VOCABULARY, generator=generator)
    target[..., :DRAFT_VOCABULARY] += 3
    noise = torch.randn(BATCH, LENGTH, DRAFT_VOCABULARY, generator=generator)
    logits = target[..., :DRAFT_VOCABULARY] + 1.5 * noise
    mask = torch.ones(BATCH, LENGTH, 1, dtype=torch.long)
    padding = round(LENGTH / share) - LENGTH
    target, logits, mask = (F.pad(x, (0, 0, 0, padding)) for x in (target, logits, mask))
    return target, logits, mask


def t2d() -> torch.Tensor:
    """Return the mask [V] of the draft vocabulary."""
    return torch.arange(VOCABULARY) < DRAFT_VOCABULARY


def objective(share: float = 1.0, **settings: Any) -> tuple[float, float, torch.Tensor]:
    """Return reported acceptance rate, loss and gradient [B, T, V_d] of EAGLE-3's objective."""
    from specforge.algorithms.eagle3.model import (
        _compute_loss_and_acceptance_rate,
        _compute_target_p,
    )

    target, logits, mask = batch(share)
    target_p, target_p_on_draft, _, position_mask = _compute_target_p(target, t2d(), mask)
    logits.requires_grad_(True)
    rate, loss = supported(
        _compute_loss_and_acceptance_rate,
        logits=logits,
        target_p=target_p,
        target_p_on_draft=target_p_on_draft,
        position_mask=position_mask,
        loss_mask=mask,
        **settings,
    )
    loss.backward()
    return rate.item(), loss.item(), gradient(logits)


def gradient(tensor: torch.Tensor) -> torch.Tensor:
    """Return the gradient that a backward pass left in ``tensor``."""
    if tensor.grad is None:
        raise RuntimeError("no gradient: the loss does not depend on this tensor")
    return tensor.grad


def exact_alpha() -> torch.Tensor:
    """Return the acceptance rate of every position, [B, T], in float64 by its definition."""
    target, logits, _ = (tensor.double() for tensor in batch())
    p = target.softmax(-1)[..., :DRAFT_VOCABULARY]
    return torch.minimum(p, logits.softmax(-1)).sum(-1)
