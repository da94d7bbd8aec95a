"""The paper's example: one Gaussian fitted to a mixture of three under different losses.

``python -m experiments.gaussian --out FIGURE.png``

A draft of small capacity cannot match its target, and then the objective decides what it gives
up. The real line stands in for the vocabulary: a fine grid of points, the target's density as
its logits, the Gaussian's as the draft's. So the losses under test are those of training.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Final, NoReturn

import torch
import typer
from rich.console import Console
from rich.table import Table

from specforge_lk.files import atomic_write
from specforge_lk.losses import LOSSES, DraftLoss, Terms

# (weight, mean, standard deviation). The paper gives no figures; these give back its results.
MIXTURE: Final = ((0.5, -4.0, 1.0), (0.25, 0.0, 0.5), (0.25, 6.0, 0.5))
FITTED_LOSSES: Final = ("kl", "reverse_kl", "tv")

_STEP: Final = 0.01
_GRID: Final = torch.arange(-30, 30 + _STEP, _STEP, dtype=torch.float64)


@dataclass(frozen=True)
class GaussianFit:
    """The Gaussian that minimizes a loss.

    Attributes:
        loss: the loss's registered name.
        mean: of the Gaussian.
        std: its standard deviation.
        alpha: its acceptance rate, the area it shares with the target.
    """

    loss: str
    mean: float
    std: float
    alpha: float


@dataclass
class _MixtureTarget:
    """The mixture as the target of ``len(log_normalizer)`` positions over the grid vocabulary."""

    logits: torch.Tensor
    log_normalizer: torch.Tensor
    log_coverage: torch.Tensor
    labels: torch.Tensor | None = None


def target_density(x: torch.Tensor) -> torch.Tensor:
    """Return the density of the mixture at ``x``."""
    weights, means, stds = torch.tensor(MIXTURE, dtype=x.dtype).T
    parts = _gaussian_logits(x[..., None], means, stds).exp() / (stds * (2 * torch.pi) ** 0.5)
    return (weights * parts).sum(-1)


def _gaussian_logits(
    x: torch.Tensor, mean: torch.Tensor | float, std: torch.Tensor | float
) -> torch.Tensor:
    return -0.5 * ((x - mean) / std) ** 2


def _evaluate(loss: DraftLoss, mean: torch.Tensor, log_std: torch.Tensor) -> tuple[Terms, Terms]:
    """Return terms and combined loss, [n], of n Gaussians."""
    count = len(mean)
    logits = target_density(_GRID).log()
    log_normalizer = logits.logsumexp(-1)
    target = _MixtureTarget(
        logits.expand(count, -1), log_normalizer.expand(count), torch.zeros(count).double()
    )
    draft_logits = _gaussian_logits(_GRID, mean[:, None], log_std.exp()[:, None])
    terms = loss.terms(draft_logits, target, torch.ones(count, dtype=torch.bool))
    return terms, loss.combine(terms, lambda values: values.detach().mean())


def fit(name: str) -> GaussianFit:
    """Fit the Gaussian under the loss named ``name``: best of a coarse grid, then L-BFGS."""
    record = next(record for record in LOSSES if record.name == name)
    loss = record.build(record.options())

    means, log_stds = torch.meshgrid(
        torch.linspace(-8, 8, 17, dtype=torch.float64),
        torch.linspace(0.3, 6, 12, dtype=torch.float64).log(),
        indexing="ij",
    )
    best = _evaluate(loss, means.flatten(), log_stds.flatten())[1]["loss"].argmin()
    mean = means.flatten()[best, None].clone().requires_grad_()
    log_std = log_stds.flatten()[best, None].clone().requires_grad_()
    optimizer = torch.optim.LBFGS((mean, log_std), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = _evaluate(loss, mean, log_std)[1]["loss"].sum()
        value.backward()
        return value

    optimizer.step(closure)
    with torch.no_grad():
        alpha = _evaluate(loss, mean, log_std)[0]["alpha"].item()
    return GaussianFit(name, mean.item(), log_std.exp().item(), alpha)


def fit_all() -> list[GaussianFit]:
    """Return the three fits of the paper's figure."""
    return [fit(name) for name in FITTED_LOSSES]


def plot(fits: Sequence[GaussianFit], path: Path) -> None:
    """Draw target, fit and their overlap for each fit, side by side, to a PNG at ``path``."""
    from matplotlib.figure import Figure

    titles = {"kl": "KL", "reverse_kl": "reverse KL", "tv": "TV (1 - α)"}
    x = _GRID[(_GRID >= -10) & (_GRID <= 10)]
    p = target_density(x)
    figure = Figure(figsize=(4 * len(fits), 3.2), layout="constrained")
    for axes, fitted in zip(figure.subplots(1, len(fits), sharey=True), fits, strict=True):
        q = _gaussian_logits(x, fitted.mean, fitted.std).exp()
        q = q / (fitted.std * (2 * torch.pi) ** 0.5)
        axes.plot(x, p, color="tab:blue", label="target p")
        axes.plot(x, q, color="tab:orange", linestyle="--", label="fit q")
        overlap = torch.minimum(p, q)
        axes.fill_between(x, overlap, color="tab:green", alpha=0.35, label="overlap = α")
        axes.set_title(f"{titles[fitted.loss]}: α = {fitted.alpha:.1%}")
        axes.set_xlabel("x")
    figure.axes[0].set_ylabel("density")
    figure.axes[0].legend(loc="upper right", fontsize="small")

    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _as_json(fits: Sequence[GaussianFit]) -> dict[str, object]:
    """Return the fits, with the target they were fitted to, as JSON can hold them."""
    keys = ("weight", "mean", "std")
    return {
        "target": [dict(zip(keys, part, strict=True)) for part in MIXTURE],
        "fits": [asdict(fitted) for fitted in fits],
    }


app = typer.Typer()


@app.command()
def main(
    out: Annotated[
        Path,
        typer.Option(
            help="PNG to write: target, fit and their overlap for each loss.", metavar="PNG"
        ),
    ] = Path("gaussian.png"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the fits as JSON instead of a table.")
    ] = False,
) -> None:
    """Fit one Gaussian to three under KL, reverse KL and TV, and compare acceptance rates.

    The one Gaussian is a draft too small for its target. KL spreads it over all three modes,
    reverse KL puts it on one, TV (1 - the acceptance rate) makes the shared area largest.
    """
    if not out.parent.is_dir():
        raise typer.BadParameter(
            f"the folder {str(out.parent)!r} does not exist; create it or choose another file",
            param_hint="--out",
        )
    fits = fit_all()
    try:
        plot(fits, out)
    except ImportError:
        _fail("the figure needs matplotlib: pip install '.[plots]' in the clone")
    except OSError as error:
        _fail(f"--out {out}: {error.strerror}")
    if as_json:
        typer.echo(json.dumps(_as_json(fits), indent=2))
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


if __name__ == "__main__":
    app()
