"""Paired differences between the drafts of a report."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from specforge_lk.evaluate.report import Difference, Paired, Report, Result
from specforge_lk.evaluate.rounds import Rounds, paired_differences
from specforge_lk.evaluate.sampled import Decoded, paired_decoded_difference


def compare(
    report: Report,
    folder: Path,
    order: Sequence[tuple[str, str, int]],
    benchmarks: Sequence[str],
    rules: Sequence[str],
    seed: int,
) -> None:
    """Compare every draft with every earlier one of its algorithm and training seed.

    Pairs with other drafts, and those of other benchmarks and rules, stay as they are.

    Args:
        report: what was measured; its pairs are changed.
        folder: where the report is, which its arrays lie beside.
        order: algorithm, loss and training seed of the drafts.
        benchmarks: names of what was measured.
        rules: serving rules, as text.
        seed: of the bootstrap.
    """

    def measured_here(of: Paired | Result, loss: str) -> bool:
        return (
            of.benchmark in benchmarks
            and of.serving in rules
            and (of.algorithm, loss, of.seed) in order
        )

    report.paired = [
        p for p in report.paired if not (measured_here(p, p.loss) and measured_here(p, p.baseline))
    ]
    measured = [r for r in report.results if r.arrays and measured_here(r, r.loss)]
    measured.sort(key=lambda r: order.index((r.algorithm, r.loss, r.seed)))
    measured.sort(key=lambda r: (benchmarks.index(r.benchmark), rules.index(r.serving or "")))
    same = ("algorithm", "seed", "benchmark", "serving", "method")
    for baseline, result in combinations(measured, 2):
        if all(getattr(baseline, name) == getattr(result, name) for name in same):
            pair = _paired(folder, result, baseline, seed)
            report.paired += [pair] if pair else []


def _paired(folder: Path, result: Result, baseline: Result, seed: int) -> Paired | None:
    """Compare two results, from the arrays of both; None where one conversation is all there is."""
    files = [folder / str(r.arrays) for r in (result, baseline)]
    size: dict[str, int]
    others: dict[str, Difference] = {}
    difference: float | None
    interval: list[float] | None
    if result.method == "exact":
        a, b = map(Rounds.load, files)
        found = paired_differences(a, b, seed)
        (difference,), (interval,) = found["tau_rounds"].value, found["tau_rounds"].ci
        others = {
            name: Difference(difference=of.value, ci=of.ci)
            for name, of in found.items()
            if name != "tau_rounds"
        }
        size = a.size
    else:
        c, d = map(Decoded.load, files)
        difference, interval = paired_decoded_difference(c, d, seed)
        size = c.size
    if difference is None or interval is None:
        return None
    return Paired(
        others=others,
        benchmark=result.benchmark,
        algorithm=result.algorithm,
        seed=result.seed,
        temperature=result.temperature,
        draft_sampling=result.draft_sampling,
        serving=result.serving,
        method=result.method,
        off_policy=result.off_policy,
        loss=result.loss,
        baseline=baseline.loss,
        difference=difference,
        ci=interval,
        **size,
    )


__all__ = ["compare"]
