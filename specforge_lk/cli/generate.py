"""``specforge-lk generate``: sample a target's responses to prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specforge_lk.cli.options import (
    MOST_LEFT_OUT,
    ChatTemplateArgs,
    Dtype,
    MaxLeftOut,
    SkipMalformed,
    device_option,
    no_effect,
    parse_chat_template_args,
    parse_rule,
    trust_remote_code_option,
)
from specforge_lk.cli.progress import ProgressBar
from specforge_lk.cli.shell import check_out, errors, find_device, name_left_out, say

if TYPE_CHECKING:
    from specforge_lk.data.jsonl import Place
    from specforge_lk.data.responses import Prompt, Request, ResponseFile, StoredResponse
    from specforge_lk.data.rows import LeftOut
    from specforge_lk.data.sample_server import RefusedPrompt, Server
    from specforge_lk.serving import Sampling

EXAMPLE = """\
specforge-lk generate --target Qwen/Qwen3-8B --prompts prompts.jsonl --out out.jsonl
specforge-lk generate --target Qwen/Qwen3-8B --prompts prompts.jsonl --temperature 0 --out t0.jsonl
specforge-lk generate --server http://localhost:30000 --prompts prompts.jsonl --out out.jsonl"""
_LOCAL, _SERVER = "Local transformers", "Server"
_LOCAL_OPTIONS = ("batch_size", "dtype", "device", "trust_remote_code")
_SERVER_OPTIONS = ("concurrency", "timeout", "retries", "skip_refused", "extensions", "api_key")


@errors(memory="lower --batch-size or --max-new-tokens")
def run(
    context: typer.Context,
    prompts: Annotated[
        Path,
        typer.Option(
            help='JSONL (or .jsonl.gz) of prompts: {"id": ..., "prompt": ...}, or with "messages" '
            'that wait for an answer, and "tools".'
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="JSONL of responses to write. An interrupted run continues it."),
    ],
    target: Annotated[
        str | None,
        typer.Option(
            help="Hugging Face folder or hub id of the target model. With --server: the name that "
            "the server has for it; its only model by default.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="1 samples the target's own distribution, 0 takes the likeliest tokens.",
            show_default="1.0",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Sample from the likeliest tokens only, this many; 0 for all. It comes before "
            "top-p.",
            show_default="0",
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the likeliest tokens only, the fewest that have this probability "
            "together; 1 for all.",
            show_default="1.0",
        ),
    ] = None,
    serving: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help="Sample as the target is served: the text that `eval --serving` takes, in place "
            "of the three options above. What it says about the draft changes no response.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Longest response, in tokens. Longer ones are cut there, and a draft learns "
            "nothing about what would follow.",
        ),
    ] = 160,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of the sampling. With local transformers it decides every response, "
            "together with the prompt's id; a server may sample others."
        ),
    ] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")] = None,
    skip_malformed: SkipMalformed = False,
    max_left_out: MaxLeftOut = MOST_LEFT_OUT,
    chat_template_args: ChatTemplateArgs = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Responses sampled side by side.", rich_help_panel=_LOCAL)
    ] = 64,
    dtype: Annotated[
        Dtype,
        typer.Option(
            help="float32, bfloat16 or float16. On a CPU, bfloat16 is fast only where the "
            "processor has it (AMX, AVX512-BF16).",
            metavar="TYPE",
            rich_help_panel=_LOCAL,
        ),
    ] = Dtype.FLOAT32,
    device: Annotated[str, device_option(_LOCAL)] = "auto",
    trust_remote_code: Annotated[bool, trust_remote_code_option(_LOCAL)] = False,
    server: Annotated[
        str | None,
        typer.Option(
            help="Address of an OpenAI-compatible server (SGLang, vLLM, ...) to sample from, "
            "instead of local transformers.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Most requests under way at once.", rich_help_panel=_SERVER)
    ] = 64,
    timeout: Annotated[
        float,
        typer.Option(min=0.1, help="Seconds that one response may take.", rich_help_panel=_SERVER),
    ] = 600.0,
    retries: Annotated[
        int,
        typer.Option(
            min=0,
            help="How often a request is retried after lost connections, timeouts and the "
            "statuses 429 and 5xx, with growing pauses.",
            rich_help_panel=_SERVER,
        ),
    ] = 10,
    skip_refused: Annotated[
        bool,
        typer.Option(
            "--skip-refused",
            help="Leave out prompts that the server refuses, such as too long ones, and name them.",
            rich_help_panel=_SERVER,
        ),
    ] = False,
    extensions: Annotated[
        bool,
        typer.Option(
            help="Send what SGLang and vLLM have beyond the OpenAI protocol: they return token "
            "ids then, and truncate the distribution by --top-k and --top-p alone. Without it, "
            "rows do not say how they were sampled.",
            rich_help_panel=_SERVER,
        ),
    ] = True,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="OPENAI_API_KEY",
            help="Key that the server asks for, sent as bearer token.",
            show_default=False,
            rich_help_panel=_SERVER,
        ),
    ] = None,
) -> None:
    """Sample the target's responses to prompts, as training data for a draft.

    A draft is trained on the target's own responses, sampled at temperature 1. It is measured on
    responses that are sampled as the target will be served. Rows are SpecForge conversations with
    the sampled token ids, and say how they were sampled. Run the same command again after an
    interruption: finished responses are kept.
    """
    from specforge_lk.data.jsonl import open_lines
    from specforge_lk.data.prompts import read_prompts
    from specforge_lk.data.responses import Request, ResponseFile, pending, settings_of
    from specforge_lk.data.rows import LeftOut

    sampling = _sampling(serving, temperature, top_k, top_p)
    no_effect(context, "without --server", server is None, *_SERVER_OPTIONS)
    no_effect(context, "with --server", server is not None, *_LOCAL_OPTIONS)
    no_effect(context, "without --skip-malformed", not skip_malformed, "max_left_out")
    greedy = sampling.temperature == 0
    no_effect(context, "at temperature 0", greedy, "top_k", "top_p", "seed")
    check_out(out)
    if server is not None and not extensions and sampling.top_k:
        raise typer.BadParameter(
            "top-k is no part of the OpenAI protocol; leave out --no-extensions, or top-k"
        )
    request = Request(sampling, max_new_tokens, seed, parse_chat_template_args(chat_template_args))
    malformed = LeftOut(skip_malformed, max_left_out)
    placed = read_prompts(prompts, malformed, limit, request.chat_template_args)
    malformed.check(prompts)
    rows = list(placed.values())
    sample: Callable[[Sequence[Prompt], Request, ResponseFile], int]
    if server is not None:
        from specforge_lk.data.sample_server import Server

        source = Server(
            *(server, api_key, concurrency, timeout, retries, extensions),
            note=lambda text: say(text, "yellow", stderr=True),
        )
        target = target or source.only_model()
        sample = partial(_sample_from, source, target, skip_refused)
    elif target is None:
        raise typer.BadParameter("give --target, or --server")
    else:
        places = {prompt["id"]: place for place, prompt in placed.items()}
        sample = partial(
            _sample_here,
            *(target, dtype, device, trust_remote_code, batch_size, places, malformed),
        )
    with open_lines(
        out, settings_of(target, "server" if server else dtype.value, request)
    ) as lines:
        stored = ResponseFile(lines)
        todo = pending(rows, stored)
        before = len(stored.answered)
        refused = sample(todo, request, stored) if todo else 0
        new = len(stored.answered) - before
    wanted = [stored.answered[row["id"]] for row in rows if row["id"] in stored.answered]
    name_left_out(malformed.left_out)
    line = _summary(wanted, new, refused, out)
    if malformed.left_out:
        line += f"; {len(malformed.left_out)} malformed prompts left out"
    typer.echo(line)


