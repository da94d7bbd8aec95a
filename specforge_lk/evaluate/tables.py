"""The tables of a report: header and rows, for markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from specforge_lk.evaluate import published
from specforge_lk.evaluate.report import HELD_OUT, Paired, Report, Result

#: Header and rows.
Table = tuple[list[str], list[list[str]]]


def number(value: float | None, digits: int = 3) -> str:
    """Return a figure as text; a dash for one that was not measured."""
    return "–" if value is None else f"{value:.{digits}f}"


def _interval(ci: list[float] | None, digits: int = 3) -> str:
    return "" if ci is None else f" [{ci[0]:.{digits}f}, {ci[1]:.{digits}f}]"


def _positions(alphas: Sequence[float | None]) -> str:
    return " / ".join(number(alpha) for alpha in alphas)


def _table_order(result: Result) -> tuple:
    return (result.benchmark == HELD_OUT, result.benchmark, result.temperature)


def result_rows(report: Report) -> Table:
    """Header and rows of all results, benchmarks first.

    Training seed and drafting are columns only where they vary.
    """
    header = ["benchmark", "T", "draft", "seed", "drafting", "τ [95 %]", "α per head", "coverage"]
    rows = []
    for r in sorted(report.results, key=_table_order):
        held_out = r.benchmark == HELD_OUT
        interval = r.tau_expected_ci if held_out else r.tau_ci
        rows.append(
            [
                "held-out (exact)" if held_out else r.benchmark,
                f"{r.temperature:g}",
                f"{r.algorithm} {r.loss}",
                str(r.seed),
                r.draft_sampling,
                number(r.measured_tau) + _interval(interval),
                _positions(r.alpha_per_head),
                number(r.coverage),
            ]
        )
    return _without_constant(header, rows)


def _without_constant(
    header: list[str], rows: list[list[str]], names: Sequence[str] = ("seed", "drafting")
) -> Table:
    """Drop the named columns that hold a single value."""
    kept = [
        i for i, name in enumerate(header) if name not in names or len({row[i] for row in rows}) > 1
    ]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def paired_rows(report: Report) -> Table:
    """Header and rows of the table of paired differences.

    "of τ - 1" is the difference as a share of what the baseline's draft adds to a verification
    step.
    """
    header = ["benchmark", "T", "seed", "drafting", "draft", "against", "Δ τ [95 %]"]
    header += ["of τ - 1", "over"]
    rows = []
    for p in report.paired:
        held_out = p.benchmark == HELD_OUT
        share = relative_difference(report, p)
        rows.append(
            [
                "held-out (exact)" if held_out else p.benchmark,
                f"{p.temperature:g}",
                str(p.seed),
                p.draft_sampling,
                f"{p.algorithm} {p.loss}",
                p.baseline,
                f"{p.difference:+.4f} [{p.ci[0]:+.4f}, {p.ci[1]:+.4f}]",
                "–" if share is None else f"{100 * share:+.1f} %",
                f"{p.chain_starts} chain starts" if held_out else f"{p.prompts} prompts",
            ]
        )
    return _without_constant(header, rows)


def relative_difference(report: Report, paired: Paired) -> float | None:
    """The difference over the baseline's τ - 1; None where that is not in the report, or 0."""
    same = ("algorithm", "seed", "benchmark", "temperature", "draft_sampling")
    for r in report.results:
        if r.loss == paired.baseline and all(getattr(r, n) == getattr(paired, n) for n in same):
            tau = r.measured_tau
            return paired.difference / (tau - 1) if tau and tau != 1 else None
    return None


def published_rows(report: Report) -> Table:
    """Header and rows of sampled τ beside the paper's, a row per draft and T.

    There are no rows where the paper has no figure. The mean is there once all three benchmarks
    are measured.
    """
    header = ["T", "draft", "seed", "drafting", "K (paper)"]
    header += [f"{name} (paper)" for name in (*published.BENCHMARKS, "mean")]
    measured: dict[tuple, dict[int, float]] = {}
    for r in sorted(report.results, key=_table_order):
        benchmark = published.find_benchmark(r.benchmark)
        if r.tau is not None and benchmark is not None:
            key = (r.temperature, r.algorithm, r.loss, r.seed, r.draft_sampling, r.heads)
            measured.setdefault(key, {})[benchmark] = r.tau
    drafts = published.PUBLISHED.get(report.published or "", {})
    rows = []
    for (temperature, algorithm, loss, seed, sampling, heads), taus in measured.items():
        paper = drafts.get((algorithm, loss), {}).get(temperature)
        if paper is None:
            continue
        count = len(published.BENCHMARKS)
        ours = [taus.get(benchmark) for benchmark in range(count)]
        ours.append(mean(taus.values()) if len(taus) == count else None)
        theirs = [*(paper.each or [None] * count), paper.mean]
        rows.append(
            [
                f"{temperature:g}",
                f"{algorithm} {loss}",
                str(seed),
                sampling,
                f"{heads} ({published.HEADS[algorithm]})",
                *(f"{number(a, 2)} ({number(b, 2)})" for a, b in zip(ours, theirs, strict=True)),
            ]
        )
    return _without_constant(header, rows)


