"""``specforge-lk eval``: how much of what a draft proposes the target accepts."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specforge_lk.cli.progress import ProgressBar
from specforge_lk.cli.shell import Dtype, device_option, errors, find_device, say
from specforge_lk.evaluate.published import PUBLISHED, find_target
from specforge_lk.evaluate.settings import DraftSampling, Settings

if TYPE_CHECKING:
    from specforge_lk.evaluate.report import Report

EXAMPLE = (
    "specforge-lk eval --target Qwen/Qwen3-8B --draft lk_lambda=drafts/lk "
    "--held-out held_out.jsonl --out report.json"
)


@errors(memory="lower --batch-size or --max-length")
def run(
    target: Annotated[str, typer.Option(help="Target model: a directory or a hub id.")],
    draft: Annotated[
        list[str],
        typer.Option(
            help="LOSS=DIR or LOSS@SEED=DIR: the loss that a draft was trained with, its training "
            "seed, and its folder: an export by `specforge export --to hf`, a released draft in "
            "vLLM's layout or that of the package speculators, or a target with an MTP layer. "
            "Repeatable; each is compared with the ones before it, so put baselines first."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="report.json to write; markdown and chart are put beside it.")
    ],
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=PATH: prompts to decode speculatively, JSONL (.gz too) with `turns`, "
            "`prompt` or `question`; or NAME=hub:REPO, a hub data set, with :CONFIG after "
            "REPO where it has several, and @SPLIT for another split than `test`. Repeatable."
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="JSONL of the target's own responses that no draft was trained on, rows "
            '{"conversations": [{"role", "content"}, …]}. Gives the exact expected τ, and the '
            "paired differences between drafts: the figure with the least noise."
        ),
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option(min=0, help="Sampling temperature; repeatable. [default: 0 and 1]"),
    ] = None,
    heads: Annotated[
        int,
        typer.Option(
            min=1,
            help="Drafted tokens per verification step, K. MEDUSA heads and MLP speculators have "
            "6 in the paper.",
        ),
    ] = 7,
    draft_sampling: Annotated[
        DraftSampling,
        typer.Option(
            help="`probabilistic` samples the draft from q, so that acceptance is Σ min(p, q); "
            "`greedy` drafts argmax q as engines do by default, and accepts it with p(argmax q)."
        ),
    ] = DraftSampling.PROBABILISTIC,
    max_new_tokens: Annotated[
        int, typer.Option(min=2, help="Longest response to a benchmark prompt.")
    ] = 256,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use the first rows of every benchmark only.")
    ] = None,
    held_out_limit: Annotated[
        int | None, typer.Option(min=1, help="Use the first held-out responses only.")
    ] = None,
    turns: Annotated[
        int, typer.Option(min=1, help="Benchmark turns to answer (MT-bench has 2).")
    ] = 1,
    max_length: Annotated[
        int, typer.Option(min=1, help="Leave out prompts and conversations with more tokens.")
    ] = 2048,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of sampling and bootstrap.")] = 0,
    aux_layers: Annotated[
        str | None,
        typer.Option(
            help="Target layers an EAGLE-3 draft reads, e.g. 1,14,26, where its config.json does "
            "not say and training did not use the default."
        ),
    ] = None,
    compare_with: Annotated[
        str | None,
        typer.Option(
            help="Target in the paper's tables to show τ beside, such as Llama-3.1-8B-Instruct. "
            "[default: the one that has --target's name, if any] Drafts are found by algorithm "
            "and LOSS, benchmarks by name: mt-bench, humaneval, gsm8k."
        ),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Use float32 for figures to report.")
    ] = Dtype.FLOAT32,
    device: Annotated[str, device_option()] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code that comes with the target.")
    ] = False,
) -> None:
    """Measure how many drafted tokens a target accepts.

    A chain of K tokens is drafted and verified with rejection sampling, which leaves the target's
    output distribution unchanged. The report has τ (tokens per verification step) with a confidence
    interval, and the acceptance rate α of every draft position. Run the same command again after an
    interruption: measurements with the same models, data and settings are kept.
    """
    specs = _drafts(draft)
    benchmarks = dict(_named(value, "--benchmark", "NAME=PATH") for value in benchmark or [])
    if len(benchmarks) < len(benchmark or []) or "held_out" in benchmarks:
        raise typer.BadParameter("--benchmark names must differ, and not be held_out")
    if not benchmarks and held_out is None:
        raise typer.BadParameter("nothing to measure: give --benchmark or --held-out")
    layers = _layers(aux_layers)
    published = find_target(compare_with or target)
    if compare_with and published is None:
        raise typer.BadParameter(
            f"--compare-with {compare_with!r} is none of {', '.join(PUBLISHED)}"
        )
    settings = Settings(
        heads=heads,
        draft_sampling=draft_sampling,
        max_new_tokens=max_new_tokens,
        limit=limit,
        held_out_limit=held_out_limit,
        batch_size=batch_size,
        max_length=max_length,
        turns=turns,
        seed=seed,
    )

    import torch
    import transformers

    from specforge_lk.decode.draft import load_draft
    from specforge_lk.decode.target import Target
    from specforge_lk.evaluate import runner
    from specforge_lk.evaluate.render import write_all

    transformers.utils.logging.disable_progress_bar()
    model = Target.load(
        target,
        getattr(torch, dtype.value),
        find_device(device),
        trust_remote_code=trust_remote_code,
    )
    drafts = [
        runner.LoadedDraft(loss, number, path, load_draft(path, model, layers))
        for loss, number, path in specs
    ]
    report = runner.run(
        model,
        target,
        drafts,
        benchmarks=benchmarks,
        held_out=held_out,
        temperatures=list(dict.fromkeys(temperature or [0.0, 1.0])),
        settings=settings,
        out=out,
        track=lambda what, total: ProgressBar(what, total, "tok/s"),
        command=["specforge-lk", *map(shlex.quote, sys.argv[1:])],
        published=published,
    )
    _print(report)
    say(f"wrote {', '.join(map(str, write_all(report, out)))}")


def _drafts(values: list[str]) -> list[tuple[str, int, str]]:
    """Return loss, training seed and folder of every ``--draft``."""
    named = [_named(value, "--draft", "LOSS=DIR") for value in values]
    specs = [(*_loss_and_seed(name), path) for name, path in named]
    if len({spec[:2] for spec in specs}) < len(specs):
        raise typer.BadParameter("two drafts have the same name; add @SEED to tell them apart")
    return specs


def _layers(value: str | None) -> tuple[int, ...] | None:
    """Return the layers of ``--aux-layers``."""
    try:
        return tuple(int(layer) for layer in value.split(",")) if value else None
    except ValueError:
        raise typer.BadParameter(f"--aux-layers {value!r} is not like 1,14,26") from None


def _named(value: str, option: str, form: str) -> tuple[str, str]:
    """Return both sides of the first ``=``."""
    name, equals, path = value.partition("=")
    if not (name and equals and path):
        raise typer.BadParameter(f"{option} {value!r} is not of the form {form}")
    return name, path


def _loss_and_seed(name: str) -> tuple[str, int]:
    """Return the loss of LOSS or LOSS@SEED, and its seed, 0 by default."""
    loss, _, seed = name.partition("@")
    if seed and not seed.isdigit():
        raise typer.BadParameter(f"--draft {name!r}: the seed after @ is not a number")
    if not loss or "/" in loss:
        raise typer.BadParameter(f"--draft {name!r}: the name before = must be a loss, not a path")
    return loss, int(seed or 0)


def _print(report: Report) -> None:
    """Print the report's tables."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from specforge_lk.evaluate.tables import paired_rows, published_rows, result_rows

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log file wraps nothing
    tables = [("Acceptance", result_rows(report))]
    compared = published_rows(report)
    if compared[1]:
        tables.append((f"τ with {report.published}, measured (paper)", compared))
    if report.paired:
        tables.append(("Paired differences", paired_rows(report)))
    for title, (header, rows) in tables:
        table = Table(*map(escape, header), title=title)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
