"""The chart of a report."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from specforge_lk.evaluate import published
from specforge_lk.evaluate.report import HELD_OUT, Paired, Report, Result
from specforge_lk.evaluate.tables import drafting_of, mean_alphas, name_of, rule_of
from specforge_lk.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: By group of bars and label, for every seed the value and its interval.
Bars = dict[tuple[str, str], list[tuple[float, list[float]]]]


def render_chart(report: Report, path: Path) -> None:
    """Draw a row per algorithm: α per draft position, τ on benchmarks, and paired differences.

    Values are means over training seeds; error bars are 95 % intervals of a single seed, or span
    all seeds where there are several.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    algorithms = list(dict.fromkeys(r.algorithm for r in report.results))
    drafts: list[Result | Paired] = [*report.results, *report.paired]
    labels = list(dict.fromkeys(_label(r, report) for r in drafts))
    colors = {label: f"C{index}" for index, label in enumerate(labels)}
    groups = len({(p.benchmark, p.temperature) for p in report.paired})
    widths = [1, 1.4, *([max(1, 0.25 * groups)] if groups else [])]
    rows = max(1, len(algorithms))
    figure = Figure(figsize=(4.6 * sum(widths), 1.2 + 3 * rows), layout="constrained")
    grid = figure.subplots(rows, len(widths), width_ratios=widths, squeeze=False)
    for axes, algorithm in zip(grid, algorithms, strict=False):
        results = [r for r in report.results if r.algorithm == algorithm]
        _draw_alpha(axes[0], algorithm, results, report, colors)
        _draw_tau(axes[1], results, report, colors)
        if report.paired:
            _draw_differences(axes[2], algorithm, report, colors)
    if labels:
        handles = [Patch(color=colors[label], label=label) for label in labels]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(labels)))
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix.removeprefix("."))


def _label(of: Result | Paired, report: Report) -> str:
    """Return a draft's name within its algorithm's charts: what tells it from the others."""
    rules = {(drafting_of(r), rule_of(r)) for r in report.results}
    return (
        " ".join(filter(None, (of.loss, drafting_of(of), rule_of(of))))
        if len(rules) > 1
        else of.loss
    )


def _draw_alpha(
    axes: Axes, algorithm: str, results: list[Result], report: Report, colors: dict[str, str]
) -> None:
    held_out = [r for r in results if r.benchmark == HELD_OUT]
    hottest = max((r.temperature for r in held_out), default=1.0)
    seeds: dict[str, list[Result]] = {}
    for r in held_out:
        if r.temperature == hottest:
            seeds.setdefault(_label(r, report), []).append(r)
    for label, same in seeds.items():
        alphas = [math.nan if alpha is None else alpha for alpha in mean_alphas(same)]
        positions = range(1, len(alphas) + 1)
        axes.plot(positions, alphas, "o-", color=colors[label])
        axes.set_xticks(list(positions))
    axes.set(title=f"{algorithm}: held-out responses, T = {hottest:g}")
    axes.set(xlabel="head", ylabel="exact α")


def _draw_tau(axes: Axes, results: list[Result], report: Report, colors: dict[str, str]) -> None:
    seeds: Bars = {}
    for r in results:
        tau, interval = r.measured_tau, r.measured_interval
        if r.benchmark != HELD_OUT and not r.check and tau is not None and interval is not None:
            group = f"{r.benchmark}\nT = {r.temperature:g}"
            key = (group, _label(r, report))
            seeds.setdefault(key, []).append((tau, interval))
    draw_bars(axes, seeds, colors)
    axes.set(title="Speculative decoding", ylabel="τ (tokens per target step)")
    # τ = 1 is decoding without a draft.
    axes.set_ylim(1, max(1.01, axes.get_ylim()[1]))


def _draw_differences(axes: Axes, algorithm: str, report: Report, colors: dict[str, str]) -> None:
    paired = [p for p in report.paired if p.algorithm == algorithm]
    if not paired:
        axes.set_visible(False)
        return
    # Every draft is compared with all before it: the chart shows what is gained over KL, or else
    # over the first of them.
    baselines = list(dict.fromkeys(p.baseline for p in paired))
    baseline = published.GAIN_BASELINE if published.GAIN_BASELINE in baselines else baselines[0]
    seeds: Bars = {}
    for p in paired:
        if p.baseline == baseline and p.method != "sampled":
            group = f"{name_of(p)}\nT = {p.temperature:g}"
            key = (group, _label(p, report))
            seeds.setdefault(key, []).append((p.difference, p.ci))
    draw_bars(axes, seeds, colors)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(title=f"Paired differences to {baseline}", ylabel="Δ τ")


def draw_bars(axes: Axes, seeds: Bars, colors: dict[str, str]) -> None:
    """Draw the mean over seeds as bars, with its interval or the span of the seeds.

    Args:
        axes: where.
        seeds: see `Bars`.
        colors: by label, in the order of a group's bars.
    """
    groups = list(dict.fromkeys(group for group, _ in seeds))
    labels = [label for label in colors if any(label == known for _, known in seeds)]
    width = 0.8 / max(1, len(labels))
    for (group, label), values in seeds.items():
        x = groups.index(group) + (labels.index(label) - (len(labels) - 1) / 2) * width
        center = mean(value for value, _ in values)
        ends = values[0][1] if len(values) == 1 else [value for value, _ in values]
        # A percentile interval need not contain the estimate; a drawn error cannot be negative.
        error = [[max(0, center - min(ends))], [max(0, max(ends) - center)]]
        axes.bar(x, center, width, color=colors[label], yerr=error, capsize=2)
    axes.set_xticks(range(len(groups)), groups)


__all__ = ["Bars", "draw_bars", "render_chart"]
