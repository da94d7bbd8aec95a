"""MEDUSA drafts and MLP speculators in the layout of serving engines, in plain torch.

Both read nothing but the target's last hidden state where a chain starts, and the tokens drafted
since; they keep no cache. MEDUSA's heads do not even look at the tokens.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from specforge_lk.decode.draft import DraftError, Proposal, architecture, last_valid, read_weights
from specforge_lk.decode.sampling import check_finite, choose
from specforge_lk.decode.target import Target


class _HeadDraft(nn.Module, ABC):
    """A draft of K heads; see `specforge_lk.decode.draft.Draft` for the interface.

    Args:
        heads: heads K.
        last_layer: the target's last layer, whose captured state is the one after the final norm.
        draft_ids: [V_d] target ids of the draft vocabulary; None for the whole vocabulary.
    """

    algorithm: str

    def __init__(self, heads: int, last_layer: int, draft_ids: torch.Tensor | None) -> None:
        super().__init__()
        self.max_heads = heads
        self.capture_layers = (last_layer,)
        self.register_buffer("draft_ids", draft_ids, persistent=False)

    def _begin(self, features: torch.Tensor) -> torch.Tensor:
        """State [N, d] of chains from the target's states [N, H]."""
        return features.to(next(self.parameters()).dtype)

    @abstractmethod
    def _step(
        self, head: int, state: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [N, V_d] of a head, and the next state, given the token [N] before."""

    def _logits(
        self, head: int, state: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits, state = self._step(head, state, tokens)
        check_finite(
            logits, "the draft", "its training diverged or its file is damaged: use another one"
        )
        return (logits if logits.dtype == torch.float64 else logits.float()), state

    def start(self, batch: int, capacity: int) -> None:
        """Nothing is cached."""

    def observe(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor,
    ) -> None:
        """Keep the last verified position of every row; see `Draft.observe`."""
        features, tokens = last_valid(valid, features, tokens)
        self._features, self._token = features[:, 0], tokens[:, 0]

    def propose(
        self, heads: int, temperature: float, greedy: bool, generator: torch.Generator | None
    ) -> Proposal:
        """Draft a chain; see `Draft.propose`."""
        state, token = self._begin(self._features), self._token
        indices, tokens, logits = [], [], []
        for head in range(heads):
            scores, state = self._logits(head, state, token)
            index = choose(scores, temperature, greedy, generator)
            token = index if self.draft_ids is None else self.draft_ids[index]
            indices.append(index)
            tokens.append(token)
            logits.append(scores)
        return Proposal(torch.stack(indices, 1), torch.stack(tokens, 1), torch.stack(logits, 1))

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Continue with the given rows only."""
        self._features, self._token = self._features[rows], self._token[rows]

    def teacher_forced(
        self, tokens: torch.Tensor, features: torch.Tensor, starts: torch.Tensor, heads: int
    ) -> Iterator[torch.Tensor]:
        """Logits of every head at all chain starts; see `Draft.teacher_forced`."""
        row, position = starts.nonzero(as_tuple=True)
        state = self._begin(features[row, position])
        for head in range(heads):
            logits, state = self._logits(head, state, tokens[row, position + 1 + head])
            yield logits


class MedusaDraft(_HeadDraft):
    """Heads of residual SiLU blocks and an unembedding each, or one for all."""

    algorithm = "medusa"

    def __init__(
        self, config: dict, weights: dict, last_layer: int, draft_ids: torch.Tensor | None
    ) -> None:
        super().__init__(config["num_heads"], last_layer, draft_ids)
        size, rows = config["hidden_size"], _unembedding(weights).shape[0]
        layers, bias = config["num_hidden_layers"], "blocks.0.layers.0.bias" in weights
        self._logit_scale = float(config.get("logit_scale") or 1.0)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"layers": nn.ModuleList(nn.Linear(size, size, bias) for _ in range(layers))}
            )
            for _ in range(self.max_heads)
        )
        if "lm_head.weight" in weights:
            self.lm_head = nn.Linear(size, rows, bias=False)
        else:
            self.lm_heads = nn.ModuleList(
                nn.Linear(size, rows, bias=False) for _ in range(self.max_heads)
            )

    def _step(
        self, head: int, state: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = state
        for layer in self.blocks[head]["layers"]:
            hidden = hidden + F.silu(layer(hidden))
        unembedding = self.lm_head if hasattr(self, "lm_head") else self.lm_heads[head]
        return unembedding(hidden) * self._logit_scale, state


class MLPSpeculatorDraft(_HeadDraft):
    """Heads that carry a state from token to token."""

    algorithm = "mlp_speculator"

    def __init__(
        self, config: dict, weights: dict, last_layer: int, draft_ids: torch.Tensor | None
    ) -> None:
        super().__init__(config["n_predict"], last_layer, draft_ids)
        heads, outer = range(self.max_heads), config["emb_dim"]
        inner, rows = config.get("inner_dim") or outer, weights["head.0.weight"].shape[0]
        self.emb = nn.ModuleList(nn.Embedding(config["vocab_size"], inner) for _ in heads)
        self.proj = nn.ModuleList(
            nn.Linear(inner if head else outer, inner, bias=False) for head in heads
        )
        self.ln = nn.ModuleList(_scale_and_shift(inner) for _ in heads)
        self.head = nn.ModuleList(nn.Linear(inner, rows, bias=False) for _ in heads)
        self._scale_input = bool(config.get("scale_input"))
        kept = 0.5 ** (1 / self.max_heads)
        #: Weight of the embedding, that of the state being one.
        self._embedding_weight = math.sqrt((1 - kept) * inner / 2 / kept)

    def _begin(self, features: torch.Tensor) -> torch.Tensor:
        state = super()._begin(features)
        return _rms_normed(state) / math.sqrt(2) if self._scale_input else state

    def _step(
        self, head: int, state: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mixed = self.proj[head](state) + self._embedding_weight * self.emb[head](tokens)
        norm = self.ln[head]
        state = F.gelu(_rms_normed(mixed) * norm["weight"] + norm["bias"])
        return self.head[head](state), state


def _scale_and_shift(size: int) -> nn.ParameterDict:
    return nn.ParameterDict({"weight": torch.ones(size), "bias": torch.zeros(size)})


def _rms_normed(states: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(states, states.shape[-1:], eps=1e-6)


def _unembedding(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return weights.get("lm_head.weight", weights.get("lm_heads.0.weight"))


def _medusa_layout(config: dict, weights: dict, target: Target) -> tuple[dict, dict]:
    """Config and tensors of a MEDUSA draft under vLLM's names, an entry for all that is needed.

    Older drafts name the counts medusa_num_*, and number their tensors: head 0 has 0.0.linear,
    0.1.linear, … and last its unembedding.
    """
    for name in ("num_heads", "num_hidden_layers"):
        older = config.get(f"medusa_{name.replace('hidden_', '')}")
        config = {name: older, **config} if older is not None else config
    config = {"vocab_size": target.vocab_size, "hidden_size": target.head.in_features, **config}
    renamed = {}
    for name, tensor in weights.items():
        if numbered := _NUMBERED.fullmatch(name):
            head, layer, linear, kind = numbered.groups()
            name = f"blocks.{head}.layers.{layer}.{kind}" if linear else f"lm_heads.{head}.{kind}"
        renamed[name] = tensor
    own = {name for name in renamed if name.startswith("lm_heads.")}
    if config.get("original_lm_head"):
        first = renamed.get("lm_heads.0.weight", target.head.weight.detach())
        renamed = {"lm_head.weight": first, **{k: v for k, v in renamed.items() if k not in own}}
    elif own:
        renamed.pop("lm_head.weight", None)
    if "token_map" in renamed:
        kept, size = renamed["token_map"].long(), config["vocab_size"]
        if (config.get("truncated_vocab_size") or size) < size:
            # Unembeddings may still be those of the whole vocabulary.
            for name in [name for name in renamed if name.startswith("lm_head")]:
                if len(renamed[name]) == size > len(kept):
                    renamed[name] = renamed[name][kept]
        elif (rows := _unembedding(renamed)) is not None and len(rows) == size:
            del renamed["token_map"]
    return config, renamed


def _mlp_speculator_layout(config: dict, weights: dict, target: Target) -> tuple[dict, dict]:
    """Tensors of an MLP speculator with an entry for every head, where tied ones are kept once."""
    if not config.get("tie_weights") or not config.get("n_predict"):
        return config, weights
    filled = dict(weights)
    for name, tensor in weights.items():
        part, head, kind = name.split(".") if name.count(".") == 2 else (None, None, None)
        if (part in ("emb", "ln", "head") and head == "0") or (part == "proj" and head == "1"):
            for other in range(int(head) + 1, config["n_predict"]):
                filled.setdefault(f"{part}.{other}.{kind}", tensor)
    return config, filled


#: By architecture: class, layout, the tensor with a row per draft token, and what a config must
#: say, the target's hidden size first.
_KINDS = {
    "MedusaModel": (
        MedusaDraft,
        _medusa_layout,
        _unembedding,
        ("hidden_size", "num_heads", "num_hidden_layers"),
    ),
    "MLPSpeculatorPreTrainedModel": (
        MLPSpeculatorDraft,
        _mlp_speculator_layout,
        lambda weights: weights.get("head.0.weight"),
        ("emb_dim", "n_predict"),
    ),
}
#: Tensors of older MEDUSA drafts.
_NUMBERED = re.compile(r"(\d+)\.(\d+)\.(linear\.)?(weight|bias)")
#: What layouts add to the names of an MLP speculator's and a MEDUSA draft's tensors.
_PREFIXES = ("speculator.", "medusa_heads.")
_VOCABULARY = ("d2t", "t2d", "token_map")


def load_heads(
    path: Path, config: dict, target: Target, layers: tuple[int, ...] | None
) -> _HeadDraft:
    """Build a MEDUSA draft or an MLP speculator from an engine's layout; see `load_draft`."""
    kind, layout, unembedding, needed = _KINDS[architecture(config)]
    config, weights = layout(
        config, {_bare(name): value for name, value in read_weights(path).items()}, target
    )
    file = path / "config.json"
    if missing := [name for name in (*needed, "vocab_size") if config.get(name) is None]:
        raise DraftError(f"{file}: {', '.join(missing)} is missing; export again")
    if layers is not None:
        raise DraftError(
            f"draft {path}: {kind.algorithm} reads the target's last hidden state; leave out "
            "--aux-layers"
        )
    for name, wanted in zip(("vocab_size", needed[0]), target.head.weight.shape, strict=True):
        if config[name] != wanted:
            raise DraftError(
                f"{file}: {name} {config[name]}, but the target's is {wanted}; give the target "
                "the draft was trained for"
            )
    rows = unembedding(weights)
    if rows is None:
        raise DraftError(f"draft {path}: it has no unembedding; export again")
    ids = _draft_ids(path, weights, len(rows), target.vocab_size)
    draft = kind(config, weights, target.num_layers - 1, ids)
    try:
        draft.load_state_dict({k: v for k, v in weights.items() if k not in _VOCABULARY})
    except RuntimeError as error:
        raise DraftError(
            f"draft {path}: config.json and safetensors disagree ({error}); export again"
        ) from error
    return target.place(draft)


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _draft_ids(
    path: Path, weights: dict[str, torch.Tensor], rows: int, vocab_size: int
) -> torch.Tensor | None:
    """[V_d] target ids from ``token_map`` (ids) or ``d2t`` (offsets), checked."""
    if "token_map" in weights:
        ids = weights["token_map"].long()
    elif "d2t" in weights:
        ids = weights["d2t"].long() + torch.arange(weights["d2t"].numel())
    elif rows == vocab_size:
        return None
    else:
        raise DraftError(
            f"draft {path}: {rows} of {vocab_size} tokens, but neither token_map nor d2t says "
            "which; export again"
        )
    if (
        len(ids) != rows
        or ids.unique().numel() != rows
        or not 0 <= ids.min() <= ids.max() < vocab_size
    ):
        raise DraftError(
            f"draft {path}: its draft vocabulary is not {rows} distinct tokens below {vocab_size}; "
            "export again"
        )
    return None if torch.equal(ids, torch.arange(vocab_size)) else ids
