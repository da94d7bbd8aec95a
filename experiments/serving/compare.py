"""What a serving engine did against what our own decoding did, on the same prompts.

At temperature 0 every decision is determined: the same draft, read the same way, is accepted in the
same places. So the records of every prompt must be the same, not only their sums; near-ties in
float32 may cost a prompt here and there. Above 0 both sides sample, and the acceptance rates of
every draft position must agree within an interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from experiments.serving.report import Prediction
from specforge_lk.evaluate.intervals import bootstrap_ratio
from specforge_lk.evaluate.rounds import Rounds

#: Largest difference of the two best log-probabilities that float32 may decide either way.
NEAR_TIE = 1e-3
#: Share of prompts that may differ at temperature 0, near-ties being rare.
DIFFERING = 1 / 16
#: Accepted tokens of the first position without which a comparison would say nothing.
EVIDENCE = 10
#: Probability that any interval of one comparison misses although nothing differs.
FAMILY_ERROR = 0.05


@dataclass(frozen=True)
class Record:
    """Accepted drafted tokens of one prompt.

    Attributes:
        steps: verification steps.
        accepted: [K] steps in which position k and all before it were accepted.
    """

    steps: int
    accepted: tuple[int, ...]


def engine_record(accepted: Sequence[int], length: int, stopped: bool, heads: int) -> Record:
    """Return the record of an engine's response, counted as our decoding counts.

    An engine also counts what it accepted behind the end-of-sequence token that ended a response.

    Args:
        accepted: drafted tokens accepted, per step.
        length: tokens of the response, the first of which came from the prompt alone.
        stopped: whether an end-of-sequence token ended it.
        heads: drafted tokens per step, K.
    """
    counted = list(accepted)
    if stopped and counted:
        before = 1 + sum(count + 1 for count in counted[:-1])
        counted[-1] = min(counted[-1], length - before)
    reached = tuple(sum(count > head for count in counted) for head in range(heads))
    return Record(len(counted), reached)


def total(records: Sequence[Record]) -> Record:
    """Return the sum over prompts."""
    accepted = np.sum([record.accepted for record in records], axis=0)
    return Record(sum(record.steps for record in records), tuple(int(n) for n in accepted))


def tau(record: Record) -> float:
    """Return the mean tokens per verification step, 1 + accepted / steps."""
    return 1 + sum(record.accepted) / record.steps


def wilson(count: int, trials: int, z: float) -> tuple[float, float]:
    """Return the score interval of a proportion (Wilson 1927)."""
    rate, extra = count / trials, z * z / trials
    center = rate + extra / 2
    spread = z * math.sqrt(rate * (1 - rate) / trials + extra / (4 * trials))
    return (center - spread) / (1 + extra), (center + spread) / (1 + extra)


def difference(
    counts: tuple[int, int], trials: tuple[int, int], error: float
) -> tuple[float, float]:
    """Return an interval of a difference of proportions, first minus second (Newcombe 1998, 10).

    Args:
        counts: successes of both.
        trials: trials of both.
        error: probability of missing the true difference.
    """
    z = NormalDist().inv_cdf(1 - error / 2)
    rates = [count / n for count, n in zip(counts, trials, strict=True)]
    (low, high), (other_low, other_high) = (
        wilson(count, n, z) for count, n in zip(counts, trials, strict=True)
    )
    gap = rates[0] - rates[1]
    return (
        gap - math.hypot(rates[0] - low, other_high - rates[1]),
        gap + math.hypot(high - rates[0], rates[1] - other_low),
    )


@dataclass(frozen=True)
class Agreement:
    """Two sides of one comparison.

    Attributes:
        engine: sums over the engine's prompts.
        ours: sums over our prompts.
        intervals: [K] of the difference of acceptance per step, engine minus ours; together they
            hold with 95 %.
        differing: prompts whose records differ; None where both sides sampled.
        passed: whether every interval contains 0, few enough prompts differ, and enough tokens
            were accepted to tell.
    """

    engine: Record
    ours: Record
    intervals: list[tuple[float, float]]
    differing: int | None
    passed: bool


def agreement(engine: Sequence[Record], ours: Sequence[Record], deterministic: bool) -> Agreement:
    """Compare the records of the same prompts, in the same order.

    Args:
        engine: of the serving engine.
        ours: of our own decoding.
        deterministic: whether nothing was sampled.
    """
    sums = total(engine), total(ours)
    trials = (sums[0].steps, sums[1].steps)
    heads = len(sums[0].accepted)
    intervals = [
        difference((a, b), trials, FAMILY_ERROR / heads)
        for a, b in zip(sums[0].accepted, sums[1].accepted, strict=True)
    ]
    within = all(low <= 0 <= high for low, high in intervals)
    within = within and sums[1].accepted[0] >= EVIDENCE
    differing = None
    if deterministic:
        differing = sum(a != b for a, b in zip(engine, ours, strict=True))
        within = within and differing <= DIFFERING * len(engine)
    return Agreement(*sums, intervals, differing, within)


def prediction(rounds: Rounds, taken: Sequence[int], deterministic: bool) -> Prediction:
    """Compare the rounds that an engine took with those computed along its responses.

    Given its response, an engine takes the expected rounds on average over its own chance; so the
    differences of the responses have mean 0, whatever was sampled.

    Args:
        rounds: along the engine's responses.
        taken: rounds that the engine took for each.
        deterministic: whether nothing was sampled.
    """
    counts, expected = np.array(taken), rounds.expected.rounds
    gap = counts - expected
    error = float(np.sqrt((gap**2).sum()))
    differing, narrower = None, None
    if deterministic:
        differing = int((np.abs(gap) > 1e-6).sum())
        passed = differing <= DIFFERING * len(counts)
    else:
        wide, narrow = (
            np.diff(bootstrap_ratio(rounds.tokens, of, 0)).item() for of in (counts, expected)
        )
        narrower = wide / narrow if narrow else None
        passed = abs(gap.sum()) <= 3 * error
    return Prediction(
        tokens=int(rounds.tokens.sum()),
        rounds=float(expected.sum()),
        taken=int(counts.sum()),
        error=error,
        differing=differing,
        narrower=narrower,
        passed=bool(passed),
    )


@dataclass(frozen=True)
class Mismatch:
    """The first token in which a response differs from the one without a draft.

    Attributes:
        prompt: its index.
        position: of the token in the response.
        expected: token without a draft; None where that response ended.
        found: token with it; None where this response ended.
        gap: log-probability of the expected token minus that of the found one; None where the
            found one is not the second best.
    """

    prompt: int
    position: int
    expected: int | None
    found: int | None
    gap: float | None

    @property
    def near_tie(self) -> bool:
        """Whether rounding may have decided."""
        return self.gap is not None and self.gap <= NEAR_TIE


def mismatches(
    found: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    best: Sequence[Sequence[Sequence[tuple[int, float]]]],
) -> list[Mismatch]:
    """Return the first differing token of every response that differs.

    Args:
        found: responses with a draft.
        expected: responses without, to the same prompts.
        best: per expected token, id and log-probability of the most probable ones.
    """
    result = []
    for prompt, (a, b) in enumerate(zip(found, expected, strict=True)):
        if list(a) == list(b):
            continue
        position = next(
            (i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]),
            min(len(a), len(b)),
        )
        wanted, token = (row[position] if position < len(row) else None for row in (b, a))
        gap = None
        if wanted is not None and token is not None:
            # Pairs are lists where they come from a file.
            probable = dict(best[prompt][position])
            gap = probable[wanted] - probable[token] if token in probable else None
        result.append(Mismatch(prompt, position, wanted, token, gap))
    return result
