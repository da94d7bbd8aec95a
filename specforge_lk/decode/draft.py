"""What the decoding loop and the evaluation ask of a draft, and how one is loaded.

`specforge_lk.drafts.table` has a row for every draft; `specforge_lk.decode.base` has what those
that are implemented here share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from specforge_lk.decode.checkpoint import DraftError, read_config
from specforge_lk.decode.target import Target
from specforge_lk.serving import Sampling


@dataclass(frozen=True)
class Proposal:
    """A drafted chain.

    Attributes:
        index: [B, K] int64, drafted tokens as indices into the draft vocabulary.
        tokens: [B, K] int64, the same tokens in the target vocabulary.
        logits: [B, K, V_d] draft logits each token was chosen from.
    """

    index: torch.Tensor
    tokens: torch.Tensor
    logits: torch.Tensor


class Draft(Protocol):
    """A draft model of any architecture.

    A chain starts at position t: the target has processed tokens 0..t, and token t + 1 is known
    (the target sampled it). Draft position k = 1..K proposes token t + 1 + k.
    """

    #: Name of the SpecForge algorithm that trained it.
    algorithm: str
    #: Target decoder layers whose outputs, concatenated, are the draft's features.
    capture_layers: tuple[int, ...]
    #: [V_d] target id of every draft index; None when the draft covers the whole vocabulary.
    draft_ids: torch.Tensor | None
    #: Longest chain it can propose; None when unlimited.
    max_heads: int | None

    def start(self, batch: int, capacity: int) -> None:
        """Forget everything; make room for ``batch`` rows of ``capacity`` positions."""
        ...

    def observe(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor,
    ) -> None:
        """Take in verified positions: the next chain starts at the last valid one of each row.

        Args:
            tokens: [B, n] the token FOLLOWING each position.
            features: [B, n, F] captured target states of each position.
            positions: [B, n] the positions, increasing along each row.
            valid: [B, n] bool, entries that exist; at least one per row.
        """
        ...

    def propose(
        self, heads: int, sampling: Sampling, generator: torch.Generator | None
    ) -> Proposal:
        """Draft ``heads`` tokens per row, the likeliest at temperature 0."""
        ...

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Continue with the given rows of the batch only."""
        ...

    def teacher_forced(
        self, tokens: torch.Tensor, features: torch.Tensor, starts: torch.Tensor, heads: int
    ) -> Iterator[torch.Tensor]:
        """Return logits at many chain starts at once, with the true tokens as drafted ones.

        Args:
            tokens: [B, L] sequences, padded on the right.
            features: [B, L, F] captured target states.
            starts: [B, L] bool with N chain starts, each at most L - 2 - heads.
            heads: number of draft positions K.

        Yields:
            K times [N, V_d], rows ordered as ``starts.nonzero()``.
        """
        ...


def load_draft(path: str | Path, target: Target, layers: tuple[int, ...] | None = None) -> Draft:
    """Load an exported draft for a target.

    Args:
        path: folder written by ``specforge export --to hf``, or in the layout of an engine.
        target: the target it drafts for; lends its embeddings when the draft has none.
        layers: captured target layers, overriding the draft's config.

    Raises:
        DraftError: the folder is incomplete, or does not fit itself or the target.
    """
    path = Path(path)
    config, kind = read_config(path)
    return kind.decoder().load(path, config, target, layers)


__all__ = ["Draft", "DraftError", "Proposal", "load_draft"]
