"""MTP (DeepSeek-V3, arXiv 2412.19437, section 2.2): one decoder layer of the target's own family.

    h'_t = W [norm_e(E x_(t+1)) ; norm_h(h_t)],   g_t = norm(layer(h')_t),   logits = U g_t

h_t is the target's last hidden state and x_(t+1) the token after it; embedding E and LM head U are
the target's, frozen. The module is used over and over: g_t and the next token are its next input,
as in serving engines. Training does the same (test-time training), so that it learns the later
draft positions too.

Names are those of released checkpoints, ``model.layers.<L>.*`` with L the number of the target's
layers; the config is the target's own, of any family with which transformers builds a decoder of
layers, a norm and a rotary embedding: Llama, Qwen, GLM-4-MoE, DeepSeek-V3 with MLA and experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, Final, Self

import torch
from torch import nn
from transformers import AutoModel, DynamicCache, PreTrainedConfig

from specforge_lk.drafts.model import HeadDraftModel, TargetWeights, shifted
from specforge_lk.drafts.modules import float32_buffers_kept
from specforge_lk.drafts.mtp_checkpoint import MTPConfig, decoder_config, read_module
from specforge_lk.overlap import Projection

#: Settings that say where a checkpoint is to be found.
_OF_HUB: Final = ("cache_dir", "force_download", "local_files_only", "revision", "token")


class MTPDraftModel(HeadDraftModel):
    """One module for all draft positions, as the head of this file describes."""

    config_class = MTPConfig
    rotary_emb: Any
    model: Any

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        decoder = AutoModel.from_config(decoder_config(config))
        size = config.hidden_size
        layer = decoder.layers[0]
        layer.embed_tokens = decoder.embed_tokens
        layer.enorm, layer.hnorm = copy.deepcopy(decoder.norm), copy.deepcopy(decoder.norm)
        layer.eh_proj = nn.Linear(2 * size, size, bias=False)
        layer.shared_head = nn.Module()
        layer.shared_head.norm = decoder.norm
        layer.shared_head.head = nn.Linear(size, config.vocab_size, bias=False)
        self.rotary_emb = decoder.rotary_emb
        self.model = nn.Module()
        self.model.layers = nn.ModuleDict({str(config.num_hidden_layers): layer})
        self._embedding.requires_grad_(False)
        self._lm_head.requires_grad_(False)
        # Modules that transformers keeps in float32 for this model family.
        self._keep_in_fp32_modules_strict = set(decoder._keep_in_fp32_modules_strict or ())
        self.post_init()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move and cast, but keep buffers in float32: rotary frequencies, biases of the router."""
        with float32_buffers_kept(self):
            return super()._apply(fn, recurse)

    @classmethod
    def from_pretrained(cls, source: Any, *options: Any, **settings: Any) -> Any:
        """Load a module from an export or from among a target's weights, dequantized if need be.

        Raises:
            ValueError: there is no module, or one with other tensors than the config's family has.
        """
        hub = {name: settings[name] for name in _OF_HUB if name in settings}
        config = settings.pop("config", None)
        if config is None:
            config = MTPConfig.from_dict(PreTrainedConfig.get_config_dict(source, **hub)[0])
        prefix = f"model.layers.{config.num_hidden_layers}."
        state = {prefix + name: value for name, value in read_module(source, prefix, **hub).items()}
        if not state:
            raise ValueError(
                f"{source} has no MTP module: no tensor below {prefix}; give a checkpoint that was "
                "released with one, or an export"
            )
        told = settings.pop("output_loading_info", False)
        model, found = super().from_pretrained(
            None, *options, config=config, state_dict=state, output_loading_info=True, **settings
        )
        if unknown := sorted(found["unexpected_keys"]):
            raise ValueError(
                f"{source}: a module of this config (model_type {config.model_type}) has no "
                f"{', '.join(unknown)}; take model_type and settings of the draft config from the "
                "config.json that the module was released with"
            )
        return (model, found) if told else model

    @property
    def heads(self) -> None:
        """None: as many as training.ttt_length says."""
        return None

    @property
    def _layer(self) -> Any:
        (layer,) = self.model.layers.values()
        return layer

    @property
    def _embedding(self) -> nn.Embedding:
        return self._layer.embed_tokens

    @property
    def _lm_head(self) -> nn.Linear:
        return self._layer.shared_head.head

    @torch.no_grad()
    def tie_to_target(self, target: TargetWeights) -> None:
        """Copy the target's embedding and LM head.

        Raises:
            ValueError: the target's logits are not its LM head's weight times its last state.
        """
        if target.beyond_weight:
            raise ValueError(
                f"the target's LM head has a {', '.join(target.beyond_weight)}: an MTP module "
                "drafts with the target's own LM head, which engines apply without; train another "
                "draft of this target, such as eagle3 or medusa"
            )
        self._embedding.weight.copy_(target.read(target.embedding_key))
        self._lm_head.weight.copy_(target.head)

    @torch.no_grad()
    def start_from(self, target: TargetWeights) -> None:
        """Initialize near the identity: g_t = h_t plus the layer's residual.

        W is [0, 1]. h_t has been scaled by the target's final norm: norm_h undoes that, norm does
        it again.
        """
        size = self.config.hidden_size
        weight = target.read(target.embedding_key.replace("embed_tokens", "norm"))
        self._layer.shared_head.norm.weight.copy_(weight)
        # The norms of some families scale by 1 + weight: what one of weight 0 does says so.
        self._layer.hnorm.weight.zero_()
        probe = self._layer.hnorm.weight.new_ones(size)
        offset = self._layer.hnorm(probe).round()
        scale = weight.to(offset) + offset
        # Where the scale is about 0 there is nothing to undo.
        undone = torch.where(scale.abs() > 1e-2, scale, torch.ones_like(scale)).reciprocal()
        self._layer.hnorm.weight.copy_(undone - offset)
        self._layer.eh_proj.weight[:, :size] = 0
        self._layer.eh_proj.weight[:, size:] = torch.eye(size)

    def head_projections(
        self, hidden: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, heads: int
    ) -> Iterator[Projection]:
        """Return states and LM head of every draft position, the tokens before being the true ones.

        Every position is the start of a chain. A query of draft position k sees the first module's
        keys up to its start, which a serving engine has from the target, and its own chain's.
        """
        layer, (batch, length) = self._layer, tokens.shape
        state = hidden.to(layer.eh_proj.weight.dtype)
        chain = torch.eye(length, dtype=torch.bool, device=tokens.device).expand(batch, 1, -1, -1)
        visible = chain.new_ones(length, length).tril() & mask.bool()[:, None, None]
        # A row without any key would be nan: padding sees itself.
        visible = visible | chain
        positions = torch.arange(length, device=tokens.device).expand(batch, -1)
        cache = DynamicCache()
        for head in range(heads):
            embedded = layer.embed_tokens(shifted(tokens, head))
            mixed = layer.eh_proj(torch.cat([layer.enorm(embedded), layer.hnorm(state)], dim=-1))
            output = layer(
                mixed,
                attention_mask=self._as_attended(visible, mixed),
                position_ids=positions + head,
                past_key_values=cache,
                use_cache=True,
                position_embeddings=self.rotary_emb(mixed, positions + head),
            )
            state = layer.shared_head.norm(output)
            yield Projection(state, layer.shared_head.head.weight)
            visible = torch.cat([visible, chain], dim=-1)

    def _as_attended(self, visible: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Return the mask in the form that the layer's attention takes."""
        if self.config._attn_implementation == "sdpa":
            return visible
        lowest = torch.finfo(states.dtype).min
        return torch.zeros_like(visible, dtype=states.dtype).masked_fill(~visible, lowest)
