"""What the drafts of this package have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from specforge.modeling.draft.base import Eagle3DraftModel
from torch import nn
from transformers import PreTrainedModel

#: Tensors that map a draft vocabulary to the target's, in every checkpoint of a draft.
VOCABULARY: Final = ("t2d", "d2t")


class HeadDraftModel(PreTrainedModel, ABC):
    """A draft that proposes a chain from the target's last hidden state.

    At position t the target's state h_t is known, and with it token t + 1. Head k = 0, 1, …
    predicts token t + 2 + k from h_t and tokens t + 1 … t + 1 + k, or from some of these.

    A subclass has ``config.vocab_size`` and ``config.draft_vocab_size``; it implements
    `head_logits`, and `initialise` where it starts from the target's head.

    Attributes:
        t2d: [V] bool, tokens of the draft vocabulary.
        d2t: [V_d] offsets, target id = draft index + d2t[draft index].
    """

    _supports_sdpa = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        size, kept = config.vocab_size, config.draft_vocab_size
        # The first tokens, until a mapping is loaded: the whole vocabulary where none is needed.
        self.register_buffer("t2d", torch.arange(size) < kept)
        self.register_buffer("d2t", torch.zeros(kept, dtype=torch.long))
        # Not a module of its own: the target's weights are no weights of the draft.
        self._target_head: tuple[torch.Tensor, ...] = ()

    @property
    @abstractmethod
    def heads(self) -> int | None:
        """Heads that the draft has; None where one module is used over and over."""

    @abstractmethod
    def head_logits(
        self, hidden: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, heads: int
    ) -> Iterator[torch.Tensor]:
        """Teacher-forced logits of every head at every position.

        Args:
            hidden: [B, L, H] the target's last hidden states, after its final norm.
            tokens: [B, L] the token FOLLOWING each position; 0 behind the end.
            mask: [B, L] 1 for tokens, 0 for padding.
            heads: number of heads K.

        Yields:
            K times [B, L, V_d].
        """

    @property
    def lent(self) -> frozenset[str]:
        """Tensors that the target lends and checkpoints leave out."""
        return frozenset()

    # The target's part

    def start_from(self, target_head: torch.Tensor) -> None:
        """Initialise what comes from the target's head [V, H]; again at a change of vocabulary."""
        self._target_head = (target_head,)
        self.initialise(target_head[self.t2d.to(target_head.device)])

    def initialise(self, rows: torch.Tensor) -> None:
        """Take over the rows [V_d, H] of the target's head."""

    def load_vocab_mapping(self, file_path: str) -> None:
        """Read t2d and d2t from a mapping in SpecForge's format."""
        # SpecForge's, with its checks; it asks of a draft no more than the two buffers.
        Eagle3DraftModel.load_vocab_mapping(self, file_path)
        if self._target_head:
            self.start_from(*self._target_head)

    # Engines' layout

    def engine_state(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint under the names that serving engines load."""
        return state

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write config.json and safetensors in the layout that serving engines load."""
        state = options.pop("state_dict", None) or self.state_dict()
        super().save_pretrained(save_directory, state_dict=self.engine_state(state), **options)

    def token_ids(self) -> torch.Tensor:
        """[V_d] target ids of the draft vocabulary."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t


def shifted(tokens: torch.Tensor, offset: int) -> torch.Tensor:
    """[B, L] tokens ``offset`` positions later; 0 behind the end."""
    return nn.functional.pad(tokens[:, offset:], (0, min(offset, tokens.shape[1])))
