"""``specforge-lk doctor``: what differs between a draft's training and its serving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specforge_lk.cli.options import (
    MOST_LEFT_OUT,
    ChatTemplateArgs,
    Device,
    Dtype,
    MaxLeftOut,
    OffPolicy,
    SampledBy,
    SkipMalformed,
    TargetPath,
    TrustRemoteCode,
    no_effect,
    parse_chat_template_args,
    parse_rule,
    parse_sampled_by,
)
from specforge_lk.cli.shell import check_out, errors, find_device, name_left_out, say
from specforge_lk.serving import PRESETS

if TYPE_CHECKING:
    from specforge_lk.doctor.findings import Report

EXAMPLE = (
    "specforge-lk doctor --target Qwen/Qwen3-8B --draft drafts/lk --serving vllm "
    "--held-out held_out.jsonl --config run.yaml --out report.json"
)
#: Exit code of a report with a finding that costs something, or may.
FOUND = 1
#: Exit code where nothing could be examined.
_UNUSABLE = 2
_OF_HELD_OUT = (
    *("limit", "sampled_by", "off_policy", "max_length", "heads", "tolerance"),
    *("skip_malformed", "max_left_out"),
)


@errors(
    memory="lower --limit or --max-length",
    codes={ValueError: _UNUSABLE, OSError: _UNUSABLE, FloatingPointError: _UNUSABLE},
)
def run(
    context: typer.Context,
    target: TargetPath,
    draft: Annotated[Path, typer.Option(help="Folder of the exported draft.")],
    serving: Annotated[
        str,
        typer.Option(
            metavar="RULE",
            help="The rule that the engine decodes by, as for eval: temperature=0.7, or a preset "
            "such as vllm or sglang-block, and after commas what differs from it. A preset also "
            "says how that engine reads the draft; without one, both engines are looked at.",
        ),
    ] = "vllm",
    held_out: Annotated[
        str | None,
        typer.Option(
            help="JSONL of the target's own responses under this rule, as specforge-lk generate "
            "writes them. Without them no cost is measured; a handful suffices."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Held-out responses to measure.")] = 32,
    sampled_by: SampledBy = None,
    off_policy: OffPolicy = False,
    max_length: Annotated[
        int, typer.Option(min=2, help="Leave out responses with more tokens, prompt included.")
    ] = 2048,
    heads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Drafted tokens per verification step, K. [default: the engine's, where its "
            "counts are given, or 5]",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="SpecForge run config that the draft was trained with.")
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="Captured features that the draft was trained on.")
    ] = None,
    accepted: Annotated[
        Path | None,
        typer.Option(
            help="JSON of an engine's counts: drafts, accepted_tokens and, if known, draft_tokens "
            "and accepted_per_position."
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="Address of a running vLLM or SGLang server, whose /metrics are read."),
    ] = None,
    skip_malformed: SkipMalformed = False,
    max_left_out: MaxLeftOut = MOST_LEFT_OUT,
    chat_template_args: ChatTemplateArgs = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Smallest cost that counts, in τ.")
    ] = 0.01,
    out: Annotated[Path | None, typer.Option(help="report.json to write.")] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Type that the target is loaded in here.")
    ] = Dtype.FLOAT32,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compare how a draft was trained with how it will be served.

    Every difference is measured on the target's own responses: the draft as it is served, and with
    the suspected setting changed. The difference of the two τ is its cost. Exit code 0: nothing is
    wrong; 1: a finding costs something, or its cost is unknown; 2: nothing could be examined.
    """
    rule = parse_rule(serving)
    recorded = parse_sampled_by(sampled_by)
    arguments = parse_chat_template_args(chat_template_args)
    no_effect(context, "without --held-out", not held_out, *_OF_HELD_OUT)
    no_effect(context, "without --skip-malformed", not skip_malformed, "max_left_out")
    if out:
        check_out(out)
    if accepted and metrics:
        raise typer.BadParameter("give --accepted or --metrics, not both")

    import torch
    import transformers

    from specforge_lk.data.rows import LeftOut
    from specforge_lk.decode.target import Target
    from specforge_lk.doctor.case import read_features, read_run
    from specforge_lk.doctor.diagnosis import Given, diagnose
    from specforge_lk.doctor.engine import fetch_counts, read_counts
    from specforge_lk.files import write_text

    left_out = LeftOut(skip_malformed, max_left_out)
    counts = read_counts(accepted) if accepted else fetch_counts(metrics) if metrics else None
    given = Given(
        rule,
        _engine(serving),
        held_out,
        limit,
        recorded,
        off_policy,
        left_out,
        max_length,
        heads,
        read_run(config) if config else None,
        read_features(features) if features else None,
        counts,
        tolerance,
    )
    transformers.utils.logging.disable_progress_bar()
    model = Target.load(
        target,
        getattr(torch, dtype.value),
        find_device(device),
        trust_remote_code=trust_remote_code,
        chat_template_args=arguments,
    )
    report = diagnose(model, target, dtype.value, draft, given)
    name_left_out(left_out.left_out)
    _print(report)
    if out:
        write_text(out, json.dumps(report.as_json(), indent=2, ensure_ascii=False) + "\n")
        say(f"wrote {out}")
    if report.wrong:
        raise typer.Exit(FOUND)


def _engine(serving: str) -> str | None:
    """Return the engine that a preset is of."""
    name = serving.partition(",")[0]
    return name.partition("-")[0] if name in PRESETS else None


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from specforge_lk.doctor.render import conclusion, finding_rows, outcome_rows

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log file wraps little
    for title, (header, rows) in (
        ("Checks", outcome_rows(report)),
        ("Findings", finding_rows(report)),
    ):
        if not rows:
            continue
        table = Table(title=title, show_lines=title == "Findings")
        for name in header:
            table.add_column(escape(name), overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    for line in conclusion(report):
        say(line)
