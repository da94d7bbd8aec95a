"""MEDUSA drafts and MLP speculators in the layout of serving engines, in plain torch.

Both read nothing but the target's last hidden state where a chain starts, and the tokens drafted
since; they keep no cache. MEDUSA's heads do not even look at the tokens.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import nn

from specforge_lk.decode.base import BaseDraft
from specforge_lk.decode.checkpoint import (
    VOCABULARY,
    DraftError,
    DraftTarget,
    TargetFacts,
    disagreement,
    draft_vocabulary,
    fill,
    read_weights,
    refuse_layers,
    require_matrices,
    require_sizes,
)
from specforge_lk.decode.draft import Proposal
from specforge_lk.decode.draft_config import require_positive
from specforge_lk.decode.sampling import choose
from specforge_lk.serving import Sampling

Weights = dict[str, torch.Tensor]
Config = dict[str, Any]

#: Tensors of older MEDUSA drafts.
_NUMBERED = re.compile(r"(\d+)\.(\d+)\.(linear\.)?(weight|bias)")
#: What layouts add to the names of an MLP speculator's and a MEDUSA draft's tensors.
_PREFIXES = ("speculator.", "medusa_heads.")


class LastStateDraft(BaseDraft):
    """A draft of K heads that read the target's last hidden state.

    Args:
        config: config.json, in the form that `layout` returns.
        weights: tensors, likewise.
        last_layer: the target's last layer, whose captured state is the one after the final norm.
        draft_ids: [V_d] target ids of the draft vocabulary; None for the whole vocabulary.
    """

    #: Keys that a config needs: of the target's hidden size, of K, and the draft's own.
    needed: ClassVar[tuple[str, ...]]

    def __init__(
        self, config: Config, weights: Weights, last_layer: int, draft_ids: torch.Tensor | None
    ) -> None:
        super().__init__((last_layer,), draft_ids, max_heads=int(config[self.needed[1]]))

    @staticmethod
    @abstractmethod
    def layout(config: Config, weights: Weights, target: TargetFacts) -> tuple[Config, Weights]:
        """Return config and tensors in one form, whatever layout they are stored in.

        Raises:
            DraftError: they contradict one another.
        """

    @staticmethod
    @abstractmethod
    def rows(weights: Weights) -> int | None:
        """Return the rows V_d of the LM head; None where the draft has none."""

    @classmethod
    def load(
        cls, path: Path, config: Config, target: DraftTarget, layers: tuple[int, ...] | None
    ) -> Self:
        """Load a draft from an engine's layout; see `load_draft`."""
        refuse_layers(path, cls.algorithm, layers)
        read, weights, ids = cls.read(path, config, target)
        draft = cls(read, weights, target.num_layers - 1, ids)
        return fill(draft, weights, path, target)

    @classmethod
    def read(
        cls, path: Path, config: Config, target: TargetFacts
    ) -> tuple[Config, Weights, torch.Tensor | None]:
        """Return config and tensors in the form of `layout`, and the draft vocabulary.

        Returns:
            The config; the tensors of the draft's module; the target ids [V_d] of the draft
            vocabulary, None for the whole one in order.

        Raises:
            DraftError: the folder is incomplete, or does not fit itself or the target.
        """
        stored = {_bare(name): value for name, value in read_weights(path).items()}
        try:
            config, weights = cls.layout(config, stored, target)
        except DraftError as error:
            raise disagreement(path, error) from error
        if missing := [n for n in (*cls.needed, "vocab_size") if config.get(n) is None]:
            raise DraftError(
                f"{path / 'config.json'}: {', '.join(missing)} is missing; export again"
            )
        require_positive(path / "config.json", {name: config[name] for name in cls.needed})
        require_sizes(path, {name: config[name] for name in ("vocab_size", cls.needed[0])}, target)
        require_matrices(path, weights, [n for n in weights if "head" in n])
        rows = cls.rows(weights)
        if rows is None:
            raise DraftError(f"draft {path}: it has no LM head; export again")
        ids = draft_vocabulary(path, weights, rows, target.vocab_size)
        tensors = {name: value for name, value in weights.items() if name not in VOCABULARY}
        return config, tensors, ids

    def _begin(self, features: torch.Tensor) -> torch.Tensor:
        """Return the state [N, d] of chains from the target's states [N, H]."""
        return features.to(next(self.parameters()).dtype)

    @abstractmethod
    def _step(
        self, head: int, state: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits [N, V_d] of a head, and the next state, given the token [N] before."""

    # Decoding

    def start(self, batch: int, capacity: int) -> None:
        """Do nothing: there is no cache."""

    def observe(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor,
    ) -> None:
        """Keep the last verified position of every row; see `Draft.observe`."""
        self._start_chain(valid, features, tokens)

    def propose(
        self, heads: int, sampling: Sampling, generator: torch.Generator | None
    ) -> Proposal:
        """Draft a chain; see `Draft.propose`."""
        features, last = self._chain
        state, token = self._begin(features[:, 0]), last[:, 0]
        indices, tokens, logits = [], [], []
        for head in range(heads):
            scores, state = self._step(head, state, token)
            logits.append(self._checked(scores))
            indices.append(choose(logits[-1], sampling, generator))
            token = self.target_ids(indices[-1])
            tokens.append(token)
        return Proposal(torch.stack(indices, 1), torch.stack(tokens, 1), torch.stack(logits, 1))

    # Teacher forcing

    def teacher_forced(
        self, tokens: torch.Tensor, features: torch.Tensor, starts: torch.Tensor, heads: int
    ) -> Iterator[torch.Tensor]:
        """Return logits at all chain starts; see `Draft.teacher_forced`."""
        row, position = starts.nonzero(as_tuple=True)
        state = self._begin(features[row, position])
        for head in range(heads):
            logits, state = self._step(head, state, tokens[row, position + 1 + head])
            yield self._checked(logits)


class MedusaDraft(LastStateDraft):
    """Heads of residual SiLU blocks with an LM head each, or one for all."""

    algorithm = "medusa"
    needed = ("hidden_size", "num_heads", "num_hidden_layers")

    def __init__(
        self, config: Config, weights: Weights, last_layer: int, draft_ids: torch.Tensor | None
    ) -> None:
        super().__init__(config, weights, last_layer, draft_ids)
        size, heads = config["hidden_size"], range(config["num_heads"])
        rows = len(weights[_first_lm_head(weights)])
        layers, bias = config["num_hidden_layers"], "blocks.0.layers.0.bias" in weights
        self._logit_scale = float(config.get("logit_scale") or 1.0)
        self.blocks = nn.ModuleList(_Residuals(size, layers, bias) for _ in heads)
        if "lm_head.weight" in weights:
            self.lm_head = nn.Linear(size, rows, bias=False)
        else:
            self.lm_heads = nn.ModuleList(nn.Linear(size, rows, bias=False) for _ in heads)

    @staticmethod
    def rows(weights: Weights) -> int | None:
        """See `LastStateDraft.rows`."""
        name = _first_lm_head(weights)
        return len(weights[name]) if name in weights else None

    @staticmethod
    def layout(config: Config, weights: Weights, target: TargetFacts) -> tuple[Config, Weights]:
        """Return config and tensors under vLLM's names, with all that is needed.

        Older drafts name the counts medusa_num_*, and number their tensors: MEDUSA head 0 has
        0.0.linear, 0.1.linear, … and last its LM head.
        """
        for name in ("num_heads", "num_hidden_layers"):
            older = config.get(f"medusa_{name.replace('hidden_', '')}")
            config = {name: older, **config} if older is not None else config
        config = {"vocab_size": target.vocab_size, "hidden_size": target.hidden_size, **config}
        renamed = {_numbered_name(name): tensor for name, tensor in weights.items()}
        own = {name for name in renamed if name.startswith("lm_heads.")}
        if config.get("original_lm_head"):
            first = renamed.get("lm_heads.0.weight")
            first = target.lm_head_weight() if first is None else first
            renamed = {
                "lm_head.weight": first,
                **{k: v for k, v in renamed.items() if k not in own},
            }
        elif own:
            renamed.pop("lm_head.weight", None)
        if "token_map" in renamed:
            kept, size = renamed["token_map"].long(), config["vocab_size"]
            if (config.get("truncated_vocab_size") or size) < size:
                # LM heads may still be those of the whole vocabulary.
                for name in [name for name in renamed if name.startswith("lm_head")]:
                    if len(renamed[name]) == size > len(kept):
                        renamed[name] = renamed[name][kept]
            elif MedusaDraft.rows(renamed) == size:
                del renamed["token_map"]
        return config, renamed

    def _step(
        self, head: int, state: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lm_head = self.lm_head if hasattr(self, "lm_head") else self.lm_heads[head]
        return lm_head(self.blocks[head](state)) * self._logit_scale, state


class MLPSpeculatorDraft(LastStateDraft):
    """Heads that carry a state from token to token."""

    algorithm = "mlp_speculator"
    needed = ("emb_dim", "n_predict")

    def __init__(
        self, config: Config, weights: Weights, last_layer: int, draft_ids: torch.Tensor | None
    ) -> None:
        super().__init__(config, weights, last_layer, draft_ids)
        count, outer = config["n_predict"], config["emb_dim"]
        heads, rows = range(count), len(weights["head.0.weight"])
        inner = config.get("inner_dim") or outer
        self.emb = nn.ModuleList(nn.Embedding(config["vocab_size"], inner) for _ in heads)
        self.proj = nn.ModuleList(
            nn.Linear(inner if head else outer, inner, bias=False) for head in heads
        )
        self.ln = nn.ModuleList(_ScaledNorm(inner) for _ in heads)
        self.head = nn.ModuleList(nn.Linear(inner, rows, bias=False) for _ in heads)
        self._scale_input = bool(config.get("scale_input"))
        kept = 0.5 ** (1 / count)
        #: Weight of the embedding, that of the state being one.
        self._embedding_weight = math.sqrt((1 - kept) * inner / 2 / kept)

    @staticmethod
    def rows(weights: Weights) -> int | None:
        """See `LastStateDraft.rows`."""
        return len(weights["head.0.weight"]) if "head.0.weight" in weights else None

    @staticmethod
    def layout(config: Config, weights: Weights, target: TargetFacts) -> tuple[Config, Weights]:
        """Return tensors with an entry for every head, where tied ones are stored once."""
        if not config.get("tie_weights") or not isinstance(config.get("n_predict"), int):
            return config, weights
        filled = dict(weights)
        for name, tensor in weights.items():
            part, head, kind = name.split(".") if name.count(".") == 2 else ("", "", "")
            if (part in ("emb", "ln", "head") and head == "0") or (part == "proj" and head == "1"):
                for other in range(int(head) + 1, config["n_predict"]):
                    tied = f"{part}.{other}.{kind}"
                    if not torch.equal(filled.setdefault(tied, tensor), tensor):
                        raise DraftError(f"tie_weights is true, but {name} and {tied} differ")
        return config, filled

    def _begin(self, features: torch.Tensor) -> torch.Tensor:
        state = super()._begin(features)
        return _rms_normed(state) / math.sqrt(2) if self._scale_input else state

    def _step(
        self, head: int, state: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mixed = self.proj[head](state) + self._embedding_weight * self.emb[head](tokens)
        state = F.gelu(self.ln[head](mixed))
        return self.head[head](state), state


class _ScaledNorm(nn.Module):
    """x / rms(x), then scale and shift."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return _rms_normed(states) * self.weight + self.bias


class _Residuals(nn.Module):
    """h <- h + SiLU(W h + b), layer after layer."""

    def __init__(self, size: int, layers: int, bias: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size, bias) for _ in range(layers))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = hidden + F.silu(layer(hidden))
        return hidden


def _rms_normed(states: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(states, states.shape[-1:], eps=1e-6)


def _first_lm_head(weights: Weights) -> str:
    return "lm_head.weight" if "lm_head.weight" in weights else "lm_heads.0.weight"


def _numbered_name(name: str) -> str:
    """Return vLLM's name of a tensor that an older MEDUSA draft numbers."""
    if numbered := _NUMBERED.fullmatch(name):
        head, layer, linear, kind = numbered.groups()
        return f"blocks.{head}.layers.{layer}.{kind}" if linear else f"lm_heads.{head}.{kind}"
    return name


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name
