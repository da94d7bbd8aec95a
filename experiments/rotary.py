"""``python -m experiments.rotary``: what float32 rotary frequencies are worth to a bfloat16 draft.

A DFlash draft of SmolLM2-135M-Instruct is trained in bfloat16 by SpecForge with the patches before
"keep rotary frequencies in float32", and once more with it: same features, seed and order. Each is
then measured on held-out responses with both kinds of angles: frequencies rounded to bfloat16, as
the release trains, and in float32, as engines serve. Everything else of the
measurement is float32. The files are kept under ``runs/rotary``.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from experiments.assets import HELD_OUT, prepare
from experiments.runner import CONFIGS, ROOT, RUNS, capture, console, execute
from specforge_lk.data.conversations import tokenize
from specforge_lk.decode.draft import load_draft
from specforge_lk.decode.target import Target
from specforge_lk.evaluate.held_out import (
    ChainStarts,
    expected_tau,
    measure_held_out,
    paired_difference,
)
from specforge_lk.evaluate.settings import Settings
from specforge_lk.files import write_text
from specforge_lk.markdown import markdown_table
from tools.levels import FIXES, SERIES, Levels

DIRECTORY = RUNS / "rotary"
CONFIG, DRAFT_CONFIG = CONFIGS / "dflash.yaml", CONFIGS / "dflash-draft.json"
#: SpecForge's own loss, so that every level trains without a plug-in.
SETTINGS = ("model.torch_dtype=bfloat16", "training.num_epochs=1", "training.batch_size=2")
#: Chain starts from this position on, where angles have had room to grow wrong.
FAR = 256
ROUNDED, EXACT = "rounded to bfloat16", "float32"


def main(
    publish: Annotated[
        Path | None, typer.Option(help="Also write the report here: a .json, with .md beside it.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps; 128 are one pass.")] = 128,
    anchors: Annotated[int, typer.Option(help="Blocks per response and step.")] = 32,
    conversations: Annotated[int, typer.Option(help="Held-out responses to measure.")] = 64,
    threads: Annotated[int, typer.Option(help="Threads of every step.")] = 1,
) -> None:
    """Train the two drafts and measure each with both angles; about 10 minutes on an idle core."""
    publish = publish.resolve() if publish else None
    os.chdir(ROOT)
    torch.set_num_threads(threads)
    assets = prepare(RUNS)
    features = DIRECTORY / "features"
    level = FIXES.index("rotary_angles") + 1
    patch = SERIES.patches[level - 1]
    with tempfile.TemporaryDirectory() as scratch:
        levels = Levels(Path(scratch))
        trees = {"rounded": levels.tree(level - 1), "exact": levels.tree(level)}
        capture(CONFIG, features, None, "model.torch_dtype=bfloat16", threads=threads)
        budget = (f"training.max_steps={steps}", f"training.num_anchors={anchors}")
        rounded, exact = (
            _train(name, tree, features, budget, threads) for name, tree in trees.items()
        )
    drafts = {ROUNDED: rounded, EXACT: exact}
    target = Target.load(str(assets.target), torch.float32, "cpu")
    with gzip.open(HELD_OUT, "rt") as rows:
        held_out = [tokenize(json.loads(row), target.tokenizer, target.eos_ids) for row in rows][
            :conversations
        ]
    kinds = [(trained, used) for trained in drafts for used in (ROUNDED, EXACT)]
    measured = measure_held_out(
        target,
        [
            (_with_angles(load_draft(drafts[trained], target), used), [1.0])
            for trained, used in kinds
        ],
        [tokens for tokens in held_out if len(tokens.input_ids) <= 512],
        Settings(heads=4, max_length=512, batch_size=8),
    )
    starts = {kind: found[1.0] for kind, found in zip(kinds, measured, strict=True)}
    report = {
        "patch": patch.name,
        "steps": steps,
        "anchors": anchors,
        "conversations": len({int(c) for c in starts[kinds[0]].conversation}),
        "measured": [
            {
                "trained with": trained,
                "measured with": used,
                **_figures(starts[trained, used], starts[trained, trained]),
            }
            for trained, used in kinds
        ],
    }
    text = markdown(report)
    if publish is not None:
        write_text(publish, json.dumps(report, indent=1) + "\n")
        write_text(publish.with_suffix(".md"), text)
    console.print(text, markup=False)


def _train(name: str, tree: Path, features: Path, budget: tuple[str, ...], threads: int) -> Path:
    """Return the exported draft of ``specforge train`` with the SpecForge in ``tree``."""
    output, draft = DIRECTORY / name, DIRECTORY / f"{name}-draft"
    if draft.exists():
        return draft
    paths = (f"data.hidden_states_path={features}", f"output_dir={output}")
    # Without plug-ins: this project's needs the whole series.
    execute(
        *("env", f"PYTHONPATH={tree}", "SPECFORGE_PLUGINS=", sys.executable, "-m", "specforge.cli"),
        *("train", "-c", CONFIG, *paths, *SETTINGS, *budget),
        threads=threads,
    )
    execute(
        *("specforge", "export", "--to", "hf", "--checkpoint", output, "--output-dir", draft),
        *("--draft-config", DRAFT_CONFIG),
        threads=threads,
    )
    return draft


def _with_angles(draft: Any, kind: str) -> Any:
    if kind == ROUNDED:
        rotary = draft._rotary
        rotary.inv_freq = rotary.inv_freq.bfloat16().float()
    return draft


def _figures(starts: ChainStarts, own: ChainStarts) -> dict[str, Any]:
    """Return acceptance, and the difference to the draft with the angles it was trained with."""
    tau, interval = expected_tau(starts, 0)
    figures = {"tau": tau, "tau_ci": interval, "alpha": [float(a) for a in starts.alpha.mean(0)]}
    if starts is not own:
        for name, least in (("difference", 0), ("difference far", FAR)):
            mean, bounds = paired_difference(_from(starts, least), _from(own, least))
            figures |= {name: mean, f"{name} ci": bounds}
    return figures


def _from(starts: ChainStarts, least: int) -> ChainStarts:
    kept = starts.position >= least
    parts = (starts.conversation, starts.position, starts.alpha, starts.coverage)
    return ChainStarts(*(part[kept] for part in parts))


def markdown(report: dict[str, Any]) -> str:
    """Return the report as markdown."""
    lines = [
        "# Rotary angles in bfloat16",
        "",
        f"Written by `python -m experiments.rotary` on a CPU: {report['patch']}. A DFlash draft of "
        f"SmolLM2-135M-Instruct, SpecForge's own loss, {report['steps']} steps of 2 responses and "
        f"{report['anchors']} blocks in each, in bfloat16, trained with frequencies rounded to "
        "bfloat16 (before the patch) and in float32 (with it); each measured with both on "
        f"{report['conversations']} held-out "
        "responses at T = 1. The differences are paired, to the draft with its own angles; "
        "intervals by a bootstrap over responses.",
        "",
    ]
    header = ["trained with", "measured with", "α per slot", "τ expected", "difference"]
    rows = []
    for row in report["measured"]:
        alpha = " / ".join(f"{a:.3f}" for a in row["alpha"])
        low, high = row["tau_ci"]
        differences = [
            f"{row[name]:+.4f} [{row[f'{name} ci'][0]:+.4f}, {row[f'{name} ci'][1]:+.4f}]"
            if name in row
            else "–"
            for name in ("difference", "difference far")
        ]
        tau = f"{row['tau']:.3f} [{low:.3f}, {high:.3f}]"
        rows.append([row["trained with"], row["measured with"], alpha, tau, *differences])
    lines.append(markdown_table([*header, f"the same from position {FAR} on"], rows, tight=True))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
