"""``specforge-lk eval``: how much of what a draft proposes the target accepts."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
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
    parse_layers,
    parse_rule,
    parse_sampled_by,
)
from specforge_lk.cli.progress import ProgressBar
from specforge_lk.cli.shell import check_out, errors, find_device, name_left_out, say
from specforge_lk.evaluate.published import PUBLISHED, find_target
from specforge_lk.evaluate.settings import Settings
from specforge_lk.serving import Serving

if TYPE_CHECKING:
    from specforge_lk.evaluate.report import Report
    from specforge_lk.evaluate.runner import LoadedDraft

EXAMPLE = """\
specforge-lk eval --target Qwen/Qwen3-8B --draft lk=drafts/lk --held-out held_out.jsonl --out r.json
specforge-lk eval --target Qwen/Qwen3-8B --draft kl=drafts/kl --draft lk=drafts/lk \
--benchmark humaneval=humaneval.jsonl --serving vllm,temperature=0.7 --out r.json"""

_OF_BENCHMARKS = ("limit", "turns", "max_new_tokens")
_OF_HELD_OUT = ("sampled_by", "off_policy", "held_out_limit")


@errors(memory="lower --batch-size or --max-length")
def run(
    context: typer.Context,
    target: TargetPath,
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
            help="NAME=PATH: prompts that the target answers once for all drafts, JSONL (.gz too) "
            "with `turns`, `prompt` or `question`; or NAME=hub:REPO, a hub data set, with :CONFIG "
            "after REPO where it has several, and @SPLIT for another split than `test`. "
            "Repeatable."
        ),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            help="JSONL of the target's own responses that no draft was trained on, as "
            "specforge-lk generate writes them. Repeatable: a rule is measured along those rows "
            "that were sampled by it."
        ),
    ] = None,
    serving: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE",
            help="The rule that an engine will decode by: an engine's name, settings with a comma "
            "between them, or both. See above. Repeatable. [default: what the "
            "held-out responses were sampled by; without them temperature=0 and temperature=1]",
        ),
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            help="Measure every rule at this temperature; repeatable. Leave it out of the rules.",
        ),
    ] = None,
    sampled: Annotated[
        bool,
        typer.Option(
            "--sampled",
            help="Decode the benchmarks speculatively with every draft, too: a check on the exact "
            "figures, with noise.",
        ),
    ] = False,
    sampled_by: SampledBy = None,
    off_policy: OffPolicy = False,
    heads: Annotated[
        int,
        typer.Option(
            min=1,
            help="Drafted tokens per verification step, K. MEDUSA heads and MLP speculators have "
            "6 in the paper.",
        ),
    ] = 7,
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
        int,
        typer.Option(
            min=1,
            help="Leave out conversations with more tokens, and prompts where a response of "
            "--max-new-tokens would make it more.",
        ),
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
    skip_malformed: SkipMalformed = False,
    max_left_out: MaxLeftOut = MOST_LEFT_OUT,
    chat_template_args: ChatTemplateArgs = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Use float32 for figures to report.")
    ] = Dtype.FLOAT32,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure how many tokens a round of speculative decoding will give.

    τ is computed, not sampled: along the target's own responses, with the acceptance probability of
    every chain that could begin there, as an engine with this serving rule would meet them. Drafts
    are compared along the same responses. The report has τ with a confidence interval, and
    acceptance per draft position. Run the same command again after an interruption: measurements
    with the same models, data and settings are kept.

    A serving rule is an engine's name (vllm, vllm-probabilistic, vllm-block, sglang,
    sglang-rejection-sampling, sglang-block), then settings that differ from it: temperature, top_k,
    top_p, drafting (probabilistic, greedy), draft_temperature, draft_top_k, draft_top_p,
    verification (token, block). For example: vllm,temperature=0.7,top_p=0.95
    """
    specs = _drafts(draft)
    benchmarks = dict(_named(value, "--benchmark", "NAME=PATH") for value in benchmark or [])
    if len(benchmarks) < len(benchmark or []) or "held_out" in benchmarks:
        raise typer.BadParameter("--benchmark names must differ, and not be held_out")
    if not benchmarks and not held_out:
        raise typer.BadParameter("nothing to measure: give --benchmark or --held-out")
    if sampled and not benchmarks:
        raise typer.BadParameter("--sampled decodes benchmarks: give --benchmark")
    no_effect(context, "without --benchmark", not benchmarks, *_OF_BENCHMARKS)
    no_effect(context, "without --held-out", not held_out, *_OF_HELD_OUT)
    no_effect(context, "without --skip-malformed", not skip_malformed, "max_left_out")
    check_out(out)
    if out.suffix in (".md", ".png"):
        raise typer.BadParameter(
            f"--out {out}: markdown and chart are put beside it; name it .json"
        )
    layers = parse_layers(aux_layers)
    arguments = parse_chat_template_args(chat_template_args)
    recorded = parse_sampled_by(sampled_by)
    rules = _rules(serving, temperature)
    published = find_target(compare_with or target)
    if compare_with and published is None:
        raise typer.BadParameter(
            f"--compare-with {compare_with!r} is none of {', '.join(PUBLISHED)}"
        )
    settings = Settings(
        heads=heads,
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
    from specforge_lk.evaluate.asked import Asked
    from specforge_lk.evaluate.render import write_all

    transformers.utils.logging.disable_progress_bar()
    left_out: dict[str, list[str]] = {}
    notes: list[str] = []
    model = Target.load(
        target,
        getattr(torch, dtype.value),
        find_device(device),
        trust_remote_code=trust_remote_code,
        chat_template_args=arguments,
    )
    drafts = [
        runner.LoadedDraft(loss, number, path, load_draft(path, model, layers))
        for loss, number, path in specs
    ]
    for line in _short_drafts(drafts, model.max_positions):
        say(line, "yellow", stderr=True)
    report = runner.run(
        model,
        target,
        drafts,
        Asked(
            benchmarks,
            held_out or (),
            rules,
            sampled=sampled,
            sampled_by=recorded,
            off_policy=off_policy,
            skip_malformed=skip_malformed,
            max_left_out=max_left_out,
            left_out=left_out,
            notes=notes,
        ),
        settings=settings,
        out=out,
        track=lambda what, total: ProgressBar(what, total, "tok/s"),
        command=["specforge-lk", *map(shlex.quote, sys.argv[1:])],
        published=published,
    )
    for note in notes:
        say(note, "yellow", stderr=True)
    _print(report)
    missing = [line for lines in left_out.values() for line in lines]
    name_left_out(missing)
    note = f"; {len(missing)} malformed rows left out" if missing else ""
    say(f"wrote {', '.join(map(str, write_all(report, out)))}{note}")


def _rules(serving: list[str] | None, temperature: list[float] | None) -> list[Serving] | None:
    """Return the rules asked for, each at every temperature; None where nothing is."""
    texts = serving or []
    if temperature:
        # Before anything is left out that has no effect at the rule's own temperature.
        texts = [f"{text},temperature={t}" for text in serving or [""] for t in temperature]
    return [parse_rule(text.lstrip(",")) for text in texts] or None


def _drafts(values: list[str]) -> list[tuple[str, int, str]]:
    """Return loss, training seed and folder of every ``--draft``."""
    named = [_named(value, "--draft", "LOSS=DIR") for value in values]
    specs = [(*_loss_and_seed(name), path) for name, path in named]
    if len({spec[:2] for spec in specs}) < len(specs):
        raise typer.BadParameter("two drafts have the same name; add @SEED to tell them apart")
    return specs


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
    for line in _warnings(report):
        say(line, "yellow")
    for title, (header, rows) in tables:
        table = Table(*map(escape, header), title=title)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)


