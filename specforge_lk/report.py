"""The report of acceptance measurements: one schema for evaluations and studies, and its renderers.

``report.json`` is the source; ``report.md`` and ``acceptance.png`` are drawn from it alone.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

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
    arrays: str | None = Field(None, description="per-chain-start arrays, beside the report")
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
    """Difference in expected τ, ``loss`` minus ``baseline``, over the same chain starts."""

    benchmark: str
    algorithm: str
    seed: int
    temperature: float
    draft_sampling: str
    loss: str
    baseline: str
    difference: float
    ci: Interval
    chain_starts: int
    conversations: int


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

    results: list[Result] = []
    paired: list[Paired] = []
    training: list[Training] = []
    settings: dict[str, Any] = {}
    versions: dict[str, str] = {}
    command: list[str] = []

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
    """Header and rows of the table of paired differences."""
    header = ["T", "seed", "drafting", "draft", "against", "Δ expected τ [95 %]", "chain starts"]
    rows = [
        [
            f"{p.temperature:g}",
            str(p.seed),
            p.draft_sampling,
            f"{p.algorithm} {p.loss}",
            p.baseline,
            f"{p.difference:+.4f} [{p.ci[0]:+.4f}, {p.ci[1]:+.4f}]",
            str(p.chain_starts),
        ]
        for p in report.paired
    ]
    return _without_constant(header, rows)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def render_markdown(report: Report) -> str:
    """The report as markdown."""
    parts = [
        "# Acceptance",
        "τ is pooled over drafted tokens (K · accepted / drafted + 1) on sampled benchmarks, and "
        "the exact expectation 1 + mean Σ_k Π_{i≤k} α_i over chain starts, teacher-forced, on "
        "held-out responses. α per head is Σ min(p, q), the target distribution p not "
        "renormalised, averaged where the head was reached (benchmarks) or over all chain starts "
        "(held-out); coverage is the target's probability "
        "mass on the draft vocabulary. Intervals are bootstrap intervals over prompts "
        "(conversations).",
        _table(*result_rows(report)),
    ]
    if report.paired:
        parts += [
            "## Paired differences on held-out responses",
            "The same chain starts for both drafts; the bootstrap resamples conversations.",
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
    if report.settings:
        parts += ["## Settings", _table(["setting", "value"], _pairs(report.settings))]
    if report.versions:
        parts += ["## Versions", _table(["package", "version"], _pairs(report.versions))]
    if report.command:
        parts += ["## Command", "```\n" + " ".join(report.command) + "\n```"]
    return "\n\n".join(parts) + "\n"


def _pairs(values: dict[str, Any]) -> list[list[str]]:
    return [[name, str(value)] for name, value in values.items()]


def _label(result: Result, report: Report) -> str:
    """Name of a draft in a chart: only what distinguishes it from the others."""
    parts = [result.loss]
    if len({r.algorithm for r in report.results}) > 1:
        parts.insert(0, result.algorithm)
    if len({r.seed for r in report.results}) > 1:
        parts.append(f"seed {result.seed}")
    if len({r.draft_sampling for r in report.results}) > 1:
        parts.append(result.draft_sampling)
    return " ".join(parts)


def render_chart(report: Report, path: Path) -> None:
    """Draw α per head (held-out, highest temperature) and τ with intervals (benchmarks)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.4])
    labels = list(dict.fromkeys(_label(r, report) for r in report.results))
    colors = {label: f"C{index}" for index, label in enumerate(labels)}

    held_out = [r for r in report.results if r.benchmark == HELD_OUT]
    hottest = max((r.temperature for r in held_out), default=1.0)
    for result in held_out:
        if result.temperature == hottest:
            label = _label(result, report)
            heads = range(1, result.heads + 1)
            left.plot(heads, result.alpha_per_head, "o-", color=colors[label], label=label)
            left.set_xticks(list(heads))
    left.set(title=f"Held-out responses, T = {hottest:g}", xlabel="head", ylabel="exact α")

    sampled = [r for r in report.results if r.tau is not None and r.tau_ci is not None]
    groups = list(dict.fromkeys((r.benchmark, r.temperature) for r in sampled))
    width = 0.8 / max(1, len(labels))
    for result in sampled:
        label = _label(result, report)
        x = groups.index((result.benchmark, result.temperature))
        x += (labels.index(label) - (len(labels) - 1) / 2) * width
        low, high = result.tau_ci
        # A percentile interval need not contain the estimate; a drawn error cannot be negative.
        error = [[max(0, result.tau - low)], [max(0, high - result.tau)]]
        right.bar(x, result.tau, width, color=colors[label], yerr=error, capsize=2)
    right.set_xticks(range(len(groups)), [f"{name}\nT = {t:g}" for name, t in groups])
    right.set(title="Speculative decoding, 95 % intervals", ylabel="τ (tokens per target step)")
    right.set_ylim(bottom=1)  # τ = 1 is decoding without a draft
    if labels:
        from matplotlib.patches import Patch

        handles = [Patch(color=colors[label], label=label) for label in labels]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(labels)))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)


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
