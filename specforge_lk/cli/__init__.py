"""The ``specforge-lk`` command. One module per subcommand; heavy imports stay inside them."""

from __future__ import annotations

import importlib

import typer

#: Subcommand -> module that defines a typer ``app``; the order is that of ``--help``.
_COMMANDS = ("patch", "data", "generate", "capture", "eval", "cost")

app = typer.Typer(
    name="specforge-lk",
    help=(
        "Train SpecForge draft models on the acceptance rate itself (LK losses). "
        "Training stays `specforge train`; these commands do what surrounds it."
    ),
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name in _COMMANDS:
    _module = importlib.import_module(f"specforge_lk.cli.{_name}")
    if hasattr(_module, "app"):
        app.add_typer(_module.app, name=_name)
    else:
        app.command(_name)(_module.run)


def main() -> None:
    """Console entry point."""
    app()


__all__ = ["app", "main"]