def _over_seeds(values: Sequence[float | None], form: str = ".3f") -> str:
    """Return the mean of one value per seed, and the least and the greatest of them."""
    found = [value for value in values if value is not None]
    if not found:
        return "–"
    return f"{mean(found):{form}} [{min(found):{form}}, {max(found):{form}}]"


def seed_rows(report: Report) -> Table:
    """Header and rows of the summary over training seeds: a row per algorithm, loss and T."""
    benchmarks = list(dict.fromkeys(r.benchmark for r in report.results if r.tau is not None))
    paired = [p for p in report.paired if p.benchmark == HELD_OUT]
    baselines = list(dict.fromkeys(p.baseline for p in paired))
    header = ["T", "drafting", "draft", "seeds", "expected τ", "α per head"]
    header += [f"Δ expected τ to {name}" for name in baselines] + [f"τ {b}" for b in benchmarks]
    groups: dict[tuple, list[Result]] = {}
    for r in sorted(report.results, key=lambda r: r.temperature):
        groups.setdefault(_across_seeds(r), []).append(r)
    order = list(dict.fromkeys(r.algorithm for r in report.results))
    rows = []
    for key in sorted(groups, key=lambda key: (order.index(key[0]), key[1])):
        algorithm, temperature, sampling, loss = key
        results = groups[key]
        held_out = [r for r in results if r.benchmark == HELD_OUT]
        row = [f"{temperature:g}", sampling, f"{algorithm} {loss}"]
        row += [str(len({r.seed for r in results}))]
        row += [_over_seeds([r.tau_expected for r in held_out])]
        row += [_positions(mean_alphas(held_out))]
        for baseline in baselines:
            pairs = [p for p in paired if _across_seeds(p) == key and p.baseline == baseline]
            row.append(_over_seeds([p.difference for p in pairs], "+.4f"))
        for benchmark in benchmarks:
            row.append(_over_seeds([r.tau for r in results if r.benchmark == benchmark]))
        rows.append(row)
    return _without_constant(header, rows, ("drafting",))


def _across_seeds(of: Result | Paired) -> tuple[str, float, str, str]:
    """What the training seeds of one draft have in common."""
    return of.algorithm, of.temperature, of.draft_sampling, of.loss


def mean_alphas(results: Sequence[Result]) -> list[float | None]:
    """Return α per draft position, the mean over results; None where one of them has none."""
    positions = zip(*(r.alpha_per_head for r in results), strict=True)
    means: list[float | None] = []
    for alphas in positions:
        known = [alpha for alpha in alphas if alpha is not None]
        means.append(mean(known) if len(known) == len(alphas) else None)
    return means


def gain_rows(report: Report) -> Table:
    """Header and rows of the gains over KL in percent, ours beside the paper's.

    The gains are those of τ, and of τ - 1, what the draft adds. Ours are means over training
    seeds, with the least and the greatest: of the exact expected τ on held-out responses, and of
    sampled τ, the mean of the benchmarks.
    """
    header = ["T", "draft", "paper: τ", "τ - 1", "expected τ", "expected τ - 1", "sampled τ"]
    rows = []
    for algorithm, target in report.gains.items():
        paper = published.PUBLISHED[target]
        drafts = dict.fromkeys(
            (r.temperature, r.loss)
            for r in sorted(report.results, key=lambda r: r.temperature)
            if r.algorithm == algorithm and r.loss != published.GAIN_BASELINE
        )
        for temperature, loss in drafts:
            pair = [(algorithm, loss), (algorithm, published.GAIN_BASELINE)]
            theirs, kl = (paper.get(draft, {}).get(temperature) for draft in pair)
            row = [f"{temperature:g}", f"{algorithm} {loss}"]
            for base in (0, 1):
                row.append(_published_gain(theirs, kl, base))
            for held_out, base in ((True, 0), (True, 1), (False, 0)):
                a, b = (_tau_by_seed(report, draft, temperature, held_out) for draft in pair)
                gains = [_percent(a[seed], b[seed], base) for seed in a if seed in b]
                row.append(_over_seeds(gains, "+.1f"))
            rows.append(row)
    return header, rows


def _published_gain(tau: published.Tau | None, kl: published.Tau | None, base: int) -> str:
    if tau is None or kl is None:
        return "–"
    return f"{_percent(tau.mean, kl.mean, base):+.1f}"


def _tau_by_seed(
    report: Report, draft: tuple[str, str], temperature: float, held_out: bool
) -> dict[int, float]:
    """By training seed: expected τ on held-out responses, or the mean sampled τ of benchmarks."""
    found: dict[int, list[float]] = {}
    for r in report.results:
        tau = r.tau_expected if held_out else r.tau
        if (r.algorithm, r.loss) == draft and r.temperature == temperature and tau is not None:
            found.setdefault(r.seed, []).append(tau)
    return {seed: mean(taus) for seed, taus in found.items()}


def _percent(value: float, baseline: float, base: float) -> float:
    """Gain of ``value - base`` over ``baseline - base``, in percent."""
    return 100 * ((value - base) / (baseline - base) - 1)


__all__ = [
    "Table",
    "gain_rows",
    "mean_alphas",
    "number",
    "paired_rows",
    "published_rows",
    "relative_difference",
    "result_rows",
    "seed_rows",
]
