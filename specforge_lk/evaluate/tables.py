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


def name_of(of: Result | Paired) -> str:
    """Return the benchmark's name in a table, with what its responses are where not the rule's."""
    if of.benchmark != HELD_OUT:
        return of.benchmark
    if of.off_policy:
        return f"held-out, of responses at {of.off_policy}"
    return "held-out" if of.serving else "held-out (exact)"


def drafting_of(of: Result | Paired) -> str:
    """Return how a draft chooses its tokens; "" at temperature 0, where all do the same."""
    return "" if of.serving and of.temperature == 0 else of.draft_sampling


def rule_of(of: Result | Paired) -> str:
    """Return what the serving rule has beside temperature and drafting."""
    settings = (of.serving or "").split(",")
    return ", ".join(s for s in settings if not s.startswith(("temperature=", "drafting=")))


def result_rows(report: Report) -> Table:
    """Header and rows of all results, benchmarks first.

    Training seed, rule and method are columns only where they vary.
    """
    header = ["benchmark", "T", "draft", "seed", "drafting", "rule", "measured", "τ [95 %]"]
    header += ["α per head", "coverage"]
    rows = []
    for r in sorted(report.results, key=_table_order):
        rows.append(
            [
                name_of(r),
                f"{r.temperature:g}",
                f"{r.algorithm} {r.loss}",
                str(r.seed),
                drafting_of(r),
                rule_of(r),
                r.method or "",
                number(r.measured_tau) + _interval(r.measured_interval),
                _positions(r.alpha_per_head),
                number(r.coverage),
            ]
        )
    return _without_constant(header, rows)


