"""``python -m experiments.agreement``: rounds that are computed beside rounds that are decoded.

Every draft decodes the prompts under every serving rule. Along the very responses that this gives,
the rounds are computed. At temperature 0 each response must take as many as computed, near-ties
aside; elsewhere the sum must be within three standard errors, which the responses' own differences
give. The last figure is what computing is worth: how much narrower the interval of τ is than from
the counts, of the same responses.

Everything is kept under ``runs/agreement``; what is interrupted continues where it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer

from experiments.assets import prepare
from experiments.runner import (
    ROOT,
    RUNS,
    Device,
    Training,
    capture,
    chosen_device,
    console,
    fail,
    hardware,
    train,
)
from experiments.serving.cases import DRAFTS as SERVED
from experiments.serving.cases import ServedDraft
from experiments.serving.compare import prediction
from specforge_lk.data.conversations import Tokens
from specforge_lk.data.prompts import read_rows, user_turns
from specforge_lk.decode.draft import Draft, load_draft
from specforge_lk.decode.prefill import Prefills
from specforge_lk.decode.speculate import speculate
from specforge_lk.decode.target import Target
from specforge_lk.engines import VLLM_METHOD
from specforge_lk.evaluate.report import versions
from specforge_lk.evaluate.settings import Settings
from specforge_lk.evaluate.teacher_forced import measure_responses
from specforge_lk.files import write_text
from specforge_lk.markdown import markdown_table
from specforge_lk.serving import Serving, parse

RULES: Final = ("temperature=0", "temperature=0.7,top_p=0.9", "temperature=1")
HEADS = 4
#: Prompts that are decoded at once.
BATCH = 32
#: The drafts that are trained, by name: those of `make serve-check`, and one that drafts a block.
DRAFTS: Final[dict[str, Training]] = {
    **{draft.name: draft for draft in SERVED if draft.method not in (None, VLLM_METHOD)},
    "dflash": Training("dflash", "lk_lambda", 0, RUNS / "agreement", batch=2, max_steps=64),
}


def main(
    drafts: Annotated[str, typer.Option(help="Drafts to train and measure.")] = " ".join(DRAFTS),
    given: Annotated[
        list[str] | None,
        typer.Option(help="NAME=DIR: measure this exported draft, too. Repeatable."),
    ] = None,
    rule: Annotated[list[str] | None, typer.Option(help="Serving rule. Repeatable.")] = None,
    prompts: Annotated[int, typer.Option(help="Prompts of each benchmark.")] = 24,
    new_tokens: Annotated[int, typer.Option(help="Longest response.")] = 48,
    seeds: Annotated[
        int, typer.Option(help="Responses to each prompt, where they are sampled.")
    ] = 3,
    publish: Annotated[
        Path | None, typer.Option(help="Also write the report here: a .json, with .md beside it.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Decode SmolLM2-135M with drafts, and compute the rounds along what was decoded."""
    publish = publish.resolve() if publish else None
    paths = {name: Path(d).resolve() for name, d in (v.split("=", 1) for v in given or [])}
    if unknown := set(drafts.split()) - set(DRAFTS):
        raise typer.BadParameter(
            f"{' '.join(sorted(unknown))}: name drafts of {', '.join(DRAFTS)}",
            param_hint="--drafts",
        )
    rules = [parse(text) for text in rule or RULES]
    used = chosen_device(device)
    os.chdir(ROOT)
    assets = prepare(RUNS)
    paths = _trained([DRAFTS[name] for name in drafts.split()], used) | paths
    target = Target.load(str(assets.target), device=used)
    turns = [
        user_turns(row, str(path))[0]
        for path in assets.benchmarks.values()
        for row in read_rows(str(path))[:prompts]
    ]
    asked = [target.chat.prompt_ids([{"role": "user", "content": turn}]) for turn in turns]
    asked.sort(key=len)
    report: dict[str, Any] = {
        "target": str(assets.target),
        "prompts": f"{prompts} each of {', '.join(assets.benchmarks)}",
        "new_tokens": new_tokens,
        "seeds": seeds,
        "heads": HEADS,
        "device": hardware(used),
        "versions": versions(),
        "measured": [],
    }
    kept = RUNS / "agreement" / "report.json"
    if kept.exists():
        old = json.loads(kept.read_text())
        if all(old.get(name) == value for name, value in report.items() if name != "measured"):
            report = old
    done = {(row["draft"], row["rule"]) for row in report["measured"]}
    for name, path in paths.items():
        loaded = load_draft(path, target)
        prefills = Prefills(target, loaded.capture_layers)
        for serving in rules:
            if (name, str(serving)) in done:
                continue
            numbers = range(1 if serving.temperature == 0 else seeds)
            found = _compare(target, loaded, asked, serving, new_tokens, prefills, numbers)
            report["measured"].append({"draft": name, "rule": str(serving), **found})
            write_text(kept, json.dumps(report, indent=1) + "\n")
            console.print(f"{name}, {serving}: {found}")
    text = markdown(report)
    if publish is not None:
        write_text(publish, json.dumps(report, indent=1) + "\n")
        write_text(publish.with_suffix(".md"), text)
    console.print(text, markup=False)
    if not all(row["passed"] for row in report["measured"]):
        fail("decoding does not take the rounds that are computed")


