"""Rejection sampling of speculative decoding (Leviathan et al. 2023, Algorithm 1), batched.

Probabilities stay in the dtype of the logits, float32 by default. A float32 probability is off by
about 6e-8 of itself, which moves an acceptance by the same amount: five orders of magnitude below
the sampling noise of any benchmark here, while float64 would double the largest tensor of the
loop, the [B, n, V] target distributions. The acceptance test multiplies (u·q < p) instead of
dividing, so that q = 0 needs no special case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from specforge_lk.serving import Sampling


@dataclass(frozen=True)
class Verdict:
    """Outcome of verifying drafted tokens.

    Attributes:
        accepted: [B] int64, drafted tokens accepted, 0..n.
        next_token: [B] int64, the target's own token after them: resampled from the residual
            distribution after a rejection, or the bonus token when all were accepted. Without
            meaning where accepted = n, since no target distribution follows the last token then.
    """

    accepted: torch.Tensor
    next_token: torch.Tensor


class NonFiniteLogits(ValueError):
    """A model returned logits that are NaN, +inf, or -inf throughout."""


def check_finite(logits: torch.Tensor, source: str, remedy: str) -> None:
    """Raise `NonFiniteLogits` unless every row of ``logits`` [..., V] has a finite maximum."""
    if not torch.isfinite(logits.amax(-1)).all():
        raise NonFiniteLogits(f"{source} returned non-finite logits; {remedy}")


class Shape(NamedTuple):
    """Which tokens a row of logits [..., V] may give, and the normalizer of these.

    Logits are counted from the greatest one before they are divided by the temperature: a low one
    would make them too large for float32 to tell them apart.

    Attributes:
        greatest: [...] the highest logit.
        least: [...] the lowest logit kept; -inf where none is cut off.
        log_normalizer: [...] log of the sum of exp((logit - greatest) / temperature) over those
            kept.
    """

    greatest: torch.Tensor
    least: torch.Tensor
    log_normalizer: torch.Tensor


#: Likeliest tokens among which top-p is looked for, before all are sorted.
_LIKELIEST = 256


def shape(logits: torch.Tensor, sampling: Sampling) -> Shape:
    """Find what top-k and top-p keep of logits [..., V]; see `Sampling` for their order and ties.

    Raises:
        ValueError: the temperature is 0, where there is no distribution to normalize.
    """
    if sampling.temperature == 0:
        raise ValueError("at temperature 0 take the argmax")
    greatest = logits.amax(-1)
    least = torch.full_like(greatest, -torch.inf)
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, -1).values[..., -1]
    log_normalizer = _log_normalizer(logits, greatest, least, sampling)
    if sampling.top_p < 1:
        rows = logits.reshape(-1, logits.shape[-1])
        found, over = least.reshape(-1).clone(), log_normalizer.reshape(-1)
        # The likeliest tokens nearly always suffice; a whole row is costly to sort.
        width = min(_LIKELIEST, rows.shape[-1])
        found[:], enough = _least_of_top_p(rows.topk(width, -1).values, found, over, sampling)
        if width < rows.shape[-1] and not enough.all():
            rest = (~enough).nonzero().squeeze(1)
            whole = rows[rest].sort(-1, descending=True).values
            found[rest] = _least_of_top_p(whole, least.reshape(-1)[rest], over[rest], sampling)[0]
        least = found.view_as(least)
        log_normalizer = _log_normalizer(logits, greatest, least, sampling)
    return Shape(greatest, least, log_normalizer)


def _log_normalizer(
    logits: torch.Tensor, greatest: torch.Tensor, least: torch.Tensor, sampling: Sampling
) -> torch.Tensor:
    scaled = (logits - greatest[..., None]).div_(sampling.temperature)
    if sampling.truncates:
        scaled.masked_fill_(logits < least[..., None], -torch.inf)
    return torch.logsumexp(scaled, -1)


def _least_of_top_p(
    likeliest: torch.Tensor, least: torch.Tensor, log_normalizer: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lowest logit that top-p keeps [n], and [n] bool, whether it is among these.

    Args:
        likeliest: [n, W] the highest logits, in descending order.
        least: [n] the lowest logit that top-k keeps.
        log_normalizer: [n] of what top-k keeps; see `Shape`.
        sampling: the settings.
    """
    scaled = (likeliest - likeliest[:, :1]).double() / sampling.temperature
    p = torch.exp(scaled - log_normalizer.double()[:, None])
    above = p.cumsum(-1) - p  # the probability of all likelier ones
    kept = (above < sampling.top_p) & (likeliest >= least[:, None])
    kept[:, 0] = True
    last = kept.sum(-1) - 1
    enough = last < likeliest.shape[-1] - 1
    return likeliest.gather(1, last[:, None]).squeeze(1), enough


