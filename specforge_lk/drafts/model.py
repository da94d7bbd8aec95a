"""The base class of the drafts that this package trains."""

from __future__ import annotations

import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from specforge.core.target_projection import LogitTransform
from specforge.modeling.draft.base import Eagle3DraftModel
from torch import nn
from transformers import PreTrainedModel

from specforge_lk.overlap import Projection

#: Tensors that map a draft vocabulary to the target's, in every checkpoint of a draft.
VOCABULARY: Final = ("t2d", "d2t")


@dataclass(frozen=True)
class TargetWeights:
    """The target's weights, which a draft may take over.

    The target's logits are transform(h W^T + b). Of that, engines compute h W^T for a draft
    (vLLM's medusa and MTP models).

    Attributes:
        head: [V, H] W, the weight of the target's LM head.
        read: returns a tensor of the target's checkpoint by its name.
        embedding_key: the name of its embedding.
        bias: [V] b, where the LM head has one.
        transform: the target's scale and soft cap.
    """

    head: torch.Tensor
    read: Callable[[str], torch.Tensor]
    embedding_key: str
    bias: torch.Tensor | None = None
    transform: LogitTransform = field(default_factory=LogitTransform)

    @property
    def beyond_weight(self) -> list[str]:
        """Parts of the target's logits that are not in its LM head's weight, by name."""
        settings = {"bias": self.bias, **vars(self.transform)}
        return [name for name, value in settings.items() if value is not None]

    def scaled_head(self, t2d: torch.Tensor) -> torch.Tensor:
        """Return the LM head on the draft vocabulary, [V_d, H], scaled as the target's logits.

        Warns of a bias or soft cap, which no weight can hold: the draft's logits are without.
        """
        lost = set(self.beyond_weight) & {"bias", "soft_cap"}
        if lost:
            warnings.warn(
                f"the target's {' and '.join(sorted(lost))} do not go with its head: engines "
                "multiply a draft's states by the weight alone, and training does the same",
                stacklevel=2,
            )
        scale = dataclasses.replace(self.transform, soft_cap=None)
        return scale(self.head[t2d.to(self.head.device)])


class HeadDraftModel(PreTrainedModel, ABC):
    """A draft that proposes a chain from the target's last hidden state.

    At position t the target's state h_t is known, and with it token t + 1. Draft position
    k = 0, 1, … predicts token t + 2 + k from h_t and tokens t + 1 … t + 1 + k, or some of these.

    A subclass has ``config.vocab_size`` and ``config.draft_vocab_size``; it implements
    `head_projections`, and `tie_to_target` and `start_from` where it takes weights from the target.
    One whose logits are no product of states and a weight implements `head_logits` in its place,
    and does without ``training.loss_fused_head``.

    Attributes:
        t2d: [V] bool, tokens of the draft vocabulary.
        d2t: [V_d] offsets, target id = draft index + d2t[draft index].
    """

    _supports_sdpa = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        size, kept = config.vocab_size, config.draft_vocab_size
        # The first tokens, until a mapping is loaded. The whole vocabulary needs none.
        truncated = kept < size
        self.register_buffer("t2d", torch.arange(size) < kept, persistent=truncated)
        self.register_buffer("d2t", torch.zeros(kept, dtype=torch.long), persistent=truncated)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize as transformers does, and refill the buffers that checkpoints lack."""
        super()._init_weights(module)
        if module is self and len(self.d2t) == len(self.t2d):
            self.t2d.fill_(True)
            self.d2t.zero_()

    @property
    @abstractmethod
    def heads(self) -> int | None:
        """Draft positions of the draft; None where one module is used over and over."""

    def head_projections(
        self, hidden: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, heads: int
    ) -> Iterator[Projection]:
        """Return what makes the teacher-forced logits of every draft position at every position.

        Args:
            hidden: [B, L, H] the target's last hidden states, after its final norm.
            tokens: [B, L] the token FOLLOWING each position; 0 behind the end.
            mask: [B, L] 1 for tokens, 0 for padding.
            heads: number of draft positions K.

        Yields:
            K times the draft's states [B, L, H_d] and the weight [V_d, H_d] of an LM head without
            bias.

        Raises:
            NotImplementedError: the draft implements `head_logits` alone.
        """
        raise NotImplementedError(
            f"{type(self).__name__} implements neither head_projections nor head_logits; "
            "give it one of them"
        )

    def head_logits(
        self, hidden: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, heads: int
    ) -> Iterator[torch.Tensor]:
        """Return the logits of `head_projections`: K times [B, L, V_d]."""
        for projection in self.head_projections(hidden, tokens, mask, heads):
            yield nn.functional.linear(*projection)

    @property
    def projects(self) -> bool:
        """Whether it implements `head_projections`."""
        return type(self).head_projections is not HeadDraftModel.head_projections

    @property
    def tied_keys(self) -> frozenset[str]:
        """Names of the target's weights that checkpoints omit."""
        return frozenset()

    # The target's part

    def tie_to_target(self, target: TargetWeights) -> None:
        """Copy the frozen weights shared with the target. Called first in every run."""

    def start_from(self, target: TargetWeights) -> None:
        """Initialize a draft that starts from nothing; its vocabulary is known by then."""

    def load_vocab_mapping(self, file_path: str) -> None:
        """Read t2d and d2t from a mapping in SpecForge's format."""
        # SpecForge's, with its checks; it asks of a draft no more than the two buffers.
        Eagle3DraftModel.load_vocab_mapping(self, file_path)

    # Engines' layout

    def engine_state(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors of a checkpoint under the names that serving engines load."""
        return state

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write config.json and safetensors in the layout that serving engines load."""
        state = options.pop("state_dict", None) or self.state_dict()
        # What config.json says of the dtype is read off the model, which export builds in bfloat16.
        self.to(next(value.dtype for value in state.values() if value.is_floating_point()))
        super().save_pretrained(save_directory, state_dict=self.engine_state(state), **options)

    def token_ids(self) -> torch.Tensor:
        """Return the target ids [V_d] of the draft vocabulary."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t


def shifted(tokens: torch.Tensor, offset: int) -> torch.Tensor:
    """Return tokens [B, L] ``offset`` positions later; 0 behind the end."""
    return nn.functional.pad(tokens[:, offset:], (0, min(offset, tokens.shape[1])))