def _short_drafts(drafts: Sequence[LoadedDraft], target_positions: int) -> Iterator[str]:
    """Yield of which drafts engines use less than the target's context."""
    for draft in drafts:
        config = json.loads((Path(draft.path) / "config.json").read_text(encoding="utf-8"))
        positions = config.get("max_position_embeddings")
        if isinstance(positions, int) and positions < target_positions:
            yield (
                f"draft {draft.path}: max_position_embeddings in its config.json is {positions}, "
                f"the target's {target_positions}: engines draft up to the draft's, or cut the "
                "target to it. Set it to the target's, unless the draft is for shorter contexts"
            )


#: Share of tokens without probability under the rule above which responses are doubted. At
#: temperature 0, arithmetic of another order makes another token of a near tie.
DOUBTED = 0.02


def _warnings(report: Report) -> Iterator[str]:
    """Yield what a reader of the figures has to know."""
    seen = set()
    for r in report.results:
        place = r.benchmark, r.serving
        behind = (r.generated_tokens or 0) - (r.responses or 0)
        if place in seen or r.off_policy or not r.off_rule_tokens or not behind:
            continue
        seen.add(place)
        if (share := r.off_rule_tokens / behind) > DOUBTED:
            yield (
                f"{r.benchmark}: {100 * share:.1f} % of the tokens have no probability under "
                f"{r.serving}. The responses may be of another model, or sampled in another dtype."
            )
