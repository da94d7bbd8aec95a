"""What the implementers of `specforge_lk.decode.draft.Draft` share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from specforge_lk.decode.draft import Proposal
from specforge_lk.decode.sampling import check_finite
from specforge_lk.decode.target import Target
from specforge_lk.serving import Sampling

#: Keys and values of one layer, [B, slots, kv_heads, head_dim] each.
KeysValues = tuple[torch.Tensor, torch.Tensor]


class BaseDraft(nn.Module, ABC):
    """The draft vocabulary, where the next chain starts, and the check of logits.

    `Draft` documents attributes and methods.

    Args:
        capture_layers: the target layers that the features come from.
        draft_ids: [V_d] target ids of the draft vocabulary; None for the whole vocabulary.
        max_heads: the longest chain; None when unlimited.
    """

    algorithm: str
    draft_ids: torch.Tensor | None

    def __init__(
        self,
        capture_layers: tuple[int, ...],
        draft_ids: torch.Tensor | None = None,
        max_heads: int | None = None,
    ) -> None:
        super().__init__()
        self.capture_layers = capture_layers
        self.max_heads = max_heads
        self.register_buffer("draft_ids", draft_ids, persistent=False)
        #: What the next chain starts from, [B, 1, …] each.
        self._chain: tuple[torch.Tensor, ...] = ()

    @classmethod
    @abstractmethod
    def load(
        cls, path: Path, config: dict[str, Any], target: Target, layers: tuple[int, ...] | None
    ) -> Self:
        """Load an exported draft; see `specforge_lk.decode.draft.load_draft`."""

    @abstractmethod
    def start(self, batch: int, capacity: int) -> None:
        """See `Draft.start`."""

    @abstractmethod
    def observe(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor,
    ) -> None:
        """See `Draft.observe`."""

    @abstractmethod
    def propose(
        self, heads: int, sampling: Sampling, generator: torch.Generator | None
    ) -> Proposal:
        """See `Draft.propose`."""

    @abstractmethod
    def teacher_forced(
        self, tokens: torch.Tensor, features: torch.Tensor, starts: torch.Tensor, heads: int
    ) -> Iterator[torch.Tensor]:
        """See `Draft.teacher_forced`."""

    def keep_rows(self, rows: torch.Tensor) -> None:
        """See `Draft.keep_rows`."""
        self._chain = tuple(value[rows] for value in self._chain)

    def target_ids(self, index: torch.Tensor) -> torch.Tensor:
        """Return the target ids of draft indices."""
        return index if self.draft_ids is None else self.draft_ids[index]

    def _start_chain(self, valid: torch.Tensor, *values: torch.Tensor) -> None:
        """Start the next chain at the last valid entry of every row.

        Args:
            valid: [B, n] bool, at least one entry of each row.
            values: [B, n, …] each.
        """
        index = torch.arange(valid.shape[1], device=valid.device)
        last = torch.where(valid, index, -1).amax(1, keepdim=True)
        rows = torch.arange(len(valid), device=valid.device)[:, None]
        self._chain = tuple(value[rows, last] for value in values)

    @staticmethod
    def _checked(logits: torch.Tensor) -> torch.Tensor:
        """Return logits in at least float32.

        Raises:
            NonFiniteLogits: a logit is nan or infinite.
        """
        check_finite(
            logits, "the draft", "its training diverged or its file is damaged: use another one"
        )
        return logits if logits.dtype == torch.float64 else logits.float()


class CachedDraft(BaseDraft):
    """A draft whose layers cache keys and values, a position's in the slot of its number.

    A drafted or rejected position is therefore simply overwritten by the verified one, always
    before a later query can reach it, and rows of different lengths need no padding.

    A subclass has ``fc``, the projection of the features.

    Args:
        config: a config of transformers with the sizes.
        layers: number of layers that cache.
        capture_layers: see `BaseDraft`, as the rest.
    """

    fc: nn.Linear

    def __init__(
        self,
        config: Any,
        layers: int,
        capture_layers: tuple[int, ...],
        draft_ids: torch.Tensor | None = None,
    ) -> None:
        super().__init__(capture_layers, draft_ids)
        self.config = config
        self._count = layers
        self._cache: list[KeysValues] = []

    def start(self, batch: int, capacity: int) -> None:
        """Allocate the cache: one slot per position, and one more that takes invalid entries."""
        shape = (batch, capacity + 1, self.config.num_key_value_heads, self.config.head_dim)
        empty = self.fc.weight.new_zeros(shape)
        self._cache = [(empty.clone(), empty.clone()) for _ in range(self._count)]

    def keep_rows(self, rows: torch.Tensor) -> None:
        """See `Draft.keep_rows`."""
        super().keep_rows(rows)
        self._cache = [(keys[rows], values[rows]) for keys, values in self._cache]

    def _write(
        self,
        layer: int,
        states: KeysValues,
        positions: torch.Tensor,
        valid: torch.Tensor | None = None,
    ) -> None:
        """Write keys and values of [B, n] entries to the slots of their positions."""
        trash = self._cache[layer][0].shape[1] - 1
        slots = positions if valid is None else torch.where(valid, positions, trash)
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        for cached, fresh in zip(self._cache[layer], states, strict=True):
            cached[rows, slots] = fresh

    def _read(self, length: int) -> list[KeysValues]:
        """Return the first ``length`` slots of every layer."""
        return [(keys[:, :length], values[:, :length]) for keys, values in self._cache]
