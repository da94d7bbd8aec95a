"""``make serve-check``: train short drafts, let vLLM serve them, and compare with our decoding.

Everything is kept under ``runs/serving``; an interrupted check continues where it was.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from experiments.assets import prepare
from experiments.runner import CONFIGS, ROOT, RUNS, capture, console, fail, train
from experiments.serving.cases import DRAFTS, FEATURES, HEADS, SERVING, ServedDraft
from experiments.serving.check import Check
from experiments.serving.report import ServingReport, continued, show, write
from experiments.serving.server import check as served_responses
from specforge_lk.evaluate.report import versions

NAMES = [draft.name for draft in DRAFTS]


def main(
    engine: Annotated[Path, typer.Option(help="Python of the environment that has vLLM.")] = Path(
        ".venv-vllm/bin/python"
    ),
    drafts: Annotated[str, typer.Option(help="Drafts to check.")] = " ".join(NAMES),
    given: Annotated[
        list[str] | None,
        typer.Option(help="NAME=DIR: check this exported draft instead of training one."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each benchmark.")] = 16,
    new_tokens: Annotated[int, typer.Option(min=2, help="Longest response.")] = 48,
    server: Annotated[
        bool, typer.Option(help="Sample responses from vLLM's OpenAI server, too.")
    ] = True,
    publish: Annotated[
        Path | None, typer.Option(help="Also write the report here: a .json, .md beside it.")
    ] = None,
) -> None:
    """Check that exported drafts load and serve in vLLM as they decode here."""
    os.chdir(ROOT)
    began = time.monotonic()
    cores = len(os.sched_getaffinity(0))
    known = {draft.name: draft for draft in DRAFTS}
    if unknown := set(drafts.split()) - set(known):
        raise typer.BadParameter(
            f"{' '.join(sorted(unknown))}: name drafts of {', '.join(known)}",
            param_hint="--drafts",
        )
    paths = {}
    for value in given or []:
        name, equals, folder = value.partition("=")
        if not equals or not Path(folder, "config.json").is_file():
            raise typer.BadParameter(
                f"{value}: NAME=DIR, where DIR holds config.json of an exported draft",
                param_hint="--given",
            )
        paths[name] = folder
    if unknown := set(paths) - set(drafts.split()):
        raise typer.BadParameter(
            f"{' '.join(sorted(unknown))}: not among --drafts", param_hint="--given"
        )
    chosen = [
        replace(known[name], given=Path(paths[name]) if name in paths else None)
        for name in drafts.split()
    ]

    assets = prepare(RUNS)
    _train(chosen, cores)
    check = Check(assets, engine, prompts, new_tokens)
    report = ServingReport(
        settings={
            "target": str(assets.target),
            "prompts": f"{prompts} each of {' and '.join(assets.benchmarks)}",
            "new tokens": new_tokens,
            "drafted tokens per step": HEADS,
            "dtype": "float32",
        },
        versions=versions() | check.engine_versions,
        training={
            draft.name: {"draft": str(draft.given)}
            if draft.given
            else {"command": shlex.join(draft.command), "steps": draft.steps}
            for draft in chosen
        },
    )
    path = SERVING / "report.json"
    for draft in chosen:
        for temperature, sampling in draft.runs:
            console.print(f"\n[bold]{draft.name}[/], T = {temperature:g}, {sampling} drafting")
            report.comparisons.append(check.compare(draft, temperature, sampling))
            write(continued(report, path), path)
        if draft.method is None:
            console.print(f"\n[bold]{draft.name}[/], loaded into vLLM's class")
            report.speculator = check.speculator(draft)
    if server:
        console.print("\n[bold]responses[/] from vLLM's OpenAI server")
        report.server = served_responses(assets, check.engine, prompts, new_tokens)
    report = continued(report, path)
    show(report, console)
    written = write(report, path) + (write(report, publish) if publish else [])
    for file in written:
        console.print(f"  {file}")
    if not report.passed:
        fail("vLLM does not serve every draft as it decodes here, or its server failed")
    console.print(f"[bold green]passed[/] in {(time.monotonic() - began) / 60:.0f} minutes")


def _train(drafts: Sequence[ServedDraft], cores: int) -> None:
    """Capture features and train the drafts that are not there yet; write what vLLM reads."""
    wanted = [draft for draft in drafts if draft.given is None]
    for draft in wanted:
        draft.write_config()
    if wanted:
        mapping = FEATURES.parent / "vocab_mapping.pt"
        capture(CONFIGS / "eagle3.yaml", FEATURES, mapping, threads=cores)
        train(wanted, cores)
    for draft in drafts:
        draft.write_served()


if __name__ == "__main__":
    typer.run(main)
