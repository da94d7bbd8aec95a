"""What `make serve-check` found: one schema, drawn as a table on the terminal and as markdown."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.table import Table

from specforge_lk.files import write_text
from specforge_lk.markdown import markdown_table


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Side(_Strict):
    """One side's sums over all prompts.

    Attributes:
        cycles: verification steps.
        accepted: [K] steps that accepted draft position k and all before it.
        tau: mean tokens emitted per verification step.
    """

    cycles: int
    accepted: list[int]
    tau: float


class FirstDifference(_Strict):
    """The first token in which a greedy response differs from the target's own."""

    prompt: int
    position: int
    expected: int | None
    found: int | None
    gap: float | None
    near_tie: bool


class Prediction(_Strict):
    """Rounds computed along the engine's own responses, beside those that it took.

    Attributes:
        tokens: tokens of the responses behind the first of each.
        rounds: expected rounds.
        taken: rounds that the engine took.
        error: standard error of ``taken - rounds``, from the responses' own differences.
        differing: responses whose counts differ; None where tokens were sampled.
        narrower: how much narrower the 95 % interval of τ is than from the engine's counts on the
            same responses; None where nothing was sampled, or the computed rounds are all alike.
        passed: at temperature 0 no more differ than near-ties explain; else the difference is
            within three standard errors.
    """

    tokens: int
    rounds: float
    taken: int
    error: float
    differing: int | None
    narrower: float | None
    passed: bool


class Comparison(_Strict):
    """One engine run against our own decoding.

    ``intervals`` are of the difference of acceptance per step, engine minus ours (Newcombe's score
    intervals, together 95 %). ``differing`` counts prompts whose records differ; ``same_output``
    counts responses equal to the target's own without a draft. Both are null where tokens were
    sampled. ``algorithm`` is null where it is the draft's name.
    """

    draft: str
    algorithm: str | None = None
    temperature: float
    drafting: str
    prompts: int
    engine: Side
    ours: Side
    intervals: list[tuple[float, float]]
    differing: int | None
    same_output: int | None
    first_differences: list[FirstDifference] = []
    counters: dict[str, Any]
    counters_agree: bool
    speculative_config: dict[str, Any]
    options: dict[str, Any]
    prediction: Prediction | None = None
    passed: bool


class Speculator(_Strict):
    """The MLP speculator in vLLM's class; errors are of logits, relative to their spread."""

    draft: str
    refusal: str | None
    exported: int
    missing: list[str]
    unknown: list[str]
    error: float
    rows: int
    passed: bool


class ServedResponses(_Strict):
    """Responses of `specforge-lk generate --server` from vLLM's OpenAI server.

    Attributes:
        prompts: prompts asked.
        client_killed_at: responses in the file when the client was killed.
        server_killed_at: responses in the file when the server was killed.
        responses: responses in the file at the end.
        tokens: tokens of these.
        with_ids: responses whose sampled token ids the server returned.
        sampled_again: responses with the tokens that the server samples for prompt and seed when
            it is asked again.
        captured: samples of `specforge-lk capture` with the server's tokens of prompt and response,
            the latter supervised.
        passed: whether each prompt has one response, and all of this holds for all of them, but
            for near-ties.
    """

    prompts: int
    client_killed_at: int
    server_killed_at: int
    responses: int
    tokens: int
    with_ids: int
    sampled_again: int
    captured: int
    passed: bool


class ServingReport(_Strict):
    """Everything the check found."""

    settings: dict[str, Any]
    versions: dict[str, str]
    training: dict[str, dict[str, Any]]
    notes: list[str] = []
    comparisons: list[Comparison] = []
    speculator: Speculator | None = None
    server: ServedResponses | None = None

    @property
    def passed(self) -> bool:
        """Whether every part of the check passed."""
        parts = [*self.comparisons, self.speculator, self.server]
        return all(part.passed for part in parts if part is not None)


def continued(report: ServingReport, path: Path) -> ServingReport:
    """Return ``report`` with what the one at ``path`` says of other drafts at these settings."""
    if not path.exists():
        return report
    try:
        old = ServingReport.model_validate_json(path.read_text())
    except ValidationError:
        return report
    if (old.settings, old.versions) != (report.settings, report.versions):
        return report
    kept = [c for c in old.comparisons if c.draft not in report.training]
    return report.model_copy(
        update={
            "training": old.training | report.training,
            "comparisons": kept + report.comparisons,
            "speculator": report.speculator or old.speculator,
            "server": report.server or old.server,
        }
    )


HEADER = (
    "draft",
    "T",
    "drafting",
    "output = target's",
    "steps",
    "accepted per position",
    "the same, ours",
    "prompts that differ",
    "interval of the difference, position 1",
    "rounds: computed, vLLM's",
    "τ is how much narrower",
    "",
)


