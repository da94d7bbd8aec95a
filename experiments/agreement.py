"""``python -m experiments.agreement``: rounds that are computed beside rounds that are decoded.

Every draft decodes the prompts under every serving rule. Along the very responses that this gives,
the rounds are computed. At temperature 0 each response must take as many as computed, near-ties
aside; elsewhere the sum must be within three standard errors, which the responses' own differences
give. The last figure is what computing is worth: how much narrower the interval of τ is than from
the counts, of the same responses.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer

from experiments.assets import prepare
from experiments.runner import ROOT, RUNS, console, fail
from experiments.serving.compare import prediction
from specforge_lk.data.conversations import Tokens, prompt_ids
from specforge_lk.data.prompts import read_rows, user_turns
from specforge_lk.decode.draft import Draft, load_draft
from specforge_lk.decode.prefill import Prefills
from specforge_lk.decode.speculate import speculate
from specforge_lk.decode.target import Target
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


def main(
    draft: Annotated[list[str], typer.Option(help="NAME=DIR of an exported draft. Repeatable.")],
    rule: Annotated[list[str] | None, typer.Option(help="Serving rule. Repeatable.")] = None,
    prompts: Annotated[int, typer.Option(help="Prompts of each benchmark.")] = 24,
    new_tokens: Annotated[int, typer.Option(help="Longest response.")] = 64,
    publish: Annotated[
        Path | None, typer.Option(help="Also write the report here: a .json, with .md beside it.")
    ] = None,
) -> None:
    """Decode SmolLM2-135M with drafts, and compute the rounds along what was decoded."""
    publish = publish.resolve() if publish else None
    folders = dict(value.split("=", 1) for value in draft)
    rules = [parse(text) for text in rule or RULES]
    paths = {name: Path(folder).resolve() for name, folder in folders.items()}
    os.chdir(ROOT)
    assets = prepare(RUNS)
    target = Target.load(str(assets.target))
    turns = [
        user_turns(row, str(path))[0]
        for path in assets.benchmarks.values()
        for row in read_rows(str(path))[:prompts]
    ]
    asked = [prompt_ids(target.tokenizer, [{"role": "user", "content": turn}]) for turn in turns]
    asked.sort(key=len)
    report: dict[str, Any] = {
        "target": str(assets.target),
        "prompts": f"{prompts} each of {', '.join(assets.benchmarks)}",
        "new_tokens": new_tokens,
        "heads": HEADS,
        "versions": versions(),
        "measured": [],
    }
    for name, path in paths.items():
        loaded = load_draft(path, target)
        prefills = Prefills(target, loaded.capture_layers)
        for serving in rules:
            found = _compare(target, loaded, asked, serving, new_tokens, prefills)
            report["measured"].append({"draft": name, "rule": str(serving), **found})
            console.print(f"{name}, {serving}: {found}")
    text = markdown(report)
    if publish is not None:
        write_text(publish, json.dumps(report, indent=1) + "\n")
        write_text(publish.with_suffix(".md"), text)
    console.print(text, markup=False)
    if not all(row["passed"] for row in report["measured"]):
        fail("decoding does not take the rounds that are computed")


def _compare(
    target: Target,
    draft: Draft,
    prompts: list[list[int]],
    rule: Serving,
    new_tokens: int,
    prefills: Prefills,
) -> dict[str, Any]:
    """Decode all prompts, and compute the rounds along the responses."""
    generator = torch.Generator().manual_seed(0)
    responses = []
    for start in range(0, len(prompts), BATCH):
        responses += speculate(
            target,
            draft,
            prompts[start : start + BATCH],
            heads=HEADS,
            rule=rule,
            max_new_tokens=new_tokens,
            prefills=prefills,
            generator=generator,
        )
    conversations = [
        Tokens(prompt + r.tokens, [0] * len(prompt) + [1] * len(r.tokens))
        for prompt, r in zip(prompts, responses, strict=True)
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
        "Written by `python -m experiments.agreement` on a CPU: SmolLM2-135M-Instruct, "
        f"{report['prompts']}, {report['new_tokens']} new tokens at most, K = {report['heads']}. "
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
