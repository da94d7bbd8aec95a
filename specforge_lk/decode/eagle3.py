"""EAGLE-3 drafts of SpecForge and of engines: inference with a key/value cache, in plain torch.

One decoder layer reads, at position t, the embedding of token t + 1 beside a hidden state of
position t: the projected target features where the target has been (head 1), the layer's own
output of the previous step after that (heads 2..K). The state that is fed back is the one BEFORE
the output norm, whatever the config says about the norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from specforge_lk.decode.draft import (
    DraftError,
    Proposal,
    draft_vocabulary,
    last_valid,
    read_weights,
)
from specforge_lk.decode.sampling import check_finite, choose
from specforge_lk.decode.target import Target
from specforge_lk.target import layer_ids_are_inputs

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class _Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        query = config.num_attention_heads * config.head_dim
        shared = config.num_key_value_heads * config.head_dim
        bias = bool(config.attention_bias)
        self.q_proj = nn.Linear(2 * config.hidden_size, query, bias=bias)
        self.k_proj = nn.Linear(2 * config.hidden_size, shared, bias=bias)
        self.v_proj = nn.Linear(2 * config.hidden_size, shared, bias=bias)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=bias)


class _MLP(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


class _Layer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = _MLP(config)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class Eagle3Draft(nn.Module):
    """An EAGLE-3 draft; see `specforge_lk.decode.draft.Draft` for the interface.

    Its cache slot is the token's position. A drafted or rejected position is therefore simply
    overwritten by the verified one, always before any later query can reach it, and rows of
    different lengths need no padding.

    Args:
        config: a transformers LlamaConfig with ``draft_vocab_size``.
        capture_layers: the target layers its features come from, three as a rule.
        draft_ids: [V_d] target ids of the draft vocabulary; None for the whole vocabulary.
    """

    algorithm = "eagle3"
    max_heads = None

    def __init__(
        self, config: Any, capture_layers: tuple[int, ...], draft_ids: torch.Tensor | None
    ) -> None:
        super().__init__()
        from transformers.activations import ACT2FN
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        self.config = config
        self.capture_layers = capture_layers
        feature_size = getattr(config, "target_hidden_size", config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.fc = nn.Linear(len(capture_layers) * feature_size, config.hidden_size, bias=False)
        self.input_norm = (
            nn.RMSNorm(self.fc.in_features, config.rms_norm_eps)
            if getattr(config, "norm_before_fc", False)
            else None
        )
        self.fc_norm = (
            nn.ModuleList(nn.RMSNorm(feature_size, config.rms_norm_eps) for _ in capture_layers)
            if getattr(config, "fc_norm", False)
            else None
        )
        self.midlayer = _Layer(config)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.register_buffer("draft_ids", draft_ids, persistent=False)
        self._normalize = bool(getattr(config, "norm_output", True))
        self._normalize_residual = bool(getattr(config, "norm_before_residual", False))
        self._logit_scale = float(getattr(config, "logit_scale", None) or 1.0)
        self._activation = ACT2FN[config.hidden_act]
        self._rotary = LlamaRotaryEmbedding(config)
        self._scale = config.head_dim**-0.5

    # The layer, split around its attention: decoding and teacher forcing attend differently.

    def _project(
        self, tokens: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries and keys, and values, each [B, n, heads, head_dim]."""
        layer, dim = self.midlayer, self.config.head_dim
        embedded = layer.input_layernorm(self.embed_tokens(tokens).to(hidden.dtype))
        inputs = torch.cat([embedded, layer.hidden_norm(hidden)], dim=-1)
        query = layer.self_attn.q_proj(inputs).unflatten(-1, (-1, dim))
        key = layer.self_attn.k_proj(inputs).unflatten(-1, (-1, dim))
        value = layer.self_attn.v_proj(inputs).unflatten(-1, (-1, dim))
        cos, sin = (table.unsqueeze(2) for table in self._rotary(inputs, positions))
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def _finish(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The rest of the layer after attention [B, n, heads, head_dim]."""
        layer = self.midlayer
        if self._normalize_residual:
            hidden = layer.hidden_norm(hidden)
        hidden = hidden + layer.self_attn.o_proj(attended.flatten(-2))
        inner = layer.post_attention_layernorm(hidden)
        gated = self._activation(layer.mlp.gate_proj(inner)) * layer.mlp.up_proj(inner)
        return hidden + layer.mlp.down_proj(gated)

    def _features(self, features: torch.Tensor) -> torch.Tensor:
        features = features.to(self.fc.weight.dtype)
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.fc_norm is not None:
            chunks = features.chunk(len(self.fc_norm), dim=-1)
            features = torch.cat(
                [norm(chunk) for norm, chunk in zip(self.fc_norm, chunks, strict=True)], dim=-1
            )
        return self.fc(features)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.lm_head(self.norm(hidden) if self._normalize else hidden) * self._logit_scale
        check_finite(
            logits, "the draft", "its training diverged or its file is damaged: use another one"
        )
        return logits if logits.dtype == torch.float64 else logits.float()

    # Decoding

    def start(self, batch: int, capacity: int) -> None:
        """Allocate the cache: one slot per position, and one more that takes invalid entries."""
        shape = (batch, capacity + 1, self.config.num_key_value_heads, self.config.head_dim)
        weight = self.fc.weight
        self._keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self._values = torch.zeros_like(self._keys)

    def _extend(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the layer on [B, n] entries, writing their keys and values to the cache."""
        query, key, value = self._project(tokens, hidden, positions)
        trash = self._keys.shape[1] - 1
        slots = positions if valid is None else torch.where(valid, positions, trash)
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        self._keys[rows, slots] = key
        self._values[rows, slots] = value
        length = int(positions.max()) + 1
        visible = torch.arange(length, device=tokens.device) <= positions[..., None]
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            self._keys[:, :length].transpose(1, 2),
            self._values[:, :length].transpose(1, 2),
            attn_mask=visible[:, None],
            enable_gqa=True,
        )
        return self._finish(hidden, attended.transpose(1, 2))

    def observe(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor,
    ) -> None:
        """Take in verified positions; see `Draft.observe`."""
        output = self._extend(tokens, self._features(features), positions, valid)
        self._hidden, self._position = last_valid(valid, output, positions)

    def propose(
        self, heads: int, temperature: float, greedy: bool, generator: torch.Generator | None
    ) -> Proposal:
        """Draft a chain; see `Draft.propose`."""
        hidden, indices, logits = self._hidden, [], []
        for head in range(heads):
            if head:
                tokens = self._target_ids(indices[-1])
                hidden = self._extend(tokens, hidden, self._position + head)
            logits.append(self._logits(hidden))
            indices.append(choose(logits[-1], temperature, greedy, generator))
        index = torch.cat(indices, dim=1)
        return Proposal(index, self._target_ids(index), torch.cat(logits, dim=1))

    def _target_ids(self, index: torch.Tensor) -> torch.Tensor:
        return index if self.draft_ids is None else self.draft_ids[index]

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Continue with the given rows only."""
        self._keys, self._values = self._keys[rows], self._values[rows]
        self._hidden, self._position = self._hidden[rows], self._position[rows]

    # Teacher forcing

    def teacher_forced(
        self, tokens: torch.Tensor, features: torch.Tensor, starts: torch.Tensor, heads: int
    ) -> Iterator[torch.Tensor]:
        """Logits of every head at all chain starts; see `Draft.teacher_forced`.

        At step i every position t is a chain of its own: its query sees the first-step states of
        positions 0..t, which come from the target, and the i states its own chain has added.
        """
        batch, length = tokens.shape
        positions = torch.arange(length, device=tokens.device).expand(batch, length)
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        hidden = self._features(features)
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for step in range(heads):
            # Token t + 1 + step; what is rolled in from the front is beyond every chain start.
            inputs = tokens.roll(-1 - step, dims=1)
            query, key, value = self._project(inputs, hidden, positions + step)
            keys.append(key.repeat_interleave(groups, dim=2))
            values.append(value.repeat_interleave(groups, dim=2))
            scores = torch.einsum("bqhd,bkhd->bhqk", query, keys[0]) * self._scale
            scores = scores.masked_fill(~causal, float("-inf"))
            if step:
                own = torch.stack([(query * k).sum(-1) for k in keys[1:]], dim=-1) * self._scale
                scores = torch.cat([scores, own.transpose(1, 2)], dim=-1)
            weights = scores.softmax(-1)
            attended = torch.einsum("bhqk,bkhd->bqhd", weights[..., :length], values[0])
            for i, v in enumerate(values[1:]):
                attended = attended + weights[..., length + i].transpose(1, 2)[..., None] * v
            hidden = self._finish(hidden, attended)
            yield self._logits(hidden[starts])


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [B, n, heads, head_dim], halves layout."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


@dataclass(frozen=True)
class Checkpoint:
    """An exported draft of the EAGLE family, checked to fit itself and the target.

    Attributes:
        config: a transformers LlamaConfig with ``draft_vocab_size``.
        layers: the captured target layers.
        draft_ids: [V_d] target ids of the draft vocabulary; None for the whole vocabulary.
        weights: tensors of the draft's module by name.
    """

    config: Any
    layers: tuple[int, ...]
    draft_ids: torch.Tensor | None
    weights: dict[str, torch.Tensor]

    def load_into(self, draft: Any, path: Path, target: Target) -> Any:
        """Give ``draft`` its weights, and the target's embeddings if it has none of its own."""
        weights = dict(self.weights)
        if "embed_tokens.weight" not in weights:
            # The matrix, not the target's module, which may scale what it looks up (Gemma).
            shared = target.model.get_input_embeddings().weight.detach()
            draft.embed_tokens = nn.Embedding.from_pretrained(shared)
            weights["embed_tokens.weight"] = shared
        try:
            draft.load_state_dict(weights)
        except RuntimeError as error:
            raise DraftError(
                f"draft {path}: config.json and safetensors disagree ({error}); export again"
            ) from error
        return target.place(draft)