def rows(report: ServingReport) -> list[tuple[str, ...]]:
    """Return a row per comparison."""
    return [
        (
            c.draft,
            f"{c.temperature:g}",
            c.drafting,
            "–" if c.same_output is None else f"{c.same_output} of {c.prompts}",
            f"{c.engine.cycles}, ours {c.ours.cycles}",
            _per_step(c.engine),
            _per_step(c.ours),
            "–" if c.differing is None else f"{c.differing} of {c.prompts}",
            f"[{c.intervals[0][0]:+.3f}, {c.intervals[0][1]:+.3f}]",
            *_predicted(c.prediction),
            "ok" if c.passed else "FAILED",
        )
        for c in report.comparisons
    ]


def _predicted(found: Prediction | None) -> tuple[str, str]:
    if found is None:
        return "–", "–"
    if found.differing is not None:
        return f"{found.rounds:.0f}, {found.taken}; {found.differing} responses differ", "–"
    narrower = "–" if found.narrower is None else f"{found.narrower:.2f}"
    return f"{found.rounds:.1f}, {found.taken} ± {found.error:.1f}", narrower


def _per_step(side: Side) -> str:
    return " / ".join(f"{count / side.cycles:.3f}" for count in side.accepted)


def speculator_lines(found: Speculator) -> list[str]:
    """Return the MLP speculator's part as sentences."""
    verdict = "ok" if found.passed else "FAILED"
    refused = f"refuses to serve it: “{found.refusal.strip()}”" if found.refusal else "accepts it"
    return [
        f"MLP speculator: vLLM {refused}. Its class loads {found.exported} exported tensors, "
        f"{len(found.missing)} parameters missing, {len(found.unknown)} tensors unknown; logits of "
        f"{found.rows} chains differ from ours by at most {found.error:.1e} of their spread: "
        f"{verdict}."
    ]


def server_lines(found: ServedResponses) -> list[str]:
    """Return the responses of vLLM's server as sentences."""
    verdict = "ok" if found.passed else "FAILED"
    return [
        f"`specforge-lk generate --server` with vLLM's OpenAI server, {found.prompts} prompts: the "
        f"client was killed at {found.client_killed_at} responses, the server at "
        f"{found.server_killed_at}; the file has {found.responses}, {found.with_ids} with token "
        f"ids ({found.tokens} tokens). Asked again with the same seeds, the server samples the "
        f"tokens of {found.sampled_again} of them. `specforge-lk capture` has the server's tokens "
        f"of prompt and response in {found.captured} samples: {verdict}."
    ]


def show(report: ServingReport, console: Console) -> None:
    """Print the tables."""
    if not console.is_terminal:
        console = Console(width=200, highlight=False)
    table = Table(*HEADER, title="Served by vLLM, and decoded here")
    for row in rows(report):
        table.add_row(*row)
    console.print(table)
    for c in report.comparisons:
        for d in c.first_differences:
            console.print(_difference(c, d))
    for line in _sentences(report):
        console.print(line)


def _sentences(report: ServingReport) -> list[str]:
    lines = speculator_lines(report.speculator) if report.speculator else []
    return [*lines, *(["", *server_lines(report.server)] if report.server else [])]


def _difference(c: Comparison, d: FirstDifference) -> str:
    gap = "not its second choice" if d.gap is None else f"log-probability gap {d.gap:.2g}"
    return (
        f"{c.draft}, T = {c.temperature:g}: prompt {d.prompt} differs from token {d.position} on, "
        f"{d.found} for {d.expected}, {gap}{', a near-tie' if d.near_tie else ''}"
    )


def markdown(report: ServingReport) -> str:
    """Return the report as markdown."""
    lines = ["# Drafts served by vLLM", ""]
    lines += [line for note in report.notes for line in (note, "")]
    lines += [
        "Made by `make serve-check`. Accepted per position: share of the steps that accepted it "
        "and all before it, as vLLM counts. At T = 0 both sides must take the same decisions, "
        "prompt by prompt; at T = 1 both sample, and the intervals of the difference (engine minus "
        "ours; score intervals, 95 % together over the positions) must contain 0. The rounds that "
        "vLLM took are compared with those computed along its own responses, with the standard "
        "error of the difference; the last figure is how much narrower the interval of τ is by "
        "computing than by counting.",
        "",
    ]
    lines += [markdown_table(HEADER, rows(report), tight=True), ""]
    lines += [f"- {_difference(c, d)}" for c in report.comparisons for d in c.first_differences]
    lines += ["", *_sentences(report)]
    made = [
        (name, f"`{t.get('command', t.get('draft'))}`", str(t.get("steps", "given")))
        for name, t in report.training.items()
    ]
    lines += ["", markdown_table(("draft", "made by", "steps"), made, tight=True)]
    pairs = [(name, str(value)) for name, value in (report.settings | report.versions).items()]
    lines += ["", markdown_table(("setting", ""), pairs, tight=True)]
    return "\n".join(lines) + "\n"


def write(report: ServingReport, path: Path) -> list[Path]:
    """Write ``path`` (.json) and its markdown beside it."""
    drawn = path.with_suffix(".md")
    write_text(path, report.model_dump_json(indent=2) + os.linesep)
    write_text(drawn, markdown(report))
    return [path, drawn]
