"""The rows of the study, one of every draft, kept in the repository.

A row has the rounds of every response beside its figures, so that a draft is compared with another
that was measured on another day, on another machine: both along the same responses.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from experiments.gains.plan import OBJECTIVES, RULES, Run
from specforge_lk.evaluate.intervals import bounds, resampled
from specforge_lk.evaluate.rounds import Rounds
from specforge_lk.files import write_text

PATH = Path("experiments/results/gains.json")
#: Of the bootstrap; the draws are whole responses.
SEED = 0
#: Digits of a response's rounds: the sum of 109 is off by 0.005 at most.
DIGITS = 4


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Gain(_Model):
    """What one or more drafts gain over others, paired along the same responses.

    Attributes:
        difference: of τ, the mean over pairs.
        ci: its 95 % interval over responses; None of a single response.
        share: that difference over the other's τ − 1, the mean over pairs.
        share_ci: its 95 % interval.
    """

    difference: float
    ci: list[float] | None
    share: float | None
    share_ci: list[float] | None


class Measured(_Model):
    """What one rule meets along its responses.

    Attributes:
        responses: identity of the responses, a key of `Results.responses`.
        rounds: [C] expected rounds of every response.
        tau: Σ tokens / Σ rounds, and its 95 % interval.
        alpha: [K] exact acceptance rate of every draft position.
        coverage: the target's mass on the draft vocabulary.
        off_rule: tokens of the responses that have no probability under the rule.
        gain: over the draft that differs in the objective alone; None of that draft itself, and
            where its row is not there yet.
    """

    responses: str
    tau: float
    tau_ci: list[float] | None
    alpha: list[float | None]
    coverage: float | None
    off_rule: int
    gain: Gain | None = None
    rounds: list[float]

    @classmethod
    def of(cls, rounds: Rounds, responses: str) -> Measured:
        """Keep the figures of a measurement, and what pairs them."""
        figures = rounds.figures(SEED)
        return cls(
            responses=responses,
            tau=figures["tau_rounds"],
            tau_ci=figures["tau_rounds_ci"],
            alpha=figures["alpha_per_head"],
            coverage=figures["coverage"],
            off_rule=figures["off_rule_tokens"],
            rounds=[round(float(value), DIGITS) for value in rounds.expected.rounds],
        )


class Row(_Model):
    """One draft: how it was trained, and what was measured.

    Attributes:
        part: of the study; this and the next six are those of its `Run`.
        start_weights: digest of the exported draft that it started from; None from scratch.
        inputs: digest of what it was made from, code aside.
        code: digest of the sources that it depends on.
        command: of its training.
        device: that it was measured on.
        seconds: wall clock of its training; None where that was interrupted.
        last_step: metrics of the last step.
        versions: of packages.
        measured: by serving rule.
    """

    part: str
    architecture: str
    objective: str
    seed: int
    samples: int
    steps: int
    start_steps: int
    start_weights: str | None = None
    inputs: str
    code: str
    command: str
    device: str
    seconds: float | None
    last_step: dict[str, float] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    measured: dict[str, Measured] = Field(default_factory=dict)

    @property
    def run(self) -> Run:
        """What this is the row of."""
        return Run(
            *(self.architecture, self.objective, self.seed),
            *(self.samples, self.steps, self.start_steps),
        )


class Results(_Model):
    """All rows.

    Attributes:
        responses: by identity, [C] tokens that rounds give of every response.
        rows: one of every run, in the order of their settings.
    """

    responses: dict[str, list[int]] = Field(default_factory=dict)
    rows: list[Row] = Field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read what is there; a file that is not there has no rows."""
        return cls.model_validate_json(path.read_text("utf-8")) if path.exists() else cls()

    def write(self, path: Path) -> None:
        """Pair every row anew, and write one line each, so that a diff shows which are new."""
        for row in self.rows:
            for rule, measured in row.measured.items():
                measured.gain = self.gain([(row.run, row.run.baseline)], rule)
        self.rows.sort(key=_order)

        def lines(parts: Sequence[str]) -> str:
            return ",\n".join(parts)

        used = {m.responses for row in self.rows for m in row.measured.values()}
        responses = [
            f"{json.dumps(name)}: {json.dumps(tokens)}"
            for name, tokens in sorted(self.responses.items())
            if name in used
        ]
        rows = [row.model_dump_json() for row in self.rows]
        text = f'{{"responses": {{\n{lines(responses)}\n}},\n"rows": [\n{lines(rows)}\n]}}\n'
        write_text(path, text)

    def find(self, run: Run) -> Row | None:
        """Return a run's row."""
        return next((row for row in self.rows if row.run == run), None)

    def put(self, row: Row) -> None:
        """Add a row in place of the one that the run had."""
        self.rows = [old for old in self.rows if old.run != row.run] + [row]

    def take(self, other: Results) -> None:
        """Add the rows of ``other``, and the responses that they were measured along."""
        self.responses |= other.responses
        for row in other.rows:
            self.put(row)

    def has(self, run: Run, responses: dict[str, str], *, same_code: bool = False) -> bool:
        """Whether a run's row stands for what would be measured today.

        Args:
            run: the run.
            responses: by rule, the identity of the responses to measure along.
            same_code: whether a row that other code made counts as none.
        """
        row = self.find(run)
        return (
            row is not None
            and row.inputs == run.inputs
            and (row.code == run.code or not same_code)
            and {rule: m.responses for rule, m in row.measured.items()} == responses
        )

    def gain(self, pairs: Sequence[tuple[Run, Run]], rule: str) -> Gain | None:
        """Return what the first of every pair gains over the second, on average.

        The bootstrap resamples responses, the same ones for all drafts. Pairs of which a row is
        not there, or that were measured along other responses, do not count.

        Returns:
            None where no pair counts.
        """
        found = []
        for pair in pairs:
            rows = [self.find(run) for run in pair]
            a, b = (row.measured.get(rule) if row else None for row in rows)
            if pair[0] != pair[1] and a and b and a.responses == b.responses:
                found.append((a, b))
        if not found or len({a.responses for a, _ in found}) > 1:
            return None
        tokens = np.array(self.responses[found[0][0].responses], dtype=float)
        drawn, figures = (
            [[take(np.array(m.rounds)) for m in pair] for pair in found] for take in _takes(tokens)
        )

        def mean_of(function: Callable, of: list) -> np.ndarray:
            with np.errstate(invalid="ignore", divide="ignore"):
                value = np.mean([function(a, b) for a, b in of], axis=0)
            return np.where(np.isfinite(value), value, np.nan)

        difference = float(mean_of(_difference, figures))
        share = float(mean_of(_share, figures))
        return Gain(
            difference=difference,
            ci=bounds(mean_of(_difference, drawn)),
            share=None if np.isnan(share) else share,
            share_ci=bounds(mean_of(_share, drawn)),
        )


def _takes(tokens: np.ndarray) -> tuple[Callable, Callable]:
    """Return what gives τ of rounds [C]: of every resample of the responses [R], and of all."""
    return (
        lambda rounds: resampled(tokens, rounds, SEED),
        lambda rounds: tokens.sum() / rounds.sum(),
    )


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - b


def _share(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a - b) / (b - 1)


def _order(row: Row) -> tuple:
    names = list(OBJECTIVES)
    place = names.index(row.objective) if row.objective in names else len(names)
    settings = (row.samples, row.start_steps, row.steps)
    return (row.part, row.architecture, *settings, row.seed, place)


def rules_of(results: Results) -> list[str]:
    """Return the rules that rows were measured under, in the order of `RULES`."""
    known = {rule for row in results.rows for rule in row.measured}
    return [rule for rule in RULES.values() if rule in known]


__all__ = ["PATH", "Gain", "Measured", "Results", "Row", "rules_of"]
