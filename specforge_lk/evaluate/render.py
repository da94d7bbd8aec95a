"""A report for readers: its markdown, and all its files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from specforge_lk.evaluate.chart import render_chart
from specforge_lk.evaluate.report import Report
from specforge_lk.evaluate.tables import (
    gain_rows,
    number,
    paired_rows,
    published_rows,
    result_rows,
    seed_rows,
)
from specforge_lk.files import write_text
from specforge_lk.markdown import markdown_table

_EXPLANATION = (
    "τ is tokens over rounds of decoding (Σ (n - 1) / Σ R), a round being one chain of K drafted "
    "tokens and one verification step. Exact: rounds are the expected ones along responses that "
    "the target itself has sampled, with the acceptance probabilities of every chain that could "
    "begin there. Sampled: decoded and counted. α per head is the acceptance probability of each "
    "draft position, the target distribution p not renormalized, over all chain starts that K "
    "tokens follow; coverage is the target's probability of the draft vocabulary. Intervals are "
    "95 % bootstrap intervals over prompts or conversations."
)
_OVER_SEEDS = (
    "Means over training seeds, with the least and the greatest; α and Δ are those of held-out "
    "responses. Every seed by itself, with its intervals, is below."
)
_PAIRED = (
    "Of τ along the same responses, the bootstrap resampling conversations; where it was sampled, "
    "of the same prompts. In percent, of what the other draft adds to a round, its τ - 1."
)
#: The same of reports that have other estimates of τ.
_OLD_EXPLANATION = (
    "τ is pooled over drafted tokens (K · accepted / drafted + 1) on sampled benchmarks, and "
    "the exact expectation 1 + mean Σ_k Π_{i≤k} α_i over chain starts, teacher-forced, on "
    "held-out responses. α per head is Σ min(p, q), the target distribution p not "
    "renormalized, averaged where the head was reached (benchmarks) or over all chain starts "
    "(held-out); coverage is the target's probability "
    "mass on the draft vocabulary. Intervals are bootstrap intervals over prompts "
    "(conversations)."
)
_OLD_OVER_SEEDS = (
    "Means over training seeds, with the least and the greatest; expected τ, α and Δ are "
    "those of held-out responses. Every seed by itself, with its intervals, is below."
)
_OLD_PAIRED = (
    "Of expected τ over the same chain starts of held-out responses, the bootstrap "
    "resampling conversations; of pooled τ over the same prompts of a benchmark, "
    "resampling prompts. In percent, of what the other draft adds to a step, its τ - 1."
)


def render_markdown(report: Report) -> str:
    """Return the report as markdown."""
    texts = _EXPLANATION, _OVER_SEEDS, _PAIRED
    old = [not r.serving for r in report.results]
    if old and all(old):
        texts = _OLD_EXPLANATION, _OLD_OVER_SEEDS, _OLD_PAIRED
    explanation, over_seeds, about_pairs = texts
    if any(old) and not all(old):
        explanation += f"\n\nWhere `measured` is empty, of an older version: {_OLD_EXPLANATION}"
    results = [explanation, markdown_table(*result_rows(report))]
    if len({r.seed for r in report.results}) > 1:
        summary = [over_seeds, markdown_table(*seed_rows(report))]
        results = [*summary, "## Every measurement", *results]
    parts = [
        "# Acceptance",
        *report.notes,
        *_off_policy(report),
        *([report.preface] if report.preface else []),
        *results,
        *_beside_the_paper(report),
        *_gains(report),
    ]
    if report.paired:
        parts += ["## Paired differences", about_pairs, markdown_table(*paired_rows(report))]
    parts += _training(report)
    if report.stages:
        stages = [[name, number(seconds, 0)] for name, seconds in report.stages.items()]
        parts += ["## Time", markdown_table(["stage", "seconds"], stages)]
    if report.settings:
        parts += ["## Settings", markdown_table(["setting", "value"], _pairs(report.settings))]
    if report.versions:
        parts += ["## Versions", markdown_table(["package", "version"], _pairs(report.versions))]
    if report.command:
        parts += ["## Command", "```\n" + " ".join(report.command) + "\n```"]
    return "\n\n".join(parts) + "\n"


def _off_policy(report: Report) -> list[str]:
    """Return the paragraph on figures that decoding will not meet, if there are any."""
    found = {r.serving: r.off_policy for r in report.results if r.off_policy}
    if not found:
        return []
    rules = "; ".join(f"`{rule}` of responses at {of}" for rule, of in found.items())
    return [
        f"**Off policy**: held-out figures under {rules}. They are not what decoding will meet, "
        "which happens along samples of the rule itself."
    ]


def _beside_the_paper(report: Report) -> list[str]:
    header, rows = published_rows(report)
    if not rows:
        return []
    return [
        "## Beside the paper",
        f"{'τ' if any(r.serving for r in report.results) else 'Sampled τ'} with "
        f"{report.published}, in parentheses that of arXiv 2602.23881: all "
        "prompts of each benchmark, drafts sampled (`probabilistic`), K as given.",
        markdown_table(header, rows),
    ]


def _gains(report: Report) -> list[str]:
    if not report.gains:
        return []
    exact = any(r.serving for r in report.results)
    sources = ", ".join(f"{name}: {target}" for name, target in report.gains.items())
    return [
        "## Gains over KL beside the paper's",
        "In percent, of τ and of τ - 1, what the draft adds to it. The paper's (arXiv "
        f"2602.23881, tables 1 and 2): {sources}. Ours: means over training seeds, with the "
        f"least and the greatest, of {'' if exact else 'expected '}τ on held-out responses and of "
        f"{'' if exact else 'sampled '}τ, the mean of the benchmarks.",
        markdown_table(*gain_rows(report)),
    ]


def _training(report: Report) -> list[str]:
    if not report.training:
        return []
    rows = [
        [f"{run.algorithm} {run.loss}", str(run.seed), str(run.steps), number(run.seconds, 0)]
        for run in report.training
    ]
    commands = "\n".join(run.command for run in report.training)
    table = markdown_table(["draft", "seed", "steps", "seconds"], rows)
    return ["## Training", table, f"```\n{commands}\n```"]


def _pairs(values: dict[str, Any]) -> list[list[str]]:
    return [[name, str(value)] for name, value in values.items()]


def write_all(report: Report, path: Path) -> list[Path]:
    """Write the report as JSON, and markdown and chart beside it; return the files written.

    The chart is called ``acceptance.png`` beside a ``report.json``, and after the report otherwise;
    it is left out where matplotlib (extra ``plots``) is not installed.
    """
    markdown = path.with_suffix(".md")
    chart = path.with_name("acceptance.png" if path.stem == "report" else f"{path.stem}.png")
    report.write(path)
    write_text(markdown, render_markdown(report))
    if importlib.util.find_spec("matplotlib") is None:
        return [path, markdown]
    render_chart(report, chart)
    return [path, markdown, chart]


__all__ = ["render_markdown", "write_all"]
