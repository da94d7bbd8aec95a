"""What the doctor examines: a draft, its target, and whatever was given beside them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from specforge_lk.data.capture import MANIFEST
from specforge_lk.decode.checkpoint import read_weights
from specforge_lk.decode.draft import Draft
from specforge_lk.decode.target import Target
from specforge_lk.doctor.findings import Cost, Finding, Weight
from specforge_lk.doctor.measure import (
    SERVED,
    Bench,
    Condition,
    Frequencies,
    Measured,
    token_counts,
)
from specforge_lk.drafts.table import DraftType
from specforge_lk.files import read_json
from specforge_lk.run_config import read_sections
from specforge_lk.serving import Serving

#: Files of features that are read.
_SAMPLES = 64
#: Caveat of a finding whose cost was not asked for.
NO_RESPONSES = "give --held-out to measure what it costs"


_TEXT, _NUMBER, _LAYERS = "text", "a whole number", "a list of layers"
#: What settings of a run config are that checks read, and what `capture.json` has.
_SETTINGS = {
    **dict.fromkeys(("draft_model_config", "vocab_mapping_path", "target_head_dtype"), _TEXT),
    **dict.fromkeys(("train_data_path", "chat_template"), _TEXT),
    **dict.fromkeys(("mask_token_id", "max_length"), _NUMBER),
    "aux_hidden_state_layer_ids": _LAYERS,
}
_CAPTURED = {"layers": _LAYERS, "stored_dtype": _TEXT, "max_length": _NUMBER}


def _require(where: str, value: Any, kind: str | None) -> None:
    """Refuse a setting of another type; null is none."""
    of_kind = {
        _TEXT: isinstance(value, str),
        _NUMBER: type(value) is int,
        _LAYERS: isinstance(value, list) and all(type(layer) is int for layer in value),
    }
    if value is not None and kind is not None and not of_kind[kind]:
        raise ValueError(f"{where} must be {kind}, got {str(value)[:40]!r}")


@dataclass(frozen=True)
class Features:
    """Captured features, as far as they say how a draft was trained.

    Attributes:
        manifest: ``capture.json``; empty where another program captured them.
        samples: token ids and loss masks of the first samples.
    """

    manifest: Mapping[str, Any]
    samples: Sequence[tuple[list[int], list[int]]]


def read_features(folder: Path) -> Features:
    """Read what a folder of features says.

    Raises:
        ValueError: there are none.
    """
    if not folder.is_dir():
        raise ValueError(f"--features {folder} is no folder; give data.hidden_states_path")
    files = sorted(folder.rglob("*.ckpt"))[:_SAMPLES]
    if not files:
        raise ValueError(f"--features {folder}: no *.ckpt file; give data.hidden_states_path")
    samples = [_sample(file) for file in files]
    manifest = folder / MANIFEST
    found = read_json(manifest, "capture again, or remove it") if manifest.is_file() else {}
    for name, value in found.items():
        _require(f"{manifest}: {name}", value, _CAPTURED.get(name))
    return Features(found, samples)


def _sample(file: Path) -> tuple[list[int], list[int]]:
    """Return the token ids and the loss mask of a feature file."""
    record = read_tensors(file, "input_ids", "loss_mask")
    return record["input_ids"].flatten().tolist(), record["loss_mask"].flatten().tolist()


def read_tensors(file: Path, *names: str) -> dict[str, torch.Tensor]:
    """Read tensors of whole numbers from a file of a capture.

    Raises:
        ValueError: it is damaged, or does not have them.
    """
    damage = (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError)
    try:
        record = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
        found = {name: record[name] for name in names}
        whole = not any(tensor.is_floating_point() for tensor in found.values())
    except (*damage, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"{file} is cut or damaged, or has no {' and '.join(names)}; run the capture again, "
            "which makes it anew"
        ) from error
    if not whole:
        raise ValueError(f"{file}: {' and '.join(names)} must be whole numbers; capture it again")
    return found


@dataclass(frozen=True)
class Run:
    """The run config that a draft was trained with, as it is written.

    Defaults are SpecForge 0.2.0's.
    """

    path: Path
    sections: Mapping[str, Mapping[str, Any]]

    def get(self, section: str, name: str, default: Any = None) -> Any:
        """Return a setting, or the default where it is not written or null.

        Raises:
            ValueError: it is of another type.
        """
        value = (self.sections.get(section) or {}).get(name)
        _require(f"{self.path}: {section}.{name}", value, _SETTINGS.get(name))
        return default if value is None else value

    def file(self, section: str, name: str) -> Path | None:
        """Return a path of the config, looked for here and beside the config; None without one.

        Raises:
            ValueError: there is no such file.
        """
        named = self.get(section, name, "")
        if not named:
            return None
        for found in (Path(named), self.path.parent / named):
            if found.is_file():
                return found
        raise ValueError(
            f"{self.path}: {section}.{name}={named} is no file here; run the doctor where the "
            "training ran, or copy the file"
        )

    @cached_property
    def draft_config(self) -> Mapping[str, Any]:
        """The draft config of the training; empty where the run names none."""
        file = self.file("model", "draft_model_config")
        return read_json(file, "mend it, or name another draft config") if file else {}


def read_run(path: Path) -> Run:
    """Read a run config.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML or JSON of sections.
    """
    read = read_sections(path)
    if not read.get("model"):
        raise ValueError(f"--config {path}: it has no section model; give the run config")
    return Run(path, read)


@dataclass
class Case:
    """Everything that checks read.

    Attributes:
        target: the target.
        dtype: name of the dtype that it is served in.
        path: the draft's folder.
        config: its config.json.
        kind: its type.
        draft: as it loads here.
        served: the condition in which the engine serves it.
        rule: the serving rule.
        engine: ``vllm`` or ``sglang``; None when unknown.
        rows: the held-out responses as they are written.
        bench: measures; None without held-out responses.
        run: the run config; None when not given.
        features: None when not given.
        tolerance: smallest cost that counts, in τ.
    """

    target: Target
    dtype: str
    path: Path
    config: dict[str, Any]
    kind: DraftType
    draft: Draft
    served: Condition
    rule: Serving
    engine: str | None = None
    rows: Sequence[dict[str, Any]] = field(default_factory=list)
    bench: Bench | None = None
    run: Run | None = None
    features: Features | None = None
    tolerance: float = 0.01

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """The draft's tensors."""
        return read_weights(self.path)

    @cached_property
    def frequencies(self) -> Measured:
        """What a draft that only knows how frequent tokens are gives under the rule."""
        assert self.bench is not None
        blind: Any = Frequencies(token_counts(self.bench.responses[SERVED]), self.target)
        return self.bench.measure_draft(blind, Condition())

    @property
    def engines(self) -> tuple[str, ...]:
        """The engines that may serve it."""
        return (self.engine,) if self.engine else ("vllm", "sglang")

    def judged(
        self,
        what: str,
        *,
        trained: str,
        served: str,
        remedy: str,
        remedied: Condition,
        as_served: Condition | None = None,
        caveat: str = "",
    ) -> Finding:
        """Return the finding of a difference that is certain, with its cost if it can be had.

        Args:
            what, trained, served, remedy, caveat: see `Finding`.
            remedied: the condition without the difference.
            as_served: the condition with it; None for the engine's own.
        """
        weight, found = Weight.UNKNOWN, None
        if self.bench is None:
            caveat = NO_RESPONSES
        else:
            try:
                found = self.bench.cost(remedied, as_served or self.served)
                costs = found.exceeds(self.tolerance)
                weight = Weight.COSTS if costs else Weight.HARMLESS
            except ValueError as error:
                caveat = f"it could not be measured ({error})"
        return Finding(what, trained, served, remedy, weight, found, caveat)

    def better(self, candidates: Mapping[str, Condition]) -> tuple[str, Cost] | None:
        """Return the candidate with the highest τ and its cost, if serving as it is costs.

        A candidate that does not load or has no finite logits is none, nor one that knows less
        than how frequent tokens are: what accepts next to nothing is better by chance.
        """
        assert self.bench is not None
        found: tuple[str, Cost] | None = None
        for name, condition in candidates.items():
            try:
                measured = self.bench.cost(condition, self.served)
            except ValueError:
                continue
            if not measured.exceeds(self.tolerance) or measured.remedied < self.frequencies.tau:
                continue
            if found is None or measured.tau > found[1].tau:
                found = name, measured
        return found


__all__ = ["Case", "Features", "Run", "read_features", "read_run", "read_tensors"]
