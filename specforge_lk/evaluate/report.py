"""The report of acceptance measurements: one schema for evaluations and studies, and its renderers.

``report.json`` is the source; ``report.md`` and ``acceptance.png`` are drawn from it alone.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from specforge_lk.evaluate import published

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Benchmark name of the teacher-forced measurement on held-out responses.
HELD_OUT = "held_out"

Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Result(_Strict):
    """Acceptance of one draft on one benchmark at one temperature.

    A sampled benchmark has ``tau`` (pooled, K · accepted / drafted + 1); held-out responses have
    ``tau_expected`` (1 + mean over chain starts of Σ_k Π_{i≤k} α_i). Intervals are 95 % bootstrap
    intervals over prompts or conversations. ``alpha_per_head`` is exact (Σ min(p, q)), averaged
    over all chain starts of held-out responses, and over the chains in which the head was reached
    on benchmarks; ``alpha_per_head_empirical`` counts acceptances there. A head that was never
    reached has null.
    """

    algorithm: str
    loss: str
    seed: int = Field(description="training seed of the draft")
    temperature: float
    benchmark: str
    draft_sampling: str
    heads: int
    tau: float | None = None
    tau_ci: Interval | None = None
    tau_expected: float | None = None
    tau_expected_ci: Interval | None = None
    alpha_per_head: list[float | None]
    alpha_per_head_empirical: list[float | None] | None = None
    coverage: float | None
    drafted: int | None = None
    accepted: int | None = None
    prompts: int | None = None
    skipped: int = Field(0, description="prompts or conversations left out: too long, or too short")
    generated_tokens: int | None = None
    conversations: int | None = None
    chain_starts: int | None = None
    arrays: str | None = Field(
        None, description="arrays per chain start or per prompt, beside the report"
    )
    draft: str | None = None
    seconds: float | None = None
    fingerprint: str | None = None

    @property
    def key(self) -> tuple:
        """What a report holds at most one result for."""
        return (
            self.algorithm,
            self.loss,
            self.seed,
            self.benchmark,
            self.temperature,
            self.draft_sampling,
        )


class Paired(_Strict):
    """Difference in τ, ``loss`` minus ``baseline``.

    Of expected τ over the same chain starts of held-out responses, of pooled τ over the same
    prompts of a benchmark.
    """

    benchmark: str
    algorithm: str
    seed: int
    temperature: float
    draft_sampling: str
    loss: str
    baseline: str
    difference: float
    ci: Interval
    chain_starts: int | None = None
    conversations: int | None = None
    prompts: int | None = None


class Training(_Strict):
    """How one draft was trained; ``last_step`` holds what SpecForge logged at the last step."""

    algorithm: str
    loss: str
    seed: int
    command: str
    steps: int
    seconds: float | None = None
    last_step: dict[str, float] = {}


class Report(_Strict):
    """Everything one evaluation or study measured."""

    preface: str | None = Field(None, description="markdown to begin with")
    results: list[Result] = []
    paired: list[Paired] = []
    training: list[Training] = []
    stages: dict[str, float | None] = Field(
        {}, description="wall clock of every stage in seconds; None where it was interrupted"
    )
    settings: dict[str, Any] = {}
    versions: dict[str, str] = {}
    command: list[str] = []
    notes: list[str] = Field([], description="what a reader of these figures has to know first")
    published: str | None = Field(None, description="target in the paper's tables to compare with")
    gains: dict[str, str] = Field(
        {}, description="by algorithm, the target whose gains in the paper to put beside these"
    )

    def find(self, key: tuple, fingerprint: str) -> Result | None:
        """The result with this key, if it was measured with the same settings and files."""
        for result in self.results:
            if result.key == key and result.fingerprint == fingerprint:
                return result
        return None

    def put(self, result: Result) -> None:
        """Add a result in place of an older one for the same key."""
        self.results = [old for old in self.results if old.key != result.key] + [result]

    def write(self, path: Path) -> None:
        """Write ``path`` as JSON, through a temporary file."""
        write_text(path, self.model_dump_json(indent=2) + "\n")


def read_report(path: Path) -> Report:
    """Read a report; raises ValueError naming the file when it is not one."""
    try:
        return Report.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise ValueError(
            f"{path} is not a report of this version; move it away or choose another --out "
            f"({error.errors()[0]['msg']} at {error.errors()[0]['loc']})"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def versions() -> dict[str, str]:
    """Versions of what the figures depend on; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in ("specforge-lk", "specforge", "torch", "transformers", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _interval(ci: list[float] | None, digits: int = 3) -> str:
    return "" if ci is None else f" [{ci[0]:.{digits}f}, {ci[1]:.{digits}f}]"


def _heads(alphas: list[float | None]) -> str:
    return " / ".join(_number(alpha) for alpha in alphas)


def _table_order(result: Result) -> tuple:
    return (result.benchmark == HELD_OUT, result.benchmark, result.temperature)


def result_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the result table, for markdown and for the terminal.

    Training seed and drafting are columns only where they vary.
    """
    header = ["benchmark", "T", "draft", "seed", "drafting", "τ [95 %]", "α per head", "coverage"]
    rows = []
    for r in sorted(report.results, key=_table_order):
        held_out = r.benchmark == HELD_OUT
        tau, ci = (r.tau_expected, r.tau_expected_ci) if held_out else (r.tau, r.tau_ci)
        rows.append(
            [
                "held-out (exact)" if held_out else r.benchmark,
                f"{r.temperature:g}",
                f"{r.algorithm} {r.loss}",
                str(r.seed),
                r.draft_sampling,
                _number(tau) + _interval(ci),
                _heads(r.alpha_per_head),
                _number(r.coverage),
            ]
        )
    return _without_constant(header, rows)


def _without_constant(
    header: list[str], rows: list[list[str]], names: tuple[str, ...] = ("seed", "drafting")
) -> tuple[list[str], list[list[str]]]:
    """Drop the named columns that hold a single value."""
    kept = [
        i for i, name in enumerate(header) if name not in names or len({row[i] for row in rows}) > 1
    ]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def paired_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of paired differences.

    "of τ - 1" is the difference as a share of what the baseline's draft adds to a target step.
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
    for r in report.results:
        same = ("algorithm", "seed", "benchmark", "temperature", "draft_sampling")
        if r.loss == paired.baseline and all(getattr(r, n) == getattr(paired, n) for n in same):
            tau = r.tau_expected if r.benchmark == HELD_OUT else r.tau
            return paired.difference / (tau - 1) if tau and tau != 1 else None
    return None


def published_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows of sampled τ beside the paper's, a row per draft and T; no rows without one.

    The mean is there once all three benchmarks are measured.
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
                *(f"{_number(a, 2)} ({_number(b, 2)})" for a, b in zip(ours, theirs, strict=True)),
            ]
        )
    return _without_constant(header, rows)


def _over_seeds(values: Sequence[float], form: str = ".3f") -> str:
    """Mean of one value per seed, and the least and the greatest of them."""
    if not values:
        return "–"
    return f"{mean(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def seed_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the summary over training seeds: a row per algorithm, loss and T."""
    benchmarks = list(dict.fromkeys(r.benchmark for r in report.results if r.tau is not None))
    paired = [p for p in report.paired if p.benchmark == HELD_OUT]
    baselines = list(dict.fromkeys(p.baseline for p in paired))
    header = ["T", "drafting", "draft", "seeds", "expected τ", "α per head"]
    header += [f"Δ expected τ to {name}" for name in baselines] + [f"τ {b}" for b in benchmarks]
    groups: dict[tuple, list[Result]] = {}
    for r in sorted(report.results, key=lambda r: r.temperature):
        groups.setdefault((r.algorithm, r.temperature, r.draft_sampling, r.loss), []).append(r)
    order = list(dict.fromkeys(r.algorithm for r in report.results))
    rows = []
    for key in sorted(groups, key=lambda key: (order.index(key[0]), key[1])):
        algorithm, temperature, sampling, loss = key
        results = groups[key]
        held_out = [r for r in results if r.benchmark == HELD_OUT]
        heads = zip(*(r.alpha_per_head for r in held_out), strict=True)
        row = [f"{temperature:g}", sampling, f"{algorithm} {loss}"]
        row += [str(len({r.seed for r in results}))]
        row += [_over_seeds([r.tau_expected for r in held_out])]
        row += [_heads([mean(head) for head in heads])]
        for baseline in baselines:
            differences = [
                p.difference
                for p in paired
                if (p.algorithm, p.temperature, p.draft_sampling, p.loss) == key
                and p.baseline == baseline
            ]
            row.append(_over_seeds(differences, "+.4f"))
        for benchmark in benchmarks:
            row.append(_over_seeds([r.tau for r in results if r.benchmark == benchmark]))
        rows.append(row)
    return _without_constant(header, rows, ("drafting",))


#: What the paper's gains are over.
_GAIN_BASELINE = "kl"


def gain_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the gains over KL in percent, ours beside the paper's.

    Of τ, and of τ - 1, what the draft adds. Ours are means over training seeds, with the least and
    the greatest: of the exact expected τ on held-out responses, and of sampled τ, the mean of the
    benchmarks.
    """
    header = ["T", "draft", "paper: τ", "τ - 1", "expected τ", "expected τ - 1", "sampled τ"]
    rows = []
    for algorithm, target in report.gains.items():
        paper = published.PUBLISHED[target]
        drafts = dict.fromkeys(
            (r.temperature, r.loss)
            for r in sorted(report.results, key=lambda r: r.temperature)
            if r.algorithm == algorithm and r.loss != _GAIN_BASELINE
        )
        for temperature, loss in drafts:
            pair = [(algorithm, loss), (algorithm, _GAIN_BASELINE)]
            theirs = [paper.get(draft, {}).get(temperature) for draft in pair]
            row = [f"{temperature:g}", f"{algorithm} {loss}"]
            for base in (0, 1):
                means = [tau.mean for tau in theirs if tau is not None]
                row.append(f"{_percent(*means, base):+.1f}" if len(means) == 2 else "–")
            for held_out, base in ((True, 0), (True, 1), (False, 0)):
                a, b = (_tau_by_seed(report, draft, temperature, held_out) for draft in pair)
                gains = [_percent(a[seed], b[seed], base) for seed in a if seed in b]
                row.append(_over_seeds(gains, "+.1f"))
            rows.append(row)
    return header, rows


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


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def render_markdown(report: Report) -> str:
    """The report as markdown."""
    parts = [
        "# Acceptance",
        *report.notes,
        *([report.preface] if report.preface else []),
        "τ is pooled over drafted tokens (K · accepted / drafted + 1) on sampled benchmarks, and "
        "the exact expectation 1 + mean Σ_k Π_{i≤k} α_i over chain starts, teacher-forced, on "
        "held-out responses. α per head is Σ min(p, q), the target distribution p not "
        "renormalised, averaged where the head was reached (benchmarks) or over all chain starts "
        "(held-out); coverage is the target's probability "
        "mass on the draft vocabulary. Intervals are bootstrap intervals over prompts "
        "(conversations).",
        _table(*result_rows(report)),
    ]
    if len({r.seed for r in report.results}) > 1:
        after = 1 + len(report.notes) + bool(report.preface)
        parts[after:after] = [
            "Means over training seeds, with the least and the greatest; expected τ, α and Δ are "
            "those of held-out responses. Every seed by itself, with its intervals, is below.",
            _table(*seed_rows(report)),
            "## Every measurement",
        ]
    compared = published_rows(report)
    if compared[1]:
        parts += [
            "## Beside the paper",
            f"Sampled τ with {report.published}, in parentheses that of arXiv 2602.23881: all "
            "prompts of each benchmark, drafts sampled (`probabilistic`), K as given.",
            _table(*compared),
        ]
    if report.gains:
        sources = ", ".join(f"{name}: {target}" for name, target in report.gains.items())
        parts += [
            "## Gains over KL beside the paper's",
            "In percent, of τ and of τ - 1, what the draft adds to it. The paper's (arXiv "
            f"2602.23881, tables 1 and 2): {sources}. Ours: means over training seeds, with the "
            "least and the greatest, of expected τ on held-out responses and of sampled τ, the "
            "mean of the benchmarks.",
            _table(*gain_rows(report)),
        ]
    if report.paired:
        parts += [
            "## Paired differences",
            "Of expected τ over the same chain starts of held-out responses, the bootstrap "
            "resampling conversations; of pooled τ over the same prompts of a benchmark, "
            "resampling prompts. In percent, of what the other draft adds to a step, its τ - 1.",
            _table(*paired_rows(report)),
        ]
    if report.training:
        commands = "\n".join(run.command for run in report.training)
        parts += [
            "## Training",
            _table(
                ["draft", "seed", "steps", "seconds"],
                [
                    [
                        f"{run.algorithm} {run.loss}",
                        str(run.seed),
                        str(run.steps),
                        _number(run.seconds, 0),
                    ]
                    for run in report.training
                ],
            ),
            f"```\n{commands}\n```",
        ]
    if report.stages:
        stages = [[name, _number(seconds, 0)] for name, seconds in report.stages.items()]
        parts += ["## Time", _table(["stage", "seconds"], stages)]
    if report.settings:
        parts += ["## Settings", _table(["setting", "value"], _pairs(report.settings))]
    if report.versions:
        parts += ["## Versions", _table(["package", "version"], _pairs(report.versions))]
    if report.command:
        parts += ["## Command", "```\n" + " ".join(report.command) + "\n```"]
    return "\n\n".join(parts) + "\n"


def _pairs(values: dict[str, Any]) -> list[list[str]]:
    return [[name, str(value)] for name, value in values.items()]


def _label(loss: str, draft_sampling: str, report: Report) -> str:
    """Name of a draft within its algorithm's charts: only what distinguishes it from the others."""
    varies = len({r.draft_sampling for r in report.results}) > 1
    return f"{loss} {draft_sampling}" if varies else loss


def render_chart(report: Report, path: Path) -> None:
    """Draw a row per algorithm: α per head, τ on benchmarks, and paired differences if any.

    Values are means over training seeds; error bars are 95 % intervals of a single seed, or span
    all seeds where there are several.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    algorithms = list(dict.fromkeys(r.algorithm for r in report.results))
    drafts = [*report.results, *report.paired]
    labels = list(dict.fromkeys(_label(r.loss, r.draft_sampling, report) for r in drafts))
    colors = {label: f"C{index}" for index, label in enumerate(labels)}
    groups = len({(p.benchmark, p.temperature) for p in report.paired})
    widths = [1, 1.4, *([max(1, 0.25 * groups)] if groups else [])]
    rows = max(1, len(algorithms))
    figure = Figure(figsize=(4.6 * sum(widths), 1.2 + 3 * rows), layout="constrained")
    grid = figure.subplots(rows, len(widths), width_ratios=widths, squeeze=False)
    for axes, algorithm in zip(grid, algorithms, strict=False):
        results = [r for r in report.results if r.algorithm == algorithm]
        _draw_alpha(axes[0], algorithm, results, report, colors)
        _draw_tau(axes[1], results, report, colors)
        if report.paired:
            _draw_differences(axes[2], algorithm, report, colors)
    if labels:
        handles = [Patch(color=colors[label], label=label) for label in labels]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(labels)))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)


def _draw_alpha(
    axes: Axes, algorithm: str, results: list[Result], report: Report, colors: dict[str, str]
) -> None:
    held_out = [r for r in results if r.benchmark == HELD_OUT]
    hottest = max((r.temperature for r in held_out), default=1.0)
    seeds: dict[str, list[list[float]]] = {}
    for r in held_out:
        if r.temperature == hottest:
            label = _label(r.loss, r.draft_sampling, report)
            seeds.setdefault(label, []).append(r.alpha_per_head)
    for label, alphas in seeds.items():
        heads = range(1, len(alphas[0]) + 1)
        axes.plot(
            heads, [mean(head) for head in zip(*alphas, strict=True)], "o-", color=colors[label]
        )
        axes.set_xticks(list(heads))
    axes.set(title=f"{algorithm}: held-out responses, T = {hottest:g}")
    axes.set(xlabel="head", ylabel="exact α")


def _draw_tau(axes: Axes, results: list[Result], report: Report, colors: dict[str, str]) -> None:
    seeds: dict[tuple[str, str], list[tuple[float, list[float]]]] = {}
    for r in results:
        if r.tau is not None and r.tau_ci is not None:
            group = f"{r.benchmark}\nT = {r.temperature:g}"
            key = (group, _label(r.loss, r.draft_sampling, report))
            seeds.setdefault(key, []).append((r.tau, r.tau_ci))
    _draw_bars(axes, seeds, colors)
    axes.set(title="Speculative decoding", ylabel="τ (tokens per target step)")
    axes.set_ylim(bottom=1)  # τ = 1 is decoding without a draft


def _draw_differences(axes: Axes, algorithm: str, report: Report, colors: dict[str, str]) -> None:
    paired = [p for p in report.paired if p.algorithm == algorithm]
    if not paired:
        axes.set_visible(False)
        return
    # Every draft is compared with all before it: the chart shows what is gained over KL, or else
    # over the first of them.
    baselines = list(dict.fromkeys(p.baseline for p in paired))
    baseline = _GAIN_BASELINE if _GAIN_BASELINE in baselines else baselines[0]
    seeds: dict[tuple[str, str], list[tuple[float, list[float]]]] = {}
    for p in paired:
        if p.baseline == baseline:
            name = "held-out" if p.benchmark == HELD_OUT else p.benchmark
            group = f"{name}\nT = {p.temperature:g}"
            key = (group, _label(p.loss, p.draft_sampling, report))
            seeds.setdefault(key, []).append((p.difference, p.ci))
    _draw_bars(axes, seeds, colors)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(title=f"Paired differences to {baseline}", ylabel="Δ τ")


def _draw_bars(
    axes: Axes,
    seeds: dict[tuple[str, str], list[tuple[float, list[float]]]],
    colors: dict[str, str],
) -> None:
    """Bars by (group, label): the mean over seeds, with its interval or the span of the seeds."""
    groups = list(dict.fromkeys(group for group, _ in seeds))
    labels = [label for label in colors if any(label == known for _, known in seeds)]
    width = 0.8 / max(1, len(labels))
    for (group, label), values in seeds.items():
        x = groups.index(group) + (labels.index(label) - (len(labels) - 1) / 2) * width
        center = mean(value for value, _ in values)
        ends = values[0][1] if len(values) == 1 else [value for value, _ in values]
        # A percentile interval need not contain the estimate; a drawn error cannot be negative.
        error = [[max(0, center - min(ends))], [max(0, max(ends) - center)]]
        axes.bar(x, center, width, color=colors[label], yerr=error, capsize=2)
    axes.set_xticks(range(len(groups)), groups)


def write_all(report: Report, path: Path) -> list[Path]:
    """Write the report as JSON, and markdown and chart beside it; returns the files written.

    The chart is called ``acceptance.png`` beside a ``report.json``, and after the report otherwise;
    it is left out where matplotlib (extra ``plots``) is not installed.
    """
    markdown = path.with_suffix(".md")
    chart = path.with_name("acceptance.png" if path.stem == "report" else f"{path.stem}.png")
    report.write(path)
    write_text(markdown, render_markdown(report))
    if importlib.util.find_spec("matplotlib") is None:
        return [path, markdown]
    render_chart(report, chart)
    return [path, markdown, chart]