def _sampling(
    serving: str | None, temperature: float | None, top_k: int | None, top_p: float | None
) -> Sampling:
    """Return the sampling that the options ask for; None stands for an option not given."""
    from specforge_lk.serving import Sampling

    if serving is None:
        return Sampling(
            1.0 if temperature is None else temperature, top_k or 0, 1.0 if top_p is None else top_p
        )
    options = {"--temperature": temperature, "--top-k": top_k, "--top-p": top_p}
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise typer.BadParameter(f"give --serving or {', '.join(given)}, not both")
    return parse_rule(serving).target


def _sample_here(
    target: str,
    dtype: Dtype,
    device: str,
    trust_remote_code: bool,
    batch_size: int,
    places: Mapping[str, Place],
    malformed: LeftOut,
    prompts: Sequence[Prompt],
    request: Request,
    stored: ResponseFile,
) -> int:
    """Sample with local transformers, no prompt of which is refused later than malformed ones."""
    from specforge_lk.data.jsonl import RowError
    from specforge_lk.data.rows import MalformedRow
    from specforge_lk.data.sample_local import chat_of, fits, sample_responses
    from specforge_lk.target import load_target

    model, tokenizer = load_target(
        target, dtype.value, find_device(device), trust_remote_code=trust_remote_code
    )
    chat = chat_of(model, tokenizer, request)
    usable = []
    for prompt in prompts:  # all of them before hours of sampling
        try:
            fits(model, chat, prompt, request)
            usable.append(prompt)
        except MalformedRow as error:
            malformed.rows -= 1  # it was counted as usable
            malformed.refuse(RowError(f"{places[prompt['id']]}: {error}"))
    malformed.check(places[prompts[0]["id"]].path)
    with _progress(usable, request) as bar:
        for start in range(0, len(usable), batch_size):
            batch = usable[start : start + batch_size]
            stored.append(sample_responses(model, tokenizer, batch, request, advance=bar.advance))
    return 0


def _sample_from(
    server: Server,
    target: str,
    skip_refused: bool,
    prompts: Sequence[Prompt],
    request: Request,
    stored: ResponseFile,
) -> int:
    """Sample from a server and return how many prompts it refused."""
    refused = 0
    with _progress(prompts, request) as bar:

        def leave_out(error: RefusedPrompt) -> None:
            nonlocal refused
            refused += 1
            bar.print(str(error))

        replace(server, note=bar.note).respond(
            target,
            prompts,
            request,
            save=stored.append,
            advance=bar.advance,
            refused=leave_out if skip_refused else None,
        )
    return refused


def _progress(prompts: Sequence[Prompt], request: Request) -> ProgressBar:
    return ProgressBar("sampling", len(prompts) * request.max_new_tokens, "tok/s")


def _summary(responses: list[StoredResponse], new: int, refused: int, out: Path) -> str:
    """Return the line that ends the command."""
    tokens = sum(response.tokens or 0 for response in responses)
    finished = sum(response.finished for response in responses)
    line = f"{len(responses)} responses ({new} new, {finished} finished), {tokens} tokens: {out}"
    if refused:
        line += f"; {refused} prompts were refused"
    if without := sum(response.tokens is None for response in responses):
        line += f"; {without} without token ids, whose text `capture` will tokenize"
    return line
