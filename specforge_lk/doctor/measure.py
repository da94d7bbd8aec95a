"""τ of an exported draft, as it is and with one thing changed.

A `Condition` is what is changed: settings of config.json, the loaded draft, the target, the rule or
the responses. `Bench` measures conditions on the same responses, so that their differences are
paired, and remembers them.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specforge_lk.data.conversations import Tokens
from specforge_lk.decode.draft import Draft, load_draft
from specforge_lk.decode.target import Target
from specforge_lk.doctor.findings import Cost
from specforge_lk.evaluate.intervals import percentiles, resamples
from specforge_lk.evaluate.settings import Settings
from specforge_lk.evaluate.teacher_forced import measure_responses
from specforge_lk.serving import Serving

#: Name of the responses as they are served.
SERVED = "served"


@dataclass(frozen=True)
class Edit:
    """A change of a loaded draft; the name says which, and is unique."""

    name: str
    apply: Callable[[Any, Target], None]


@dataclass(frozen=True)
class TargetEdit:
    """A change of the target while a draft is measured beside it; the name is unique."""

    name: str
    during: Callable[[Target], AbstractContextManager[None]]


@dataclass(frozen=True)
class Condition:
    """What is changed about a draft, its target and how they are served.

    Attributes:
        config: JSON of changed settings of config.json; null removes one.
        edits: changes of the loaded draft, in this order.
        target: changes of the target.
        rule: another serving rule; None for the one that is asked about.
        responses: name of the responses to measure on.
    """

    config: str = "{}"
    edits: tuple[Edit, ...] = ()
    target: tuple[TargetEdit, ...] = ()
    rule: Serving | None = None
    responses: str = SERVED

    def having(self, **settings: Any) -> Condition:
        """Return this condition with other settings of config.json."""
        merged = {**json.loads(self.config), **settings}
        return replace(self, config=json.dumps(merged, sort_keys=True))

    def but(self, *edits: Edit) -> Condition:
        """Return this condition with further changes of the loaded draft.

        An edit replaces an earlier one of the same kind: the part of its name before a colon.
        """
        kinds = {_kind(edit) for edit in edits}
        return replace(self, edits=(*(e for e in self.edits if _kind(e) not in kinds), *edits))

    def without(self, kind: str) -> Condition:
        """Return this condition without the edit of a kind."""
        return replace(self, edits=tuple(e for e in self.edits if _kind(e) != kind))

    def beside(self, edit: TargetEdit) -> Condition:
        """Return this condition with a further change of the target."""
        return replace(self, target=(*self.target, edit))

    @property
    def key(self) -> tuple[object, ...]:
        """What tells it from others."""
        names = tuple(edit.name for edit in self.edits), tuple(edit.name for edit in self.target)
        return self.config, *names, self.rule, self.responses


def _kind(edit: Edit) -> str:
    return edit.name.partition(":")[0]


@dataclass(frozen=True)
class Measured:
    """Verification steps of responses under a rule.

    Attributes:
        tokens: [n] tokens of every response that verification steps emit.
        rounds: [n] expected verification steps.
    """

    tokens: np.ndarray
    rounds: np.ndarray

    @property
    def tau(self) -> float:
        """Tokens per verification step, pooled over responses as engines pool."""
        return float(self.tokens.sum() / self.rounds.sum())

    def resampled(self) -> np.ndarray:
        """[resamples] τ of responses drawn with replacement, the same ones at every call."""
        drawn = resamples(len(self.tokens), 0)
        return (drawn @ self.tokens) / (drawn @ self.rounds)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of τ."""
        return _percentiles(self.resampled())


def cost(remedied: Measured, served: Measured) -> Cost:
    """Return the cost of serving as it is, paired by response."""
    spread = _percentiles(remedied.resampled() - served.resampled())
    return Cost(remedied.tau - served.tau, spread, remedied.tau, served.tau)


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = percentiles(values)
    return low, high


