"""Probes of what is read: feature files, checkpoints, streamed samples."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tools.probes.common import Figure, Figures, outcome, scratch


def missing_features() -> Figures:
    from specforge.runtime.data_plane.offline_reader import OfflineManifestReader

    with scratch() as directory:
        return {
            f"samples read from {name}": _count(OfflineManifestReader(str(path)).read)
            for name, path in (
                ("a feature path that does not exist", directory / "absent"),
                ("a directory without feature files", directory),
            )
        }


def _count(read: Callable[[], list[Any]]) -> Figure:
    try:
        return len(read())
    except Exception as error:
        return f"refused: {type(error).__name__}"


class _CreateFile:
    """Unpickling this runs code: it creates ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def pickled_code() -> Figures:
    from specforge.export.checkpoint_io import resolve_training_state
    from specforge.runtime.data_plane.feature_store import load_feature_file
    from specforge.training.checkpoint import CheckpointManager

    figures: Figures = {}
    for name, file, load in (
        ("a feature file is read", "sample.ckpt", load_feature_file),
        ("a run resumes from a checkpoint", "training_state.pt", _read(CheckpointManager)),
        ("a checkpoint is exported", "training_state.pt", _parent(resolve_training_state)),
    ):
        with scratch() as directory:
            marker, path = directory / "ran", directory / file
            torch.save({"global_step": _CreateFile(marker)}, path)
            # What follows the load may fail on such content; only what ran counts.
            with contextlib.suppress(Exception):
                load(str(path))
            figures[f"code in a pickle, when {name}"] = "runs" if marker.exists() else "does not"
    return figures


def _parent(load: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda path: load(str(Path(path).parent))


def _read(manager: Any) -> Callable[[str], Any]:
    return _parent(manager.read_resume_state)


def streamed_sample(
    length: int, response: slice = slice(None), hidden: int = 4
) -> dict[str, torch.Tensor]:
    """Features of EAGLE-3 from a capture server; ``response`` is supervised."""
    loss_mask = torch.zeros(1, length, dtype=torch.long)
    loss_mask[:, response] = 1
    return {
        "input_ids": torch.arange(length).unsqueeze(0) + 1,
        "attention_mask": torch.ones(1, length, dtype=torch.long),
        "loss_mask": loss_mask,
        "hidden_state": torch.randn(1, length, 3 * hidden),
        "target": torch.randn(1, length, hidden),
    }


def streamed_samples() -> Figures:
    from specforge.algorithms.eagle3.data import (
        build_offline_collator,
        build_server_collator,
        normalize_offline_sample,
    )

    def captured(states: int) -> dict[str, torch.Tensor]:
        sample = streamed_sample(64)
        stored = {
            "input_ids": sample["input_ids"][0],
            "loss_mask": sample["loss_mask"][0],
            "aux_hidden_state": sample["hidden_state"],
            "hidden_state": sample["target"][:, :states],
        }
        return normalize_offline_sample(stored, max_len=64)

    return {
        "a streamed batch of samples of 64 and 48 tokens": outcome(
            lambda: build_server_collator()([streamed_sample(64), streamed_sample(48)])
        ),
        "a captured sample of 64 tokens with 63 target states": outcome(
            lambda: build_offline_collator()([captured(63)])
        ),
    }


def supervised_states() -> Figures:
    """The states that supervise the first draft position of one sample of 64 tokens."""
    from specforge.algorithms.eagle3.data import build_server_collator, normalize_offline_sample
    from specforge.modeling.target.target_head import TargetHead

    def states(batch: dict[str, torch.Tensor]) -> str:
        numbers = torch.arange(1.0, 65).view(1, 64, 1)
        _, shifted, mask = TargetHead.preprocess(
            None, batch["input_ids"], numbers, batch["loss_mask"]
        )
        found = (shifted[mask.bool()] - 1).int().tolist()
        return f"{found[0]} to {max(found)}" + (" and a zero state" if -1 in found else "")

    figures: Figures = {}
    for name, response in (("20 to 39", slice(20, 40)), ("20 to 63", slice(20, 64))):
        sample = streamed_sample(64, response)
        captured = {
            "input_ids": sample["input_ids"][0],
            "loss_mask": sample["loss_mask"][0],
            "aux_hidden_state": sample["hidden_state"],
            "hidden_state": sample["target"],
        }
        offline = normalize_offline_sample(captured, max_len=64)
        streamed = build_server_collator()([sample])
        for source, batch in (("files", offline), ("a server", streamed)):
            figures[f"response of tokens {name}, from {source}: trained on states"] = states(batch)
    return figures