def read_checkpoint(
    path: Path, config: dict, target: Target, layers: tuple[int, ...] | None
) -> Checkpoint:
    """Read a draft of the EAGLE family in SpecForge's names; see `load_draft`."""
    return _checked(path, config, read_weights(path), target, layers)


def _checked(
    path: Path,
    config: dict,
    weights: dict[str, torch.Tensor],
    target: Target,
    layers: tuple[int, ...] | None,
) -> Checkpoint:
    from transformers import LlamaConfig

    if "draft_vocab_size" not in config:
        raise DraftError(f"{path / 'config.json'}: draft_vocab_size is missing; export again")
    parsed = LlamaConfig.from_dict(config)
    # transformers 5 has `rope_parameters`, 4 has `rope_scaling` (None for the default).
    scaling = getattr(parsed, "rope_parameters", None) or getattr(parsed, "rope_scaling", None)
    rope = (scaling or {}).get("rope_type", "default")
    if rope not in ROPE_TYPES:
        raise DraftError(
            f"{path / 'config.json'}: rope_type {rope!r} is not supported here; "
            f"supported are {', '.join(ROPE_TYPES)}"
        )
    if parsed.vocab_size != target.vocab_size:
        raise DraftError(
            f"{path / 'config.json'}: vocab_size {parsed.vocab_size}, but the target's LM head "
            f"has {target.vocab_size} rows; give the target the draft was trained for"
        )
    missing = {"lm_head.weight", "fc.weight", "norm.weight"} - set(weights)
    if missing:
        raise DraftError(f"draft {path}: tensors {sorted(missing)} are missing; export again")
    ids = draft_vocabulary(path, weights, parsed.draft_vocab_size, parsed.vocab_size)
    count = target.num_layers
    layers = layers or _captured_layers(path, config, target) or (1, count // 2 - 1, count - 4)
    width = getattr(parsed, "target_hidden_size", parsed.hidden_size)
    needed = weights["fc.weight"].shape[1] // width
    if len(layers) != needed or any(not 0 <= layer < count for layer in layers):
        raise DraftError(
            f"draft {path}: captured layers {list(layers)} do not fit a target of {count} layers; "
            "set eagle_config.eagle_aux_hidden_state_layer_ids in its config.json, or --aux-layers "
            f"({needed} layers, as in model.aux_hidden_state_layer_ids of the training)"
        )
    tensors = {name: value for name, value in weights.items() if name not in ("d2t", "t2d")}
    return Checkpoint(parsed, layers, ids, tensors)


def load_eagle3(
    path: Path, config: dict, target: Target, layers: tuple[int, ...] | None
) -> Eagle3Draft:
    """Build an `Eagle3Draft`; see `load_draft`.

    Its folder is that of ``specforge export --to hf``, or in vLLM's layout: other names of the
    same tensors, and config.json as vLLM or its `speculators` package has it.
    """
    config = _specforge_config(path, config)
    weights = {_specforge_name(name): tensor for name, tensor in read_weights(path).items()}
    read = _checked(path, config, weights, target, layers)
    return read.load_into(Eagle3Draft(read.config, read.layers, read.draft_ids), path, target)


def _captured_layers(path: Path, config: dict, target: Target) -> tuple[int, ...] | None:
    """The layers k that a config names, if any.

    SpecForge and SGLang count them in eagle_config, from 0. vLLM reads another place and counts
    from 1: its layer k + 1 is the input of decoder layer k + 1, which is the output of layer k.
    So does SGLang for the targets of `LAYER_IDS_OF_INPUTS`.
    """
    eagle = config.get("eagle_config") or {}
    ours = eagle.get("eagle_aux_hidden_state_layer_ids")
    theirs = config.get("eagle_aux_hidden_state_layer_ids") or eagle.get("layer_ids")
    named = []
    if ours:
        inputs = layer_ids_are_inputs(target.model.config, ours)
        named = [[layer - 1 for layer in ours] if inputs else list(ours)]
    named += [[layer - 1 for layer in theirs]] if theirs else []
    if len(named) == 2 and named[0] != named[1]:
        raise DraftError(
            f"{path / 'config.json'}: eagle_config names the captured layers {ours} (from 0), and "
            f"vLLM's setting {theirs} (from 1) names others; say which with --aux-layers"
        )
    return tuple(named[0]) if named else None


def _specforge_config(path: Path, config: dict) -> dict:
    """A config with SpecForge's meaning of every setting.

    Raises:
        DraftError: it asks for what is not decoded here.
    """
    config, speculators = dict(config), "speculators_model_type" in config
    if not speculators and "LlamaForCausalLMEagle3" in config["architectures"]:
        return config
    if speculators:
        inner = config.get("transformer_layer_config") or {}
        # The layer's own sizes come from the inner config; vLLM's default of one setting differs.
        config = {"norm_before_residual": True, **config, **inner}
    layers, kind = config.get("num_hidden_layers", 1), config.get("model_type", "llama")
    unsupported = {
        "num_hidden_layers": layers if layers != 1 else None,
        "model_type": kind if kind not in ("llama", "eagle") else None,
        # In vLLM the state that is fed back is the one after the norm then.
        "norm_output": config.pop("norm_output", None),
    }
    for name, value in unsupported.items():
        if value:
            raise DraftError(f"{path / 'config.json'}: {name} {value!r} is not supported here")
    if config.get("draft_vocab_size") is None:
        config["draft_vocab_size"] = config.get("vocab_size")
    return config


def _specforge_name(name: str) -> str:
    """Name of a tensor in SpecForge's exports."""
    name = name.removeprefix("model.")
    return name.replace("layers.0.", "midlayer.", 1) if name.startswith("layers.0.") else name