def _trained(drafts: Sequence[Training], device: str) -> dict[str, Path]:
    """Train and export the drafts that are not there yet; return their folders by algorithm."""
    cores = len(os.sched_getaffinity(0))
    for draft in drafts:
        if isinstance(draft, ServedDraft):
            draft.write_config()
    captured: set[Path] = set()
    # What EAGLE-3 reads serves every draft that reads no more: drafts with a vocabulary come first.
    for draft in sorted(drafts, key=lambda draft: draft.vocab_mapping is None):
        if draft.features in captured:
            continue
        captured.add(draft.features)
        mapping = draft.features.parent / "vocab_mapping.pt" if draft.vocab_mapping else None
        made = draft.features, mapping
        # With a loss set, DFlash needs the target's states, too.
        loss = "training.loss=lk_lambda"
        capture(draft.config_path, *made, loss, threads=cores, device=device)
    train(drafts, cores, device)
    return {draft.algorithm: draft.draft for draft in drafts}


def _compare(
    target: Target,
    draft: Draft,
    prompts: list[list[int]],
    rule: Serving,
    new_tokens: int,
    prefills: Prefills,
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Decode all prompts with every seed, and compute the rounds along the responses."""
    responses, conversations = [], []
    for seed in seeds:
        generator = torch.Generator(target.device).manual_seed(seed)
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            decoded = speculate(
                target,
                draft,
                batch,
                heads=HEADS,
                rule=rule,
                max_new_tokens=new_tokens,
                prefills=prefills,
                generator=generator,
            )
            responses += decoded
            conversations += [
                Tokens(prompt + r.tokens, [0] * len(prompt) + [1] * len(r.tokens))
                for prompt, r in zip(batch, decoded, strict=True)
            ]
    (measured,) = measure_responses(
        target, [(draft, [rule])], conversations, Settings(heads=HEADS, batch_size=BATCH)
    )
    rounds = measured[rule]
    taken = [r.rounds for r in responses]
    figures = prediction(rounds, taken, rule.temperature == 0).model_dump()
    off_rule = int(rounds.off_rule.sum())
    return {"tau": rounds.tau, "responses": len(taken), "off_rule": off_rule, **figures}


def markdown(report: dict[str, Any]) -> str:
    """Return the report as markdown."""
    header = ["draft", "rule", "τ", "tokens", "rounds computed", "rounds decoded"]
    header += ["standard error", "responses that differ", "τ is how much narrower", ""]
    rows = [
        [
            row["draft"],
            row["rule"],
            f"{row['tau']:.3f}",
            str(row["tokens"]),
            f"{row['rounds']:.1f}",
            str(row["taken"]),
            "–" if row["differing"] is not None else f"{row['error']:.1f}",
            "–" if row["differing"] is None else f"{row['differing']} of {row['responses']}",
            "–" if row["narrower"] is None else f"{row['narrower']:.2f}",
            "ok" if row["passed"] else "FAILED",
        ]
        for row in report["measured"]
    ]
    lines = [
        "# Rounds computed and decoded",
        "",
        f"Written by `python -m experiments.agreement` on {report.get('device', 'a CPU')}: "
        "SmolLM2-135M-Instruct, "
        f"{report['prompts']}, {report['new_tokens']} new tokens at most, K = {report['heads']}, "
        f"{report['seeds']} responses to each prompt where they are sampled. "
        "Rounds are computed along the responses that were decoded. At T = 0 every response must "
        "take as many as computed, near-ties aside; elsewhere the sum must be within three "
        "standard errors. The last figure is the ratio of the widths of the intervals of τ, "
        "counted to computed, of the same responses.",
        "",
        markdown_table(header, rows, tight=True),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
