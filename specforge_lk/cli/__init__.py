"""The ``specforge-lk`` command: one module per subcommand, with heavy imports inside functions.

A module has a function ``run`` and an ``EXAMPLE`` of its use, or a typer ``app``.
"""

from __future__ import annotations

import importlib
from typing import Annotated

import typer

from specforge_lk import __version__
from specforge_lk.cli.shell import example

#: The subcommands in the order of ``--help``.
_COMMANDS = (
    *("patch", "losses", "data", "generate", "import-draft", "capture", "eval", "doctor", "cost"),
)

app = typer.Typer(
    name="specforge-lk",
    help=(
        "Train SpecForge draft models on the acceptance rate itself (LK losses). "
        "Training stays `specforge train`; these commands do what surrounds it."
    ),
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name in _COMMANDS:
    _module = importlib.import_module(f"specforge_lk.cli.{_name.replace('-', '_')}")
    if hasattr(_module, "app"):
        app.add_typer(_module.app, name=_name)
    else:
        app.command(_name, epilog=example(_module.EXAMPLE))(_module.run)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"specforge-lk {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Console entry point."""
    app()


__all__ = ["app", "main"]
