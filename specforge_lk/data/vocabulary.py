"""Draft vocabularies: the target's most frequent tokens, in SpecForge's format."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from specforge_lk.files import atomic_write

if TYPE_CHECKING:
    import torch


def vocabulary_mapping(
    counts: Counter[int], draft_vocab_size: int, vocab_size: int
) -> dict[str, torch.Tensor]:
    """Truncate the vocabulary to the most frequent tokens, in SpecForge's format.

    Ties, and places left when too few tokens occur, go to the lower ids.

    Args:
        counts: Token id to frequency.
        draft_vocab_size: V_d, the number of tokens to keep.
        vocab_size: V, the size of the target vocabulary.

    Returns:
        ``t2d`` [V], true on tokens of the draft vocabulary; ``d2t`` [V_d], the offset from a
        draft id to its target id (target_id = draft_id + d2t[draft_id]).

    Raises:
        ValueError: the draft vocabulary is not smaller than the target's.
    """
    import torch

    if not 0 < draft_vocab_size < vocab_size:
        raise ValueError(
            f"draft_vocab_size must be between 1 and {vocab_size - 1} (the target has "
            f"{vocab_size} tokens), got {draft_vocab_size}; without truncation no mapping is needed"
        )
    ranked = sorted(range(vocab_size), key=lambda token: (-counts[token], token))
    kept = torch.tensor(sorted(ranked[:draft_vocab_size]))
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[kept] = True
    return {"t2d": t2d, "d2t": kept - torch.arange(draft_vocab_size)}


def coverage(mapping: dict[str, torch.Tensor], counts: Counter[int]) -> float:
    """Return the share of the counted tokens that are in the draft vocabulary."""
    kept = mapping["t2d"].tolist()
    total = counts.total()
    return sum(count for token, count in counts.items() if kept[token]) / total if total else 0.0


def save_mapping(mapping: dict[str, torch.Tensor], path: Path) -> None:
    """Write a mapping where ``model.vocab_mapping_path`` can read it.

    Raises:
        ValueError: another mapping is there, which drafts may have been trained with.
    """
    import torch

    if path.exists():
        before = torch.load(path, weights_only=True)
        if all(torch.equal(before[name], mapping[name]) for name in ("t2d", "d2t")):
            return
        raise ValueError(
            f"{path} holds another draft vocabulary; drafts trained with it need it: remove it, "
            "or write to another --vocab-mapping"
        )
    with atomic_write(path) as temporary:
        torch.save(mapping, temporary)


__all__ = ["coverage", "save_mapping", "vocabulary_mapping"]
