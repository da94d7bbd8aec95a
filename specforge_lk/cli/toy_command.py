"""``specforge-lk toy``: what the choice of loss does to a draft that is too small."""

import json
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table


def run(
    out: Annotated[
        Path,
        typer.Option(
            help="PNG to write: target, fit and their overlap for each loss.", metavar="PNG"
        ),
    ] = Path("toy.png"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the fits as JSON instead of a table.")
    ] = False,
) -> None:
    """Fit one Gaussian to three under KL, reverse KL and TV, and compare acceptance rates.

    The one Gaussian is a draft too small for its target. KL spreads it over all three modes,
    reverse KL puts it on one, TV (1 - the acceptance rate) makes the shared area largest.
    """
    from specforge_lk import toy

    if not out.parent.is_dir():
        raise typer.BadParameter(
            f"the folder {str(out.parent)!r} does not exist; create it or choose another file",
            param_hint="--out",
        )
    fits = toy.fit_all()
    try:
        toy.plot(fits, out)
    except ImportError:
        _fail("the figure needs matplotlib: pip install 'specforge-lk[plots]'")
    except OSError as error:
        _fail(f"--out {out}: {error.strerror}")
    if as_json:
        typer.echo(json.dumps(toy.as_json(fits), indent=2))
        return
    table = Table(title="One Gaussian fitted to a mixture of three")
    for heading in ("loss", "mean", "std", "acceptance rate α"):
        table.add_column(heading, justify="left" if heading == "loss" else "right")
    for fitted in fits:
        table.add_row(fitted.loss, f"{fitted.mean:.3f}", f"{fitted.std:.3f}", f"{fitted.alpha:.1%}")
    console = Console()
    console.print(table)
    console.print(f"figure: {out}", highlight=False)


def _fail(message: str) -> NoReturn:
    Console(stderr=True).print(message, style="red", markup=False, highlight=False)
    raise typer.Exit(1)
