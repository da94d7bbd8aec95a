"""What losses gain over KL, and what they cost: the README's table, and the demo's.

`tools.pages` writes these blocks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any, Final

from experiments.demo_summary import TITLES, measurements, preface, sentence, taus
from experiments.gains.report import Setting, best_of, summary
from experiments.gains.results import PATH, Results
from experiments.gains.served import PATH as SERVED_PATH
from experiments.gains.served import Served, in_short
from experiments.runner import START
from specforge_lk.evaluate.published import GAIN_BASELINE, PUBLISHED
from specforge_lk.evaluate.report import Report, read_report
from specforge_lk.markdown import markdown_table

ROOT: Final = Path(__file__).resolve().parents[1]

#: The drafts that the paper's table 2 has for its six targets, one for each of them.
_SIX_TARGETS: Final = ("eagle3", "mtp")
_NOT_YET: Final = "Not measured yet."


def bench_summary() -> Mapping[str, Any]:
    """Return the summary of `make bench`."""
    return json.loads((ROOT / "benchmarks" / "results" / "summary.json").read_text())


def bench_target(name: str) -> Mapping[str, Any]:
    """Return what the summary says of one bound."""
    return next(target for target in bench_summary()["targets"] if target["name"] == name)


def _demo() -> tuple[Report, list[str]] | None:
    """The demo's report and its losses, baseline first; None if it is of an earlier demo."""
    report = read_report(ROOT / "experiments" / "results" / "demo.json")
    drafts = list(dict.fromkeys(run.loss for run in report.training))
    return (report, [loss for loss in drafts if loss != START]) if START in drafts else None


def demo() -> str:
    """What `make demo` measured, every measurement."""
    found = _demo()
    return preface(*found) if found else _NOT_YET


def study() -> str:
    """What `make gains` measured, in short: the objective that gains most over KL, by start."""
    return summary(Results.read(ROOT / PATH)) or _NOT_YET


def fine_tuning() -> str:
    """What fine-tuning gained in the demo, in a sentence."""
    found = _demo()
    return sentence(*found) if found else _NOT_YET


def _paper_gains(temperature: float) -> str:
    """Return the least and the greatest gain of mean τ over the paper's six targets."""
    gains = [
        100 * (drafts[name, "lk_lambda"][temperature].mean / kl[temperature].mean - 1)
        for drafts in PUBLISHED.values()
        for name in _SIX_TARGETS
        if (kl := drafts.get((name, GAIN_BASELINE)))
    ]
    return f"+{min(gains):.1f} to +{max(gains):.1f} % at T = {temperature:g}"


def _demo_taus(report: Report, losses: Sequence[str], temperature: float) -> list[str]:
    """Return a row of the table: mean τ over the training seeds, on every benchmark."""
    names = [f"`{loss}`{_options(report, loss)}" for loss in losses]
    parts = []
    for benchmark, t in measurements(report):
        if t == temperature:
            before, *after = (f"{mean(taus(report, (benchmark, t), loss)):.3f}" for loss in losses)
            parts.append(f"{TITLES[benchmark]} {before} → {', '.join(after)}")
    return [
        f"τ, a small EAGLE-3 draft, T = {temperature:g}: {names[0]} → {', '.join(names[1:])}",
        "; ".join(parts),
        "`make demo`, on a CPU",
    ]


def _study_rows() -> list[list[str]]:
    """Return rows of the table, one per part of the study: what gains most at T = 1.

    The size that most architectures have comes first.
    """
    rows = []
    found = [best for best in best_of(Results.read(ROOT / PATH)) if best.hot.share is not None]
    for _, of in groupby(found, lambda best: best.setting.part):
        sizes: dict[str, list[str]] = {}
        for best in of:
            cold = best.cold.share if best.cold else None
            sizes.setdefault(_size(best.setting), []).append(
                f"{best.setting.architecture} {best.title} {best.hot.share:+.0%}"
                + (f" ({cold:+.0%})" if cold is not None else "")
            )
        (first, gains), *others = sorted(sizes.items(), key=lambda size: -len(size[1]))
        cell = "; ".join([*gains, *(f"{size}: {', '.join(more)}" for size, more in others)])
        title = f"gain of τ − 1, {first}: best at T = 1 (T = 0)"
        rows.append([title, cell, "`make gains`, on a CPU"])
    return rows


def served() -> str:
    """What vLLM counted with fine-tuned drafts, a sentence per rule."""
    path = ROOT / SERVED_PATH
    if not path.exists():
        return _NOT_YET
    return "\n".join(
        f"- {line}." for line in in_short(Served.model_validate_json(path.read_text()))
    )


def _size(setting: Setting) -> str:
    after = f" after {setting.start_steps} of KL" if setting.start_steps else " from scratch"
    return f"{setting.steps} steps{after}"


def _options(report: Report, loss: str) -> str:
    """Return the options that a loss was trained with, as " (eta = 10)"."""
    found = {
        f"{name} = {value}": None
        for run in report.training
        if run.loss == loss
        for name, value in re.findall(r"training\.loss_options\.(\w+)=(\S+)", run.command)
    }
    return f" ({', '.join(found)})" if found else ""


def gains() -> str:
    """The README's table: what the losses gain over KL, and what they cost."""
    found = _demo()
    here = [["τ, a small EAGLE-3 draft", _NOT_YET, "`make demo`, on a CPU"]]
    if found:
        here = [_demo_taus(*found, 1.0)]
    here += _study_rows()
    time, memory, eager, inductor = (
        bench_target(f"lk_lambda over {what}")["median"]
        for what in (
            *("kl, time", "kl, memory"),
            *("specforge kl, time", "specforge kl, inductor, time"),
        )
    )
    return markdown_table(
        ["", "in place of KL", "measured by"],
        [
            [
                "gain in percent of τ, EAGLE-3 and MTP, six targets of 8B to 685B",
                f"`lk_lambda`: {_paper_gains(1)}, {_paper_gains(0)}",
                "the paper, on GPUs",
            ],
            *here,
            [
                "cost of the loss, medians",
                f"`lk_lambda`: time {time:.2f} ×, memory {memory:.2f} × ours of KL; time "
                f"{eager:.2f} × SpecForge's KL, eager, {inductor:.2f} × through inductor",
                "`make bench`, on a CPU",
            ],
        ],
    )
