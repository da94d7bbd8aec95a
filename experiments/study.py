"""What the studies share: features, training and evaluation of drafts of SmolLM2-135M-Instruct.

One budget for every draft of an algorithm: the same responses, epochs, batch and learning rate.
Everything is kept under ``runs/study``; an interrupted study continues where it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.demo import HELD_OUT, RESPONSES, SAMPLES
from experiments.runner import RUNS, Training, console, execute, record, train
from specforge_lk.evaluate.report import Result, read_report, write_all

STUDY = RUNS / "study"
HEADS = 4
#: Samples per optimizer step.
BATCH = 2
PROMPTS = 16
#: Held-out responses to measure exactly; the draws of the bootstrap are whole conversations.
CONVERSATIONS = 64


def capture(first: Training, cores: int) -> None:
    """Capture features; with a loss set, for DFlash and Domino then need the target's states."""
    mapping = ["--vocab-mapping", first.vocab_mapping] if first.vocab_mapping else []
    execute(
        *("specforge-lk", "capture", "--config", first.config_path, "--responses", RESPONSES),
        *("--limit", SAMPLES, "--out", first.features, *mapping, "training.loss=lk_lambda"),
        threads=cores,
    )


def train_and_evaluate(
    trainings: Sequence[Training],
    target: Path,
    benchmarks: Mapping[str, object],
    report: Path,
    *,
    new_tokens: int,
    cores: int,
) -> None:
    """Train drafts of one algorithm, measure them at T = 0 and 1, and add them to ``report``."""
    train(trainings, cores)
    execute(
        *("specforge-lk", "eval", "--target", target, "--out", report),
        *(f"--draft={run.loss}@{run.seed}={run.draft}" for run in trainings),
        *(f"--benchmark={name}={source}" for name, source in benchmarks.items()),
        *("--held-out", HELD_OUT, "--held-out-limit", CONVERSATIONS),
        *("--temperature", 0, "--temperature", 1, "--heads", HEADS, "--limit", PROMPTS),
        *("--max-new-tokens", new_tokens, "--max-length", 512),
        threads=cores,
    )
    # Whatever the report held before stays in it.
    record(report, trainings)


def publish(
    report: Path, path: Path, command: Sequence[str], gains: Mapping[str, str] | None = None
) -> None:
    """Write the report, its tables and its chart at ``path``, without the arrays.

    Of a study that is under way, what every draft of an algorithm has been measured on: means over
    some of them compare nothing. ``gains`` names by algorithm the target whose gains in the paper
    to put beside these.
    """
    content = read_report(report)
    drafts: dict[str, set[tuple]] = {}
    measured: dict[tuple, set[tuple]] = {}
    for r in content.results:
        drafts.setdefault(r.algorithm, set()).add((r.loss, r.seed))
        measured.setdefault(_measurement(r), set()).add((r.loss, r.seed))
    partial = {cell for cell, done in measured.items() if done != drafts[cell[0]]}
    for algorithm, benchmark, temperature in sorted(partial):
        console.print(f"left out: {algorithm} on {benchmark}, T = {temperature:g}: not all drafts")
    content.results = [r for r in content.results if _measurement(r) not in partial]
    # Every algorithm was evaluated by a command of its own: this one makes them all.
    content.command = list(command)
    content.gains = {name: target for name, target in (gains or {}).items() if name in drafts}
    for written in write_all(content, path):
        console.print(f"  {written}")


def _measurement(result: Result) -> tuple[str, str, float]:
    return result.algorithm, result.benchmark, result.temperature
