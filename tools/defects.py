"""``make defects``: what each fix of the patch series changes, in figures before and after it.

A probe (`tools.probes`) measures one defect. It runs in a process of its own on SpecForge
with the patches before the fix, and again with the fix. The last tables are for those who trained
with ``training.lk_loss_type``: the same batch under the old settings and the new ones.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from specforge_lk.files import write_text
from specforge_lk.markdown import markdown_table
from tools.levels import FIXES, SERIES, Figures, Levels
from tools.wheels import SPECFORGE

ROOT = Path(__file__).parent.parent
#: Titles of the migration tables' columns, with the probe and the number of patches applied:
#: the first alone, without which EAGLE-3's loss does not run on a CPU, the fixes, or all.
ALL = len(SERIES.patches)
MIGRATIONS = {
    "lambda": {
        f"`lk_loss_type: lambda`, {SERIES.version}": ("legacy_lambda", 1),
        "the same, patched": ("legacy_lambda", len(FIXES)),
        "`loss: lk_lambda`": ("registered_lk_lambda", ALL),
    },
    "alpha": {
        f"`lk_loss_type: alpha`, {SERIES.version}": ("legacy_alpha", 1),
        "the same, patched": ("legacy_alpha", len(FIXES)),
        "`loss: lk_alpha`": ("registered_lk_alpha", ALL),
    },
}

console = Console(highlight=False, soft_wrap=True)


def main(
    publish: Annotated[
        Path | None, typer.Option(help="Also write the report here: a .json, with .md beside it.")
    ] = None,
) -> None:
    """Measure every fix; exit 1 if one of them changes none of its figures."""
    publish = publish.resolve() if publish else None
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as scratch:
        levels = Levels(Path(scratch))
        fixes: list[dict[str, Any]] = []
        for number, probe in enumerate(FIXES, 1):
            name = SERIES.patches[number - 1].name
            before, after = (levels.measure(probe, level) for level in (number - 1, number))
            fixes.append({"patch": name, "before": before, "after": after})
            console.print(f"{name}: {_changed(before, after)} figures changed", markup=False)
        migration = {
            objective: {title: levels.measure(*column) for title, column in columns.items()}
            for objective, columns in MIGRATIONS.items()
        }
    report = {"specforge": SPECFORGE, "fixes": fixes, "migration": migration}
    text = markdown(report)
    if publish is not None:
        write_text(publish, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        write_text(publish.with_suffix(".md"), text)
    console.print(text, markup=False)
    if idle := [fix["patch"] for fix in fixes if not _changed(fix["before"], fix["after"])]:
        console.print(f"no figure changes with {', '.join(idle)}", markup=False)
        raise typer.Exit(code=1)


def _changed(before: Figures, after: Figures) -> int:
    return sum(before.get(name) != value for name, value in after.items())


def markdown(report: dict[str, Any]) -> str:
    """Return the report's tables."""
    lines = [
        "# What the fixes change",
        "",
        f"Written by `make defects` on a CPU: {report['specforge']}, with the patches before the "
        "one named, and with it.",
    ]
    for fix in report["fixes"]:
        before, after = fix["before"], fix["after"]
        rows = [
            (name, _shown(before.get(name, "–")), _shown(value)) for name, value in after.items()
        ]
        lines += ["", f"## {fix['patch'].removesuffix('.patch')}", ""]
        lines += [markdown_table(("", "before", "after"), rows, tight=True)]
    lines += [
        "",
        "# Migration from `lk_loss_type`",
        "",
        "One batch, coverage 0.83, default options: loss, gradient (L2) and reported acceptance "
        "rate. Masked padding follows the supervised positions until they are the share named.",
    ]
    for columns in report["migration"].values():
        titles = list(columns)
        rows = [
            (name, *(_shown(columns[title][name]) for title in titles))
            for name in columns[titles[0]]
        ]
        lines += ["", markdown_table(("", *titles), rows, tight=True)]
    return "\n".join(lines) + "\n"


def _shown(figure: Any) -> str:
    return f"{figure:.4g}" if isinstance(figure, float) else str(figure)


if __name__ == "__main__":
    typer.run(main)
