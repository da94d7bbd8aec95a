"""``specforge-lk losses``: what ``training.loss`` can name in this environment."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from specforge_lk.cli.shell import errors, missing, say

EXAMPLE = "specforge-lk losses --json"


@dataclass(frozen=True)
class Option:
    """One option of a loss, ``training.loss_options.<name>``.

    Attributes:
        name: Its name.
        values: What it may be, such as ``number > 0``.
        required: Whether it has no default.
        default: Its default; None also where it has none.
        algorithm_defaults: Default by algorithm (``training.strategy``), where it differs.
        meaning: What it does; "" if its plug-in does not say.
    """

    name: str
    values: str
    required: bool
    default: Any
    algorithm_defaults: dict[str, Any]
    meaning: str


@dataclass(frozen=True)
class Loss:
    """One loss that ``training.loss`` can name.

    Attributes:
        name: Its name.
        plugin: The plug-in that offers it, with its package.
        meaning: What it is, in one line; "" if its plug-in does not say.
        options: What ``training.loss_options`` may hold.
    """

    name: str
    plugin: str
    meaning: str
    options: list[Option]


@errors()
def run(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of text.")
    ] = False,
) -> None:
    """List the losses that training.loss can name here, with their options and defaults.

    They come from this package and from every other plug-in that is installed.
    """
    losses, problem = find_losses()
    if as_json:
        report = {"losses": [asdict(loss) for loss in losses], "problem": problem}
        typer.echo(json.dumps(report, indent=2, default=str))
        return
    for plugin, offered in groupby(losses, key=lambda loss: loss.plugin):
        say(f"{plugin}:\n")
        for loss in offered:
            _print(loss)
    say("Without training.loss an algorithm trains with its own loss.")
    if problem:
        say(problem, "yellow", stderr=True)


def find_losses() -> tuple[list[Loss], str | None]:
    """Return the losses of all plug-ins, and what keeps SpecForge from using them, if anything.

    Without a patched SpecForge the losses are those of this package only.
    """
    try:
        from specforge.losses import installed_loss_registry
        from specforge.plugins import plugin_owner
    except ImportError as error:
        from specforge_lk.losses import LOSSES

        problem = f"only this package's losses are listed, and not usable yet: {missing(error)}"
        return [_describe(loss, "specforge-lk") for loss in LOSSES], problem
    registry = installed_loss_registry()
    found = [
        _describe(registry.resolve(name), plugin_owner("losses", name)) for name in registry.names
    ]
    return sorted(found, key=lambda loss: (loss.plugin, loss.name)), None


def _describe(registration: Any, plugin: str) -> Loss:
    """Describe a ``LossRegistration``."""
    properties = registration.options.model_json_schema().get("properties", {})
    defaults = registration.algorithm_defaults
    options = [
        Option(
            name=name,
            values=_values(properties.get(field.alias or name, {})),
            required=field.is_required(),
            default=None if field.is_required() else field.get_default(call_default_factory=True),
            algorithm_defaults={
                algorithm: values[name] for algorithm, values in defaults.items() if name in values
            },
            meaning=" ".join((field.description or "").split()),
        )
        for name, field in registration.options.model_fields.items()
    ]
    said = inspect.getdoc(registration.build) or ""
    return Loss(registration.name, plugin, " ".join(said.partition("\n\n")[0].split()), options)


#: Bounds of a JSON schema, as they are written.
_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def _values(schema: dict[str, Any]) -> str:
    """Return what a field's JSON schema allows, such as ``head | token`` or ``number > 0``."""
    if "anyOf" in schema:
        return " | ".join(filter(None, map(_values, schema["anyOf"])))
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    kind = schema.get("type", "any")
    if kind == "null":  # the option is left out
        return ""
    bounds = [f"{sign} {schema[bound]:g}" for bound, sign in _BOUNDS.items() if bound in schema]
    return " ".join([kind, " and ".join(bounds)]).strip()


def _print(loss: Loss) -> None:
    console = Console()
    console.print(Text.assemble((loss.name, "bold"), "  ", loss.meaning))
    for option in loss.options:
        console.print(Padding(Text(f"{_setting(option)}: {option.values}"), (0, 0, 0, 4)))
        if option.meaning:
            console.print(Padding(Text(option.meaning), (0, 0, 0, 8)))
    console.print()


def _setting(option: Option) -> str:
    """Return an option with its default, or defaults."""
    if option.required:
        return f"{option.name} (required)"
    if option.default is None:
        shown = f"{option.name} (not set)"
    else:
        shown = f"{option.name}={option.default}"
    differs = [f"{name}: {value}" for name, value in option.algorithm_defaults.items()]
    return f"{shown} ({', '.join(differs)})" if differs else shown


__all__ = ["Loss", "Option", "find_losses", "run"]
