"""Options that several commands have, and what becomes of those that have no effect."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Any

import typer

from specforge_lk.cli.shell import say
from specforge_lk.data.jsonl import MOST_LEFT_OUT
from specforge_lk.serving import Sampling, Serving, parse, without_effect


class Dtype(StrEnum):
    """Floating-point types that a model can be loaded in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def device_option(panel: str | None = None) -> Any:
    """Return the option ``--device``; its default is ``auto``."""
    text = "Torch device, such as cpu or cuda; auto takes a GPU if there is one."
    return typer.Option("--device", help=text, rich_help_panel=panel)


def trust_remote_code_option(panel: str | None = None) -> Any:
    """Return the flag ``--trust-remote-code``."""
    text = "Run model code that comes with the target."
    return typer.Option("--trust-remote-code", help=text, rich_help_panel=panel)


TargetPath = Annotated[str, typer.Option(help="Target model: a directory or a hub id.")]
Device = Annotated[str, device_option()]
TrustRemoteCode = Annotated[bool, trust_remote_code_option()]
ChatTemplateArgs = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help='Further arguments of the chat template as JSON, such as {"enable_thinking": false}. '
        "Engines call them chat_template_kwargs. Give capture, generate and eval the same.",
        rich_help_panel="Chat template",
    ),
]
SkipMalformed = Annotated[
    bool,
    typer.Option(
        "--skip-malformed",
        help="Leave out rows that cannot be used, and count them; otherwise the first is an error.",
    ),
]
MaxLeftOut = Annotated[
    float,
    typer.Option(
        metavar="SHARE",
        min=0,
        max=1,
        help="Largest share of a file's rows that may be left out; more are an error.",
    ),
]
SampledBy = Annotated[
    str | None,
    typer.Option(
        metavar="SAMPLING",
        help="What held-out responses were sampled by that do not say it, such as temperature=1: "
        "older files do not.",
    ),
]
OffPolicy = Annotated[
    bool,
    typer.Option(
        "--off-policy",
        help="Measure along held-out responses that are no samples of the rule. The figures are "
        "not what decoding will meet, and the report says so.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Config overrides, as for specforge train: section.field=value."),
]


def no_effect(context: typer.Context, where: str, applies: bool, *names: str) -> None:
    """Name options that were given and have no effect.

    Args:
        context: the call's.
        where: what makes it so, such as ``without --held-out``.
        applies: whether that is so in this call.
        names: the options' parameters.
    """
    for parameter in context.command.params if applies else ():
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name in names and source is not None and source.name == "COMMANDLINE":
            say(f"{parameter.opts[0]} has no effect {where}", "yellow", stderr=True)


def parse_rule(text: str, option: str = "--serving") -> Serving:
    """Return a serving rule, and name what of its text has no effect.

    Raises:
        typer.BadParameter: it is none.
    """
    try:
        rule = parse(text)
    except ValueError as error:
        raise typer.BadParameter(f"{option}: {error}") from None
    for setting in without_effect(text):
        say(f"{option} {text}: {setting} has no effect in this rule, {rule}", "yellow", stderr=True)
    return rule


def parse_sampled_by(text: str | None) -> Sampling | None:
    """Return the sampling of ``--sampled-by``.

    Raises:
        typer.BadParameter: it is none, or says something of a draft.
    """
    if text is None:
        return None
    rule = parse_rule(text, "--sampled-by")
    about_draft = [part for part in text.split(",") if part.strip().startswith(("draft", "verif"))]
    if about_draft:
        raise typer.BadParameter(
            f"--sampled-by {text}: {', '.join(about_draft)} says nothing of how responses were "
            "sampled; leave it out"
        )
    return rule.target


def parse_chat_template_args(value: str | None) -> dict[str, Any]:
    """Return the arguments of ``--chat-template-args``; none where it is not given."""
    from specforge_lk.data.chat_template import check_arguments

    try:
        found = json.loads(value) if value else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise typer.BadParameter(
            f'--chat-template-args {value!r} is no JSON object such as {{"enable_thinking": false}}'
        )
    try:
        check_arguments(found)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return found


def parse_layers(value: str | None) -> tuple[int, ...] | None:
    """Return the layers of ``--aux-layers``."""
    try:
        return tuple(int(layer) for layer in value.split(",")) if value else None
    except ValueError:
        raise typer.BadParameter(f"--aux-layers {value!r} is not like 1,14,26") from None


__all__ = [
    "MOST_LEFT_OUT",
    "ChatTemplateArgs",
    "Device",
    "Dtype",
    "MaxLeftOut",
    "OffPolicy",
    "Overrides",
    "SampledBy",
    "SkipMalformed",
    "TargetPath",
    "TrustRemoteCode",
    "device_option",
    "no_effect",
    "parse_chat_template_args",
    "parse_layers",
    "parse_rule",
    "parse_sampled_by",
    "trust_remote_code_option",
]