class Bench:
    """Measures an exported draft under conditions.

    Args:
        target: the target.
        path: the draft's folder.
        responses: tokenized responses of the target, by name; `SERVED` are those as served.
        rule: the serving rule.
        heads: drafted tokens per verification step, K.
        progress: called with what is about to be measured.
    """

    def __init__(
        self,
        target: Target,
        path: Path,
        responses: Mapping[str, Sequence[Tokens]],
        rule: Serving,
        heads: int,
        progress: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.target, self.path, self.rule, self.heads = target, path, rule, heads
        self.responses = dict(responses)
        self._progress = progress
        self._known: dict[tuple[object, ...], Measured] = {}

    def load(self, condition: Condition) -> Draft:
        """Load the draft under a condition.

        Raises:
            DraftError: it cannot be loaded so.
        """
        changes = json.loads(condition.config)
        with contextlib.ExitStack() as stack:
            folder = self.path
            if changes:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                _copy(self.path, folder, changes)
            draft = load_draft(folder, self.target)
        for edit in condition.edits:
            edit.apply(draft, self.target)
        return draft

    def measure(self, condition: Condition) -> Measured:
        """Measure the draft under a condition, once.

        Raises:
            ValueError: it cannot be loaded so, or gives no finite logits.
        """
        if condition.key not in self._known:
            self._progress(_title(condition))
            self._known[condition.key] = self.measure_draft(self.load(condition), condition)
        return self._known[condition.key]

    def measure_draft(self, draft: Draft, condition: Condition) -> Measured:
        """Measure a draft that is loaded, under the rest of a condition."""
        with contextlib.ExitStack() as stack:
            for edit in condition.target:
                stack.enter_context(edit.during(self.target))
            tokens = self.responses[condition.responses]
            return tau_of(self.target, draft, tokens, condition.rule or self.rule, self.heads)

    def cost(self, remedied: Condition, served: Condition) -> Cost:
        """Return what serving under one condition costs against another."""
        return cost(self.measure(remedied), self.measure(served))


def _title(condition: Condition) -> str:
    changes = [edit.name for edit in condition.edits]
    changes += [edit.name for edit in condition.target]
    changes += [f"{k}={v}" for k, v in json.loads(condition.config).items()]
    changes += [str(condition.rule)] if condition.rule else []
    changes += [condition.responses] if condition.responses != SERVED else []
    return ", ".join(changes) or "as exported"


def _copy(source: Path, folder: Path, changes: Mapping[str, Any]) -> None:
    """Fill a folder with a draft's files, its config changed."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | changes
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in source.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())


def token_counts(responses: Sequence[Tokens]) -> Counter[int]:
    """Count the tokens of responses."""
    counts: Counter[int] = Counter()
    for tokens in responses:
        counts.update(compress(tokens.input_ids, tokens.loss_mask))
    return counts


class Frequencies:
    """A draft that has no idea but how frequent tokens are: see `Draft` for the interface.

    Args:
        counts: of tokens.
        target: the target.
    """

    def __init__(self, counts: Counter[int], target: Target) -> None:
        self.capture_layers = (0,)
        self.draft_ids = None
        self._logits = torch.full((target.vocab_size,), -30.0, device=target.device)
        for token, count in counts.items():
            self._logits[token] = math.log(count)

    def teacher_forced(
        self, tokens: torch.Tensor, features: torch.Tensor, starts: torch.Tensor, heads: int
    ) -> Iterator[torch.Tensor]:
        """Yield the same logits for every draft position."""
        for _ in range(heads):
            yield self._logits.expand(int(starts.sum()), -1)


def tau_of(
    target: Target, draft: Draft, responses: Sequence[Tokens], rule: Serving, heads: int
) -> Measured:
    """Measure the verification steps of responses under a rule, teacher-forced and exact."""
    (found,) = measure_responses(target, [(draft, [rule])], responses, Settings(heads=heads))
    return Measured(*found[rule].ratios["tau_rounds"])


__all__ = ["SERVED", "Bench", "Condition", "Edit", "Measured", "TargetEdit", "cost", "tau_of"]
