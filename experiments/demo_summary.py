"""What the demo says of its report: a table and a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean

from experiments.runner import START
from specforge_lk.evaluate.report import HELD_OUT, Paired, Report
from specforge_lk.evaluate.tables import relative_difference
from specforge_lk.markdown import markdown_table

#: Titles of the measurements, by the names that the report has for them.
TITLES = {
    HELD_OUT: "held-out responses",
    "mt_bench": "MT-bench",
    "human_eval": "HumanEval",
}


def measurements(report: Report) -> list[tuple[str, float]]:
    """Return benchmark and temperature of every row, those that losses are trained for first."""
    found = dict.fromkeys((r.benchmark, r.temperature) for r in report.results)
    return sorted(found, key=lambda m: (-m[1], list(TITLES).index(m[0])))


def taus(report: Report, measurement: tuple[str, float], loss: str) -> list[float]:
    """Return τ of every seed."""
    here = (r for r in report.results if (r.benchmark, r.temperature) == measurement)
    found = [r.measured_tau for r in here if r.loss == loss and not r.check]
    return [tau for tau in found if tau is not None]


def _pairs(
    report: Report, measurement: tuple[str, float], loss: str, baseline: str
) -> list[Paired]:
    """Return the paired difference of every seed."""
    return [
        p
        for p in report.paired
        if (p.benchmark, p.temperature) == measurement
        and (p.loss, p.baseline) == (loss, baseline)
        and p.method != "sampled"
    ]


def _gain(report: Report, pairs: Sequence[Paired]) -> str:
    """Return "+0.058 [+0.053, +0.063], +14.1 %"; of several seeds their mean, and each of them."""
    difference = f"{mean(p.difference for p in pairs):+.3f}"
    if len(pairs) == 1:
        spread = "[{:+.3f}, {:+.3f}]".format(*pairs[0].ci)
    else:
        spread = "(" + ", ".join(f"{p.difference:+.3f}" for p in pairs) + ")"
    share = mean(relative_difference(report, p) or 0 for p in pairs)
    return f"{difference} {spread}, {100 * share:+.1f} %"


def _beyond(pairs: Sequence[Paired]) -> bool:
    """Whether every seed gains beyond its 95 % interval."""
    return bool(pairs) and all(p.ci[0] > 0 for p in pairs)


def table(report: Report, losses: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: a row per measurement, a column per draft, `*` at certain gains."""
    baseline = losses[0]
    header = ["", "T", START, baseline, *(f"{loss} − {baseline}" for loss in losses[1:])]
    rows = []
    for measurement in measurements(report):
        row = [TITLES[measurement[0]], f"{measurement[1]:g}"]
        for loss in (START, *losses):
            found = taus(report, measurement, loss)
            pairs = _pairs(report, measurement, loss, baseline)
            cell = f"{mean(found):.3f}" if found else ""
            if pairs and loss != START:
                cell += f": {_gain(report, pairs)}"
                cell += " *" if _beyond(pairs) else ""
            row.append(cell)
        rows.append(row)
    return header, rows


def sentence(report: Report, losses: Sequence[str]) -> str:
    """Say what was gained, by the loss that gains most on held-out responses at T = 1."""
    baseline, hot = losses[0], (HELD_OUT, 1.0)
    gained = {
        loss: mean(p.difference for p in pairs)
        for loss in losses[1:]
        if (pairs := _pairs(report, hot, loss, baseline))
    }
    if not gained:
        return f"Only `{baseline}` was trained: nothing to compare it with."
    best = max(gained, key=gained.__getitem__)
    parts = []
    for measurement in measurements(report):
        pairs = _pairs(report, measurement, best, baseline)
        if measurement[1] == 1 and pairs:
            before, after = (mean(taus(report, measurement, loss)) for loss in (baseline, best))
            share = mean(relative_difference(report, p) or 0 for p in pairs)
            certain = "" if _beyond(pairs) else ", within the interval"
            parts.append(
                f"{before:.3f} → {after:.3f} on {TITLES[measurement[0]]} "
                f"({100 * share:+.0f} % of what a draft adds{certain})"
            )
    cold = _pairs(report, (HELD_OUT, 0.0), best, baseline)
    level = f"; at T = 0 {mean(p.difference for p in cold):+.3f} on held-out responses"
    steps = next((run.steps for run in report.training if run.loss == best), None)
    return (
        f"After the same {steps} steps from the same draft, `{best}` in place of `{baseline}` "
        f"raises τ at T = 1: {'; '.join(parts)}{level if cold else ''}."
    )


def _sizes(report: Report) -> str:
    """Say what was measured on, by measurement."""
    parts = []
    for benchmark, temperature in measurements(report):
        here = (benchmark, temperature)
        (first, *_) = [r for r in report.results if (r.benchmark, r.temperature) == here]
        what = f"{first.responses or first.conversations} held-out responses"
        if benchmark != HELD_OUT:
            what = f"{first.prompts} prompts of {TITLES[benchmark]}"
        parts.append(f"{what} at T = {temperature:g}")
    return ", ".join(parts)


def check(report: Report) -> str | None:
    """Say what was decoded and counted beside what was computed; None where nothing was."""
    for r in report.results:
        if not r.check:
            continue
        exact = next(
            (e for e in report.results if e.key == (*r.key[:-1], "exact")),
            None,
        )
        if exact is None:
            continue
        (counted, bounds), (computed, around) = (
            (of.measured_tau, of.measured_interval) for of in (r, exact)
        )
        if counted is None or bounds is None or computed is None or around is None:
            continue
        # Both intervals are of other responses: errors add up as squares do. Of three standard
        # errors, where an interval has 1.96 to either side, one in 370 sound demos has more.
        width = math.hypot(bounds[1] - bounds[0], around[1] - around[0]) / 2
        verdict = "agree" if abs(counted - computed) <= 3 / 1.96 * width else "DISAGREE"
        return (
            f"Check, `{r.loss}` on {r.prompts} prompts of {TITLES[r.benchmark]} at "
            f"T = {r.temperature:g}: decoded and counted, τ is {counted:.3f} "
            f"[{bounds[0]:.3f}, {bounds[1]:.3f}]; computed along other responses to the same "
            f"prompts, {computed:.3f} [{around[0]:.3f}, {around[1]:.3f}]. They {verdict}."
        )
    return None


def preface(report: Report, losses: Sequence[str]) -> str:
    """Return the table and the sentence as markdown."""
    header, rows = table(report, losses)
    seeds = len({r.seed for r in report.results})
    spread = "in parentheses every seed" if seeds > 1 else "in brackets the 95 % interval"
    return "\n\n".join(
        [
            "τ, and the paired difference to the first loss: "
            f"{spread}; then that difference in percent of τ − 1, what a draft adds to a round. "
            "`*`: a gain beyond the 95 % interval"
            + (" with every seed. " if seeds > 1 else ". ")
            + f"Measured on {_sizes(report)}.",
            markdown_table(header, rows),
            sentence(report, losses),
            *filter(None, [check(report)]),
        ]
    )
