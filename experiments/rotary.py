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

import numpy as np
import torch
import typer

from experiments.assets import HELD_OUT, prepare
from experiments.runner import (
    CONFIGS,
    ROOT,
    RUNS,
    Device,
    capture,
    chosen_device,
    console,
    execute,
    hardware,
)
from specforge_lk.data.conversations import Tokens
from specforge_lk.decode.draft import load_draft
from specforge_lk.decode.target import Target
from specforge_lk.evaluate.intervals import bootstrap_ratio
from specforge_lk.evaluate.rounds import Rounds, paired_differences
from specforge_lk.evaluate.settings import Settings
from specforge_lk.evaluate.teacher_forced import measure_responses
from specforge_lk.files import write_text
from specforge_lk.markdown import markdown_table
from specforge_lk.serving import Serving
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
    device: Device = "auto",
) -> None:
    """Train the two drafts and measure each with both angles; about 10 minutes on an idle core."""
    publish = publish.resolve() if publish else None
    used = chosen_device(device)
    os.chdir(ROOT)
    torch.set_num_threads(threads)
    assets = prepare(RUNS)
    features = DIRECTORY / "features"
    level = FIXES.index("rotary_angles") + 1
    patch = SERIES.patches[level - 1]
    with tempfile.TemporaryDirectory() as scratch:
        levels = Levels(Path(scratch))
        trees = {"rounded": levels.tree(level - 1), "exact": levels.tree(level)}
        dtype = "model.torch_dtype=bfloat16"
        capture(CONFIG, features, None, dtype, threads=threads, device=used)
        budget = (f"training.max_steps={steps}", f"training.num_anchors={anchors}")
        rounded, exact = (
            _train(name, tree, features, budget, threads, used) for name, tree in trees.items()
        )
    drafts = {ROUNDED: rounded, EXACT: exact}
    target = Target.load(str(assets.target), torch.float32, used)
    with gzip.open(HELD_OUT, "rt") as rows:
        held_out = [tokens for row in rows for tokens in target.chat.tokenize(json.loads(row))]
        held_out = held_out[:conversations]
    kinds = [(trained, used) for trained in drafts for used in (ROUNDED, EXACT)]
    fitting = [tokens for tokens in held_out if len(tokens.input_ids) <= 512]
    rule = Serving(1.0)
    measured = measure_responses(
        target,
        [
            (_with_angles(load_draft(drafts[trained], target), used), [rule])
            for trained, used in kinds
        ],
        fitting,
        Settings(heads=4, max_length=512, batch_size=8),
    )
    rounds = {kind: found[rule] for kind, found in zip(kinds, measured, strict=True)}
    far = _far(fitting)
    report = {
        "patch": patch.name,
        "device": hardware(used),
        "steps": steps,
        "anchors": anchors,
        "conversations": len(fitting),
        "measured": [
            {
                "trained with": trained,
                "measured with": used,
                **_figures(rounds[trained, used], rounds[trained, trained], far),
            }
            for trained, used in kinds
        ],
    }
    text = markdown(report)
    if publish is not None:
        write_text(publish, json.dumps(report, indent=1) + "\n")
        write_text(publish.with_suffix(".md"), text)
    console.print(text, markup=False)


def _train(
    name: str, tree: Path, features: Path, budget: tuple[str, ...], threads: int, device: str
) -> Path:
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
        device=device,
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


def _far(conversations: list[Tokens]) -> np.ndarray:
    """Return which chain starts are at `FAR` or behind, conversations having one response each."""
    positions = []
    for tokens in conversations:
        first = tokens.loss_mask.index(1)
        positions.append(np.arange(first - 1, len(tokens.input_ids) - 2))
    return np.concatenate(positions) >= FAR


def _figures(rounds: Rounds, own: Rounds, far: np.ndarray) -> dict[str, Any]:
    """Return acceptance, and the difference to the draft with the angles it was trained with."""
    figures = rounds.figures(0)
    found: dict[str, Any] = {
        "tau": figures["tau_rounds"],
        "tau_ci": figures["tau_rounds_ci"],
        "alpha": figures["alpha_per_head"],
    }
    if rounds is not own:
        (difference,), (bounds,) = (
            getattr(paired_differences(rounds, own)["tau_rounds"], name) for name in ("value", "ci")
        )
        found |= {"difference": difference, "difference ci": bounds}
        # Of rounds that begin far from the start of the text.
        gap, conversation = (
            values[far & own.whole]
            for values in (
                rounds.per_start - own.per_start,
                np.repeat(own.conversation, own.tokens),
            )
        )
        sums = np.bincount(conversation, gap), np.bincount(conversation)
        found |= {"difference far": float(gap.mean())}
        found |= {"difference far ci": bootstrap_ratio(sums[0], sums[1], 0)}
    return found


def markdown(report: dict[str, Any]) -> str:
    """Return the report as markdown."""
    lines = [
        "# Rotary angles in bfloat16",
        "",
        f"Written by `python -m experiments.rotary` on {report.get('device', 'a CPU')}: "
        f"{report['patch']}. A DFlash draft of SmolLM2-135M-Instruct, SpecForge's own loss, "
        f"{report['steps']} steps of 2 responses and "
        f"{report['anchors']} blocks in each, in bfloat16, trained with frequencies rounded to "
        "bfloat16 (before the patch) and in float32 (with it); each measured with both on "
        f"{report['conversations']} held-out "
        "responses at T = 1. The differences are paired, to the draft with its own angles; "
        "intervals by a bootstrap over responses.",
        "",
    ]
    header = ["trained with", "measured with", "α per slot", "τ", "difference"]
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
