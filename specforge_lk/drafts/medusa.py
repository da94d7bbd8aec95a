"""MEDUSA (Cai et al. 2024, arXiv 2401.10774): independent heads on the target's last hidden state.

Head k: h <- h + SiLU(W h + b), ``num_hidden_layers`` times, then an LM head. Blocks start at
zero and LM heads as the target's, so that an untrained head predicts what the target
predicts for the token before. Names and config are those of vLLM's ``medusa``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from specforge_lk.drafts.model import HeadDraftModel, TargetWeights
from specforge_lk.drafts.modules import Stack
from specforge_lk.overlap import Projection


class MedusaConfig(PretrainedConfig):
    """Config of a MEDUSA draft.

    Args:
        hidden_size: of the target.
        vocab_size: of the target.
        num_heads: heads K.
        num_hidden_layers: residual blocks per head.
        draft_vocab_size: V_d; ``truncated_vocab_size`` is its name in vLLM.
        original_lm_head: one LM head for all MEDUSA heads, the target's own, frozen. Otherwise
            every head has and trains its own.
        medusa_fc_bias: biases in the residual blocks.
    """

    model_type = "medusa"

    def __init__(
        self,
        hidden_size: int = 4096,
        vocab_size: int = 32000,
        num_heads: int = 6,
        num_hidden_layers: int = 1,
        draft_vocab_size: int | None = None,
        truncated_vocab_size: int | None = None,
        original_lm_head: bool = False,
        medusa_fc_bias: bool = False,
        **options: Any,
    ) -> None:
        # SpecForge sets draft_vocab_size = vocab_size where a config does not say.
        named = (draft_vocab_size, truncated_vocab_size)
        kept = {s for s in named if s is not None and s != vocab_size} or {vocab_size}
        if len(kept) > 1:
            raise ValueError(
                f"draft_vocab_size={draft_vocab_size} and truncated_vocab_size="
                f"{truncated_vocab_size} are two names of one size: keep draft_vocab_size"
            )
        (size,) = kept
        for name, value in (("num_heads", num_heads), ("num_hidden_layers", num_hidden_layers)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not 0 < size <= vocab_size:
            raise ValueError(
                f"draft_vocab_size={size} must be between 1 and vocab_size {vocab_size}"
            )
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.num_heads = num_heads
        self.num_hidden_layers = num_hidden_layers
        self.draft_vocab_size = self.truncated_vocab_size = size
        self.original_lm_head = original_lm_head
        self.medusa_fc_bias = medusa_fc_bias
        super().__init__(**options)


class ResidualBlock(nn.Module):
    """h <- h + SiLU(W h + b), layer after layer."""

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__()
        size, bias = config.hidden_size, config.medusa_fc_bias
        self.layers = nn.ModuleList(
            nn.Linear(size, size, bias=bias) for _ in range(config.num_hidden_layers)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        for layer in self.layers:
            hidden = hidden + nn.functional.silu(layer(hidden))
        return hidden


class MedusaModel(HeadDraftModel):
    """K independent heads; see the module's docstring."""

    config_class = MedusaConfig

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__(config)
        size, kept = config.hidden_size, config.draft_vocab_size
        self.blocks: Stack[ResidualBlock] = Stack(
            ResidualBlock(config) for _ in range(config.num_heads)
        )
        if config.original_lm_head:
            self.lm_head = nn.Linear(size, kept, bias=False)
            self.lm_head.requires_grad_(False)
        else:
            self.lm_heads: Stack[nn.Linear] = Stack(
                nn.Linear(size, kept, bias=False) for _ in range(config.num_heads)
            )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ResidualBlock):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)

    @property
    def heads(self) -> int:
        """Heads K."""
        return len(self.blocks)

    @property
    def lm_head_of_each(self) -> list[nn.Linear]:
        """The LM head of every MEDUSA head."""
        return [self.lm_head] * self.heads if self.config.original_lm_head else list(self.lm_heads)

    @torch.no_grad()
    def tie_to_target(self, target: TargetWeights) -> None:
        """Copy the target's LM head with its scale where all MEDUSA heads share it."""
        if self.config.original_lm_head:
            self.lm_head.weight.copy_(target.scaled_head(self.t2d))

    @torch.no_grad()
    def start_from(self, target: TargetWeights) -> None:
        """Start every LM head of a MEDUSA head's own as the target's, with its scale."""
        if self.config.original_lm_head:
            return
        head = target.scaled_head(self.t2d)
        for lm_head in self.lm_heads:
            lm_head.weight.copy_(head)

    def head_projections(
        self, hidden: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, heads: int
    ) -> Iterator[Projection]:
        """Return states and LM head of every MEDUSA head; they do not depend on the tokens."""
        hidden = hidden.to(next(self.blocks.parameters()).dtype)
        for block, lm_head in list(zip(self.blocks, self.lm_head_of_each, strict=True))[:heads]:
            yield Projection(block(hidden), lm_head.weight)

    def engine_state(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Add ``token_map``, [V_d] target ids, from which vLLM reads a truncated vocabulary."""
        if self.config.draft_vocab_size == self.config.vocab_size:
            return state
        ids = torch.arange(len(state["d2t"])) + state["d2t"].cpu()
        return {**state, "token_map": ids}
