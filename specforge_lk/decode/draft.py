"""What the decoding loop and the evaluation ask of a draft, and how one is loaded."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from specforge_lk.decode.target import Target

#: Architecture of a draft, see `architecture` -> function(path, config, target, layers) -> Draft.
LOADERS = {
    "LlamaForCausalLMEagle3": "specforge_lk.decode.eagle3:load_eagle3",
    "Eagle3LlamaForCausalLM": "specforge_lk.decode.eagle3:load_eagle3",
    "PEagleDraftModel": "specforge_lk.decode.peagle:load_peagle",
    "DFlashDraftModel": "specforge_lk.decode.dflash:load_dflash",
    "DominoDraftModel": "specforge_lk.decode.dflash:load_dflash",
    "DSparkDraftModel": "specforge_lk.decode.dflash:load_dflash",
    "MedusaModel": "specforge_lk.decode.heads:load_heads",
    "MLPSpeculatorPreTrainedModel": "specforge_lk.decode.heads:load_heads",
    "MTPDraftModel": "specforge_lk.decode.mtp:load_mtp",
}


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
    (the target sampled it). Head i = 1..K proposes token t + 1 + i.
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
        self, heads: int, temperature: float, greedy: bool, generator: torch.Generator | None
    ) -> Proposal:
        """Draft ``heads`` tokens per row."""
        ...

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Continue with the given rows of the batch only."""
        ...

    def teacher_forced(
        self, tokens: torch.Tensor, features: torch.Tensor, starts: torch.Tensor, heads: int
    ) -> Iterator[torch.Tensor]:
        """Logits of every head at many chain starts at once, with the true tokens as drafted ones.

        Args:
            tokens: [B, L] sequences, padded on the right.
            features: [B, L, F] captured target states.
            starts: [B, L] bool with N chain starts, each at most L - 2 - heads.
            heads: number of heads K.

        Yields:
            K times [N, V_d], rows ordered as ``starts.nonzero()``.
        """
        ...


#: What vLLM takes the architecture from where ``architectures`` does not say: other keys' values.
_IMPLIED = {
    ("speculators_model_type", "eagle3"): "Eagle3LlamaForCausalLM",
    ("model_type", "medusa"): "MedusaModel",
    ("model_type", "mlp_speculator"): "MLPSpeculatorPreTrainedModel",
}


def last_valid(valid: torch.Tensor, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The last valid entry of every row, where the next chain starts.

    Args:
        valid: [B, n] bool, at least one entry of each row.
        values: [B, n, …] each.

    Returns:
        [B, 1, …] each.
    """
    index = torch.arange(valid.shape[1], device=valid.device)
    last = torch.where(valid, index, -1).amax(1, keepdim=True)
    rows = torch.arange(len(valid), device=valid.device)[:, None]
    return tuple(value[rows, last] for value in values)


class DraftError(ValueError):
    """A draft checkpoint that cannot be evaluated; the message says what to change."""


def read_config(path: Path) -> dict:
    """The config.json of an exported draft, checked to be one of a known architecture."""
    file = path / "config.json"
    if not file.is_file():
        raise DraftError(
            f"draft {path}: no config.json; export the checkpoint with "
            "`specforge export --to hf` and give the exported directory"
        )
    config = json.loads(file.read_text(encoding="utf-8"))
    name = architecture(config)
    if name not in LOADERS:
        raise DraftError(
            f"{file}: architectures {name!r} is not a known draft; "
            f"known are {', '.join(sorted(LOADERS))}"
        )
    return config


def architecture(config: dict) -> str | None:
    """Name of a draft's architecture, a key of `LOADERS` if it is known."""
    if config.get("num_nextn_predict_layers"):
        # An MTP module, maybe among the target's own layers.
        return "MTPDraftModel"
    named = (config.get("architectures") or [None])[0]
    if named in LOADERS:
        return named
    for (key, value), implied in _IMPLIED.items():
        if config.get(key) == value:
            return implied
    return "MedusaModel" if named is None and "medusa_num_heads" in config else named


def load_draft(path: str | Path, target: Target, layers: tuple[int, ...] | None = None) -> Draft:
    """Load an exported draft for a target.

    Args:
        path: directory written by ``specforge export --to hf``, or in the layout of an engine.
        target: the target it drafts for; lends its embeddings when the draft has none.
        layers: captured target layers, overriding the draft's config.

    Raises:
        DraftError: the directory is incomplete, or does not fit itself or the target.
    """
    path = Path(path)
    config = read_config(path)
    module, function = LOADERS[architecture(config)].split(":")
    return getattr(importlib.import_module(module), function)(path, config, target, layers)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """All tensors in a draft's directory, as safetensors or else as torch files, sharded or not."""
    from safetensors.torch import load_file

    def load_torch(file: Path) -> dict[str, torch.Tensor]:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)

    files = sorted(path.glob("*.safetensors"))
    if index := next(path.glob("*.safetensors.index.json"), None):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [path / name for name in sorted(shards)]
        if missing := [file.name for file in files if not file.is_file()]:
            raise DraftError(f"draft {path}: {', '.join(missing)} of {index.name} is missing")
    load = load_file
    if not files:
        files, load = sorted([*path.glob("pytorch_model*.bin"), *path.glob("*.pt")]), load_torch
    if not files:
        raise DraftError(
            f"draft {path}: no *.safetensors file; export the checkpoint with "
            "`specforge export --to hf` and give the exported directory"
        )
    return {name: tensor for file in files for name, tensor in load(file).items()}


def draft_vocabulary(
    path: Path, weights: dict[str, torch.Tensor], draft_vocab_size: int, vocab_size: int
) -> torch.Tensor | None:
    """Target ids [V_d] of a draft vocabulary, checked in every way it can disagree with itself.

    SpecForge stores ``d2t`` as OFFSETS (target id - draft index) and ``t2d`` as a mask over the
    target vocabulary. Returns None when the draft covers the whole vocabulary in order.
    """
    remedy = (
        "export again with the vocabulary mapping the draft was trained with "
        "(`specforge export … --vocab-mapping FILE`)"
    )

    def refuse(message: str) -> DraftError:
        return DraftError(f"draft {path}: {message}; {remedy}")

    rows = weights["lm_head.weight"].shape[0]
    if rows != draft_vocab_size:
        raise refuse(f"lm_head.weight has {rows} rows, draft_vocab_size is {draft_vocab_size}")
    if "d2t" not in weights:
        if draft_vocab_size == vocab_size:
            return None
        raise refuse(f"d2t is missing, draft_vocab_size {draft_vocab_size} of {vocab_size}")
    d2t = weights["d2t"]
    if d2t.numel() != draft_vocab_size:
        raise refuse(f"d2t has {d2t.numel()} entries, draft_vocab_size is {draft_vocab_size}")
    ids = d2t.long() + torch.arange(draft_vocab_size)
    if ids.min() < 0 or ids.max() >= vocab_size or ids.unique().numel() != draft_vocab_size:
        raise refuse(f"d2t does not map to {draft_vocab_size} distinct ids below {vocab_size}")
    if "t2d" in weights:
        t2d = weights["t2d"].bool()
        if t2d.numel() != vocab_size:
            raise refuse(f"t2d has {t2d.numel()} entries, the target vocabulary {vocab_size}")
        if t2d.sum() != draft_vocab_size:
            raise refuse(
                f"t2d selects {int(t2d.sum())} tokens, draft_vocab_size is {draft_vocab_size}"
            )
        if not t2d[ids].all():
            raise refuse("d2t and t2d name different tokens")
    return None if torch.equal(ids, torch.arange(vocab_size)) else ids