def _without_constant(
    header: list[str],
    rows: list[list[str]],
    names: Sequence[str] = ("seed", "drafting", "rule", "measured"),
) -> Table:
    """Drop the named columns that hold a single value; a drafting of "" is any."""

    def varies(column: int) -> bool:
        values = {row[column] for row in rows}
        return len(values - {""} if header[column] == "drafting" else values) > 1

    kept = [i for i, name in enumerate(header) if name not in names or varies(i)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def paired_rows(report: Report) -> Table:
    """Header and rows of the table of paired differences.

    "of τ - 1" is the difference as a share of what the baseline's draft adds to a verification
    step.
    """
    header = ["benchmark", "T", "seed", "drafting", "rule", "measured", "draft", "against"]
    header += ["Δ τ [95 %]"]
    header += ["of τ - 1", "over"]
    rows = []
    for p in report.paired:
        share = relative_difference(report, p)
        rows.append(
            [
                name_of(p),
                f"{p.temperature:g}",
                str(p.seed),
                drafting_of(p),
                rule_of(p),
                p.method or "",
                f"{p.algorithm} {p.loss}",
                p.baseline,
                f"{p.difference:+.4f} [{p.ci[0]:+.4f}, {p.ci[1]:+.4f}]",
                "–" if share is None else f"{100 * share:+.1f} %",
                _size(p),
            ]
        )
    return _without_constant(header, rows)


def _size(p: Paired) -> str:
    """Return over how much a difference was measured."""
    if p.responses is not None:
        return f"{p.responses} responses"
    return f"{p.prompts} prompts" if p.chain_starts is None else f"{p.chain_starts} chain starts"


def relative_difference(report: Report, paired: Paired) -> float | None:
    """The difference over the baseline's τ - 1; None where that is not in the report, or 0."""
    for r in report.results:
        if r.loss == paired.baseline and paired.compares(r):
            tau = r.measured_tau
            return paired.difference / (tau - 1) if tau and tau != 1 else None
    return None


def published_rows(report: Report) -> Table:
    """Header and rows of τ on benchmarks beside the paper's, a row per draft and rule.

    There are no rows where the paper has no figure. The mean is there once all three benchmarks
    are measured.
    """
    header = ["T", "draft", "seed", "drafting", "rule", "K (paper)"]
    header += [f"{name} (paper)" for name in (*published.BENCHMARKS, "mean")]
    measured: dict[tuple, dict[int, float]] = {}
    for r in sorted(report.results, key=_table_order):
        benchmark = published.find_benchmark(r.benchmark)
        if r.measured_tau is not None and benchmark is not None and not r.check:
            drawn = (drafting_of(r), rule_of(r))
            key = (r.temperature, r.algorithm, r.loss, r.seed, *drawn, r.heads)
            measured.setdefault(key, {})[benchmark] = r.measured_tau
    drafts = published.PUBLISHED.get(report.published or "", {})
    rows = []
    for (temperature, algorithm, loss, seed, sampling, rule, heads), taus in measured.items():
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
                rule,
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
    """Header and rows of the summary over training seeds: a row per algorithm, loss and rule."""
    known = [r for r in report.results if r.measured_tau is not None and not r.check]
    benchmarks = list(dict.fromkeys(r.benchmark for r in known if r.benchmark != HELD_OUT))
    paired = [p for p in report.paired if p.benchmark == HELD_OUT]
    baselines = list(dict.fromkeys(p.baseline for p in paired))
    tau = held_out_name(report)
    header = ["T", "drafting", "rule", "draft", "seeds", tau, "α per head"]
    header += [f"Δ {tau} to {name}" for name in baselines] + [f"τ {b}" for b in benchmarks]
    groups: dict[tuple, list[Result]] = {}
    for r in sorted(known, key=lambda r: r.temperature):
        groups.setdefault(_across_seeds(r), []).append(r)
    order = list(dict.fromkeys(r.algorithm for r in known))
    rows = []
    for key in sorted(groups, key=lambda key: (order.index(key[0]), key[1])):
        algorithm, temperature, sampling, rule, loss = key
        results = groups[key]
        held_out = [r for r in results if r.benchmark == HELD_OUT]
        row = [f"{temperature:g}", sampling, rule, f"{algorithm} {loss}"]
        row += [str(len({r.seed for r in results}))]
        row += [_over_seeds([r.measured_tau for r in held_out])]
        row += [_positions(mean_alphas(held_out))]
        for baseline in baselines:
            pairs = [p for p in paired if _across_seeds(p) == key and p.baseline == baseline]
            row.append(_over_seeds([p.difference for p in pairs], "+.4f"))
        for benchmark in benchmarks:
            row.append(_over_seeds([r.measured_tau for r in results if r.benchmark == benchmark]))
        rows.append(row)
    return _without_constant(header, rows, ("drafting", "rule"))


def held_out_name(report: Report) -> str:
    """Return what τ on held-out responses is called: in older reports, it is another estimate."""
    return "held-out τ" if any(r.serving for r in report.results) else "expected τ"


def _across_seeds(of: Result | Paired) -> tuple[str, float, str, str, str]:
    """What the training seeds of one draft have in common."""
    return of.algorithm, of.temperature, drafting_of(of), rule_of(of), of.loss


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
    seeds, with the least and the greatest: on held-out responses, and the mean of the benchmarks.
    """
    ours = held_out_name(report)
    benchmarks = "sampled τ" if ours == "expected τ" else "benchmarks τ"
    header = ["T", "draft", "paper: τ", "τ - 1", ours, f"{ours} - 1", benchmarks]
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
    """By training seed: τ on held-out responses, or the mean τ of benchmarks."""
    found: dict[int, list[float]] = {}
    for r in report.results:
        tau = r.measured_tau
        if (r.benchmark == HELD_OUT) is not held_out or r.check or tau is None:
            continue
        if (r.algorithm, r.loss) == draft and r.temperature == temperature:
            found.setdefault(r.seed, []).append(tau)
    return {seed: mean(taus) for seed, taus in found.items()}


def _percent(value: float, baseline: float, base: float) -> float:
    """Gain of ``value - base`` over ``baseline - base``, in percent."""
    return 100 * ((value - base) / (baseline - base) - 1)


__all__ = [
    "Table",
    "drafting_of",
    "gain_rows",
    "held_out_name",
    "mean_alphas",
    "name_of",
    "number",
    "paired_rows",
    "published_rows",
    "relative_difference",
    "result_rows",
    "rule_of",
    "seed_rows",
]