def probabilities(logits: torch.Tensor, found: Shape, sampling: Sampling) -> torch.Tensor:
    """Return the probabilities of tokens with these logits [..., V'], in rows of this shape [...].

    They may be those of a part of the vocabulary: then they do not sum to 1.
    """
    scaled = (logits - found.greatest[..., None]).div_(sampling.temperature)
    p = scaled.sub_(found.log_normalizer[..., None]).exp_()
    return p.masked_fill_(logits < found.least[..., None], 0) if sampling.truncates else p


def distribution(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return the probabilities [..., V] that tokens are sampled with; one-hot at temperature 0."""
    if sampling.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, best, 1)
    if not sampling.truncates:
        return torch.softmax(logits / sampling.temperature, dim=-1)
    return probabilities(logits, shape(logits, sampling), sampling)


def draw(probabilities: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Sample one index per row: [..., V] weights (not necessarily normalized) -> [...] int64."""
    flat = probabilities.reshape(-1, probabilities.shape[-1])
    return torch.multinomial(flat, 1, generator=generator).reshape(probabilities.shape[:-1])


def choose(
    logits: torch.Tensor, sampling: Sampling, generator: torch.Generator | None
) -> torch.Tensor:
    """Return the next token [...] of logits [..., V]: a sample, the argmax at temperature 0."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return draw(distribution(logits, sampling), generator)


def verify(
    drafted: torch.Tensor,
    count: torch.Tensor,
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor | None,
    *,
    draft_ids: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Accept a prefix of the drafted tokens so that the output follows the target exactly.

    x_i is accepted with probability min(1, p_i(x_i) / q_i(x_i)); the first rejection is replaced
    by a sample from max(p - q, 0), normalized; if nothing is rejected the bonus token comes from
    the p that follows. A greedy draft (q one-hot at x) accepts with p(x) and resamples from p
    without x.

    Args:
        drafted: [B, n] int64, drafted tokens as indices into the draft vocabulary.
        count: [B] int64, how many of them exist, at most n; with count < n there is a p for the
            bonus token.
        target_probs: [B, n, V] target distributions p over the full vocabulary.
        draft_probs: [B, n, V_d] distributions q the tokens were sampled from, or None for a
            greedy draft.
        draft_ids: [V_d] int64, target id of every draft index; None when V_d = V.
        generator: source of all randomness.
    """
    batch, width = drafted.shape
    rows = torch.arange(batch, device=drafted.device)
    tokens = drafted if draft_ids is None else draft_ids[drafted]
    p_token = target_probs.gather(2, tokens[..., None]).squeeze(2)
    q_token = (
        torch.ones_like(p_token)
        if draft_probs is None
        else draft_probs.gather(2, drafted[..., None]).squeeze(2)
    )
    uniform = torch.rand(
        p_token.shape, generator=generator, dtype=p_token.dtype, device=p_token.device
    )
    exists = torch.arange(width, device=count.device) < count[:, None]
    accepted = ((uniform * q_token < p_token) & exists).long().cumprod(1).sum(1)

    # Only the distribution at the first rejection (or the bonus position) is needed per row.
    at = accepted.clamp(max=width - 1)
    p_next = target_probs[rows, at]
    rejected = accepted < count
    if draft_probs is None:
        residual = p_next.clone()
        residual[rows[rejected], tokens[rows, at][rejected]] = 0
    else:
        residual = _left_over(p_next, draft_probs[rows, at] * rejected[:, None], draft_ids)
    return Verdict(accepted, _drawn_from(residual, p_next, generator))


def _left_over(
    p: torch.Tensor, subtracted: torch.Tensor, draft_ids: torch.Tensor | None
) -> torch.Tensor:
    """Return max(p - q, 0) [B, V], of q [B, V_d] on the draft vocabulary."""
    residual = p.clone()
    if draft_ids is None:
        residual -= subtracted
    else:
        residual[:, draft_ids] -= subtracted
    return residual.clamp_(min=0)


def _drawn_from(
    residual: torch.Tensor, p: torch.Tensor, generator: torch.Generator | None
) -> torch.Tensor:
    """Sample from weights [B, V]; from p, their limit where p = q, if rounding left nothing."""
    empty = residual.sum(-1, keepdim=True) <= 0
    return draw(torch.where(empty, p, residual), generator)


def verify_block(
    drafted: torch.Tensor,
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    *,
    draft_ids: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Verdict, torch.Tensor]:
    """Accept a prefix of whole chains (Sun et al. 2024, arXiv 2403.10444, Algorithm 2).

    With w_0 = 1 and w_i = min(1, w_{i-1} p_i(x_i) / q_i(x_i)), the chance to keep i tokens or more
    of a chain is w_i. The number kept is the largest i whose own test succeeds, of chance

        h_i = S_i / (S_i + 1 - w_i),  S_i = sum max(w_i p_{i+1} - q_{i+1}, 0),  h_K = w_K,

    and the next token comes from max(w_i p_{i+1} - q_{i+1}, 0), normalized.

    Args:
        drafted: [B, K + 1] int64, drafted tokens as draft indices; the last is filler.
        target_probs: [B, K + 1, V] target distributions, the last for the bonus token.
        draft_probs: [B, K + 1, V_d] distributions the tokens were sampled from; the last is filler.
        draft_ids: [V_d] int64, target id of every draft index; None when V_d = V.
        generator: source of all randomness.

    Returns:
        The verdict, and [B, K + 1] the chance sum min(w_i p, q) / w_i to keep token i + 1, too,
        where i were kept.
    """
    batch, heads = len(drafted), drafted.shape[1] - 1
    rows = torch.arange(batch, device=drafted.device)
    on_draft = target_probs if draft_ids is None else target_probs[..., draft_ids]
    at = drafted[..., None]
    ratio = (on_draft.gather(2, at) / draft_probs.gather(2, at)).squeeze(2)
    kept = [torch.ones_like(ratio[:, 0])]
    for position in range(heads):
        kept.append((kept[-1] * ratio[:, position]).clamp(max=1))
    w = torch.stack(kept, 1)
    overlap = torch.minimum(w[..., None] * on_draft, draft_probs).sum(-1)
    left = (w - overlap).clamp(min=0)  # S_i: sum max(a - b, 0) = sum a - sum min(a, b)
    chance = left / (left + 1 - w).clamp(min=torch.finfo(w.dtype).tiny)
    chance[:, heads] = w[:, heads]
    uniform = torch.rand(w.shape, generator=generator, dtype=w.dtype, device=w.device)
    passed = (uniform < chance)[:, 1:] * torch.arange(1, heads + 1, device=w.device)
    accepted = passed.amax(1)
    p_next = target_probs[rows, accepted]
    subtracted = draft_probs[rows, accepted] * (accepted < heads)[:, None]
    residual = _left_over(p_next * w[rows, accepted, None], subtracted, draft_ids)
    following = _drawn_from(residual, p_next, generator)
    return Verdict(accepted, following), overlap / w.clamp(min=torch.finfo(w.dtype).tiny)


def verify_greedy(
    tokens: torch.Tensor, count: torch.Tensor, target_tokens: torch.Tensor
) -> Verdict:
    """Verification at temperature 0: accept while the drafted token is the target's argmax.

    Args:
        tokens: [B, n] int64, drafted tokens in the target vocabulary.
        count: [B] int64, how many of them exist.
        target_tokens: [B, n] int64, the target's argmax at every position.
    """
    width = tokens.shape[1]
    exists = torch.arange(width, device=count.device) < count[:, None]
    accepted = ((tokens == target_tokens) & exists).long().cumprod(1).sum(1)
    at = accepted.clamp(max=width - 1)
    return Verdict(accepted, target_tokens.gather(1, at[:, None]).squeeze(1))
