"""Draft vocabularies: the target's most frequent tokens, in SpecForge's format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from specforge_lk.data.rows import MalformedRow
from specforge_lk.files import save_tensors

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


def require_known(ids: Sequence[int], vocab_size: int) -> None:
    """Refuse token ids that the target does not have.

    Args:
        ids: token ids of a row.
        vocab_size: V, the size of the target vocabulary.

    Raises:
        MalformedRow: an id is outside the vocabulary.
    """
    if not ids or (min(ids) >= 0 and max(ids) < vocab_size):
        return
    outside = min(ids) if min(ids) < 0 else max(ids)
    raise MalformedRow(
        f"it has token id {outside}, outside the target's vocabulary of {vocab_size}; were the "
        "responses sampled from another target?"
    )


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
    from specforge.tensor_file import read_tensor_file

    if path.exists():
        remedy = "Remove it, or write to another --vocab-mapping"
        before = read_tensor_file(path, what="draft vocabulary", remedy=remedy)
        held = before if isinstance(before, dict) else {}
        if held.keys() == mapping.keys() and all(
            torch.equal(held[name], mapping[name]) for name in mapping
        ):
            return
        raise ValueError(
            f"{path} holds another draft vocabulary; drafts trained with it need it: remove it, "
            "or write to another --vocab-mapping"
        )
    save_tensors(mapping, path)


__all__ = ["coverage", "require_known", "save_mapping", "vocabulary_mapping"]
