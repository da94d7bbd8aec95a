"""The MLP speculator (Wertheimer et al. 2024, arXiv 2404.19124): heads recurrent over tokens.

s_0 is the target's last hidden state. Head k = 1 … K, x_k being the token before its prediction:

    s_k = GELU(LN_k(w_s P_k s_(k-1) + w_e E_k x_k)),   logits = U_k s_k

w_s = 2^(-1 / 2K), w_e = sqrt((1 - w_s^2) d / 2), d the inner width: embeddings are initialized with
variance 1 / d, and the state keeps half of its weight over the K heads. LN_k is an RMS norm with
scale and shift. Names and config are those of vLLM's and of the published ``mlp_speculator``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from transformers import PretrainedConfig

from specforge_lk.drafts.model import VOCABULARY, HeadDraftModel, shifted
from specforge_lk.overlap import Projection


class MLPSpeculatorConfig(PretrainedConfig):
    """Config of an MLP speculator.

    Args:
        vocab_size: of the target.
        emb_dim: hidden size of the target.
        inner_dim: width of state and embeddings; 0 for emb_dim.
        n_predict: heads K.
        tie_weights: embedding, norm, LM head and all projections but the first are shared.
        scale_input: normalize the target's state first, and divide it by sqrt(2).
        draft_vocab_size: V_d, rows of the LM heads.
        top_k_tokens_per_head: how many candidates an engine that drafts trees takes from each head.
        n_candidates: how many branches such an engine keeps.
    """

    model_type = "mlp_speculator"
    attribute_map = {"hidden_size": "emb_dim"}  # noqa: RUF012 (transformers' own form)

    def __init__(
        self,
        vocab_size: int = 32000,
        emb_dim: int = 4096,
        inner_dim: int = 0,
        n_predict: int = 6,
        tie_weights: bool = False,
        scale_input: bool = False,
        draft_vocab_size: int | None = None,
        top_k_tokens_per_head: list[int] | None = None,
        n_candidates: int = 5,
        **options: Any,
    ) -> None:
        size = vocab_size if draft_vocab_size is None else draft_vocab_size
        if n_predict < 1 + tie_weights:
            raise ValueError(
                f"n_predict={n_predict} must be at least 1, and 2 with tie_weights={tie_weights}"
            )
        if not 0 < size <= vocab_size:
            raise ValueError(
                f"draft_vocab_size={size} must be between 1 and vocab_size {vocab_size}"
            )
        top_k = [1] * n_predict if top_k_tokens_per_head is None else top_k_tokens_per_head
        if len(top_k) != n_predict:
            raise ValueError(
                f"top_k_tokens_per_head={top_k} must have n_predict={n_predict} entries"
            )
        self.vocab_size = vocab_size
        self.emb_dim = emb_dim
        self.inner_dim = inner_dim or emb_dim
        self.n_predict = n_predict
        self.tie_weights = tie_weights
        self.scale_input = scale_input
        self.draft_vocab_size = size
        self.top_k_tokens_per_head = top_k
        self.n_candidates = n_candidates
        super().__init__(**options)


class ScaledNorm(nn.Module):
    """x / rms(x), then scale and shift."""

    eps = 1e-6

    def __init__(self, size: int, affine: bool = True) -> None:
        super().__init__()
        self.affine = affine
        if affine:
            self.weight = nn.Parameter(torch.ones(size))
            self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., d] -> [..., d]."""
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(
            states.dtype
        )
        return normed * self.weight + self.bias if self.affine else normed


class MLPSpeculatorPreTrainedModel(HeadDraftModel):
    """A recurrent chain of heads; see the module's docstring."""

    config_class = MLPSpeculatorConfig
    #: What the published layout puts before the names of tensors.
    base_model_prefix = "speculator"

    def __init__(self, config: MLPSpeculatorConfig) -> None:
        super().__init__(config)
        inner, heads = config.inner_dim, config.n_predict
        #: Every module once for each head; tied ones are the same module.
        distinct = 1 if config.tie_weights else heads
        first = [nn.Linear(config.emb_dim, inner, bias=False)]
        later = [nn.Linear(inner, inner, bias=False) for _ in range(min(distinct, heads - 1))]
        self.emb = self._per_head(nn.Embedding(config.vocab_size, inner) for _ in range(distinct))
        self.proj = nn.ModuleList(first + (later * heads)[: heads - 1])
        self.ln = self._per_head(ScaledNorm(inner) for _ in range(distinct))
        self.head = self._per_head(
            nn.Linear(inner, config.draft_vocab_size, bias=False) for _ in range(distinct)
        )
        if config.scale_input:
            self.ln0 = ScaledNorm(config.emb_dim, affine=False)
        self.state_weight = 0.5 ** (0.5 / heads)
        self.embedding_weight = math.sqrt((1 - self.state_weight**2) * inner / 2)
        self.post_init()

    def _per_head(self, modules: Iterator[nn.Module]) -> nn.ModuleList:
        built = list(modules)
        return nn.ModuleList(built if len(built) > 1 else built * self.config.n_predict)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # As published: every weight with the variance of one over the inner width.
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.inner_dim**-0.5)

    @property
    def heads(self) -> int:
        """Heads K."""
        return self.config.n_predict

    def head_projections(
        self, hidden: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, heads: int
    ) -> Iterator[Projection]:
        """Return states and LM head of every head, the tokens before being the true ones."""
        state = hidden.to(next(self.proj.parameters()).dtype)
        if self.config.scale_input:
            state = self.ln0(state) / math.sqrt(2)
        for head in range(heads):
            embedded = self.emb[head](shifted(tokens, head))
            mixed = self.proj[head](state) + embedded * (self.embedding_weight / self.state_weight)
            state = nn.functional.gelu(self.ln[head](mixed))
            # No `get_parameter`: FSDP has a view of what it shards in a parameter's place.
            yield Projection(state, cast(nn.Linear, self.head[head]).weight)

    def engine_state(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the published layout; d2t and t2d, which no engine reads, keep their names."""
        return {
            name if name in VOCABULARY else f"speculator.{name}": value.clone()
            for name, value in state.items()
        }
