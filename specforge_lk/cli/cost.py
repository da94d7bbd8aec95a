"""``specforge-lk cost``: what a training run costs, before it is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from specforge_lk.cli.options import Overrides
from specforge_lk.cli.shell import errors

EXAMPLE = "specforge-lk cost --config run.yaml --prompts 660000 --mean-tokens 800"


@errors()
def run(
    config: Annotated[Path, typer.Option(help="SpecForge run config (YAML or JSON).")],
    prompts: Annotated[int, typer.Option(min=1, help="Samples of an epoch.")] = 660_000,
    mean_tokens: Annotated[
        float,
        typer.Option(
            min=1,
            max=1e9,
            help="Mean tokens of a sample, prompt and response: an assumption of yours.",
        ),
    ] = 1000,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the sheet as JSON instead of a table.")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Compute parameters, memory, steps, FLOPs and bytes of features from a run config.

    It knows EAGLE-3, MEDUSA, MLP speculator and MTP drafts. Parameters are counted on the draft,
    which is built without memory. The other figures are formulas, unless the sheet says that they
    were measured. Nothing is downloaded and no target is loaded.
    """
    from specforge_lk import cost

    lines = cost.sheet(
        cost.load_run(config, overrides or []), prompts=prompts, mean_tokens=mean_tokens
    )
    if as_json:
        typer.echo(json.dumps(cost.as_json(lines), indent=2))
        return
    table = Table(title=f"{config}: {prompts:,} prompts of {mean_tokens:g} tokens (assumed)")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("source")
    table.add_column("how")
    for line in lines:
        table.add_row(line.name, _figure(line.value, line.unit), line.source, line.how)
    Console().print(table)


def _figure(value: float, unit: str) -> str:
    """1,234 or 1.23 G with the unit; bytes in powers of 1000."""
    if not unit:
        return f"{value:,.0f}"
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
