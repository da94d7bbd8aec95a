"""What an objective gains where a draft is served: vLLM's own counts, beside the exact prediction.

``python -m experiments.gains.served`` trains the drafts of the study that are not there (their
rows stay as they are), lets vLLM answer prompts of the benchmarks with each of them, and compares
the verification steps that it took. At temperature 0 all drafts give the target's response, so
that the steps alone differ; above, every draft samples responses of its own, and the interval is
wider for it. What is served already is not served again.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import typer
from pydantic import BaseModel, ConfigDict

from experiments.assets import prepare
from experiments.gains.plan import BASELINE, PARTS, SAMPLES, Run, features_of
from experiments.gains.results import SEED
from experiments.runner import ROOT, RUNS, capture, console, train
from experiments.serving.cases import DRAFTS, Sampling, ServedDraft
from experiments.serving.check import Check, rule_of
from specforge_lk.decode.draft import load_draft
from specforge_lk.evaluate.intervals import bounds, resampled
from specforge_lk.evaluate.report import versions
from specforge_lk.evaluate.tables import number
from specforge_lk.files import write_text
from specforge_lk.markdown import markdown_table

PATH = Path("experiments/results/gains_served.json")
#: By algorithm, the draft of `make serve-check` that is served in the same way.
LIKE: Final = {
    "eagle3": "eagle3",
    "medusa": "medusa_recipe",
    "mlp_speculator": "mlp_speculator_recipe",
    "mtp": "mtp",
}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Counted(_Model):
    """What vLLM counted with one draft under one rule.

    Attributes:
        objective: that the draft was fine-tuned with.
        rule: the serving rule.
        tokens: [C] tokens that rounds gave to every prompt's response, all but the first.
        rounds: [C] verification steps that they took.
        expected: rounds computed along these responses, their sum.
        error: standard error of ``rounds`` around ``expected``; None where nothing is sampled.
    """

    objective: str
    rule: str
    tokens: list[int]
    rounds: list[int]
    expected: float
    error: float | None

    @property
    def tau(self) -> float:
        """Tokens per verification step."""
        return sum(self.tokens) / sum(self.rounds)


class Served(_Model):
    """The report.

    Attributes:
        settings: of the drafts and of serving.
        versions: of packages here and in vLLM's environment.
        counted: by rule and draft, the baseline first.
    """

    settings: dict[str, str | int]
    versions: dict[str, str]
    counted: list[Counted] = []


def gain(of: Counted, over: Counted) -> tuple[float, list[float] | None]:
    """Return the difference of τ, and its 95 % interval over prompts, which are paired."""
    drawn, other = (
        resampled(np.array(c.tokens, float), np.array(c.rounds, float), SEED) for c in (of, over)
    )
    return of.tau - over.tau, bounds(drawn - other)


def _base(report: Served, rule: str) -> Counted:
    """Return what was counted with the baseline under a rule."""
    return next(c for c in report.counted if (c.objective, c.rule) == (BASELINE, rule))


def in_short(report: Served) -> list[str]:
    """Return a sentence on every draft that is compared with the baseline."""
    said = []
    for counted in report.counted:
        base = _base(report, counted.rule)
        if counted is not base:
            value, ci = gain(counted, base)
            interval = f", τ {value:+.3f} [{ci[0]:+.3f}, {ci[1]:+.3f}]" if ci else ""
            said.append(
                f"`{counted.rule}`: with `{counted.objective}` in place of `{BASELINE}`, vLLM "
                f"takes {sum(counted.rounds)} rounds for {sum(counted.tokens)} tokens in place of "
                f"{sum(base.rounds)} for {sum(base.tokens)}{interval}"
            )
    return said


def table(report: Served) -> str:
    """Return the report in markdown."""
    rows = []
    for counted in report.counted:
        base = _base(report, counted.rule)
        difference = share = ""
        if counted is not base:
            value, ci = gain(counted, base)
            outside = ci is not None and not ci[0] <= 0 <= ci[1]
            shown = f" [{ci[0]:+.4f}, {ci[1]:+.4f}]" if ci else ""
            difference = f"{value:+.4f}{shown}" + (" *" if outside else "")
            share = f"{value / (base.tau - 1):+.1%}"
        expected = f"{counted.expected:.1f}" + (
            f" ± {counted.error:.1f}" if counted.error is not None else ""
        )
        rows.append(
            [
                f"`{counted.rule}`",
                f"`{counted.objective}`",
                str(sum(counted.tokens)),
                str(sum(counted.rounds)),
                expected,
                number(counted.tau, 4),
                difference,
                share,
            ]
        )
    header = [
        "rule",
        "objective",
        "tokens",
        "rounds that vLLM took",
        "computed along its responses",
    ]
    header += ["τ counted", f"over `{BASELINE}` [95 %]", "of τ − 1"]
    said = ", ".join(f"{name}: {value}" for name, value in report.settings.items())
    return (
        "# What fine-tuning gains in vLLM\n\n"
        "Written by `python -m experiments.gains.served`. Rounds are verification steps; computed "
        "are those that decoding takes on average along vLLM's own responses. Intervals are over "
        "prompts, paired; `*`: they do not hold 0.\n\n"
        f"{said}.\n\n{markdown_table(header, rows)}\n"
    )


def main(
    engine: Annotated[Path, typer.Option(help="Python of the environment that has vLLM.")] = Path(
        ".venv-vllm/bin/python"
    ),
    architecture: Annotated[str, typer.Option(help=f"One of {', '.join(LIKE)}.")] = "eagle3",
    objectives: Annotated[str, typer.Option(help="To compare with kl.")] = "tv",
    seed: Annotated[int, typer.Option(help="Of training.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Of fine-tuning.")] = 36,
    start_steps: Annotated[int, typer.Option(min=1, help="Of the KL draft before.")] = 144,
    samples: Annotated[int, typer.Option(min=1, help="Responses to train on.")] = SAMPLES,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each benchmark.")] = 40,
    new_tokens: Annotated[int, typer.Option(min=2, help="Longest response.")] = 64,
    path: Annotated[
        Path, typer.Option("--results", help="The report; a .md goes beside it.")
    ] = PATH,
) -> None:
    """Count in vLLM what fine-tuning a KL draft on another objective gains."""
    path = path.resolve()
    os.chdir(ROOT)
    began = time.monotonic()
    if architecture not in LIKE:
        raise typer.BadParameter(f"{architecture!r}: name one of {', '.join(LIKE)}")
    known = PARTS["fine-tune"].objectives
    names = list(dict.fromkeys([BASELINE, *objectives.split()]))
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"{' '.join(unknown)}: name some of {', '.join(known)}")
    runs = [Run(architecture, name, seed, samples, steps, start_steps) for name in names]
    assets = prepare(RUNS)
    check = Check(assets, engine, prompts, new_tokens)
    cores = len(os.sched_getaffinity(0))
    for (features, mapping), config in features_of(runs).items():
        capture(
            config, features, mapping, "training.loss=lk_lambda", threads=cores, samples=samples
        )
    train([run.start.training for run in runs[:1] if run.start], cores)
    train([run.training for run in runs], cores)

    report = Served(
        settings={
            "draft": f"{architecture}, {steps} steps after {start_steps} of KL, seed {seed}",
            "prompts": f"{prompts} each of {' and '.join(assets.benchmarks)}",
            "new tokens": new_tokens,
        },
        versions=versions() | check.engine_versions,
    )
    for temperature, sampling in _rules(architecture):
        for run in runs:
            draft = _served(run)
            console.print(f"[bold]{run.training.name}[/], T = {temperature:g}, {sampling} drafting")
            report.counted.append(count(check, run.objective, draft, temperature, sampling))
    write_text(path, report.model_dump_json(indent=1) + "\n")
    write_text(path.with_suffix(".md"), table(report))
    console.print(table(report), markup=False)
    console.print(f"[bold green]done[/] in {(time.monotonic() - began) / 60:.0f} minutes")


def count(
    check: Check, objective: str, draft: ServedDraft, temperature: float, sampling: Sampling
) -> Counted:
    """Serve the prompts with a draft, and compute the rounds of the responses."""
    responses = check.serve(draft, temperature, sampling)["responses"]
    rule = rule_of(temperature, sampling)
    predicted = check.predict(load_draft(draft.decoded, check.target), rule, responses)
    return Counted(
        objective=objective,
        rule=str(rule),
        tokens=[len(r["tokens"]) - 1 for r in responses],
        rounds=[len(r["accepted"]) for r in responses],
        expected=predicted.rounds,
        error=predicted.error if predicted.narrower is not None else None,
    )


def _rules(architecture: str) -> list[tuple[float, Sampling]]:
    """Return temperature 0, and temperature 1 as vLLM drafts for it."""
    runs = next(d for d in DRAFTS if d.name == LIKE[architecture]).runs
    hot = [run for run in runs if run[0] > 0]
    return [(0.0, "greedy"), hot[0]]


def _served(run: Run) -> ServedDraft:
    """Return what vLLM is given of a run's draft."""
    like = next(d for d in DRAFTS if d.name == LIKE[run.architecture])
    home = RUNS / "gains" / "served" / f"{run.architecture}-{run.objective}-{run.steps}"
    draft = replace(like, parent=home, given=run.training.draft)
    draft.write_served()
    return draft


if __name__ == "__main__":
    typer.run(main)
