"""The report of the study, drawn from its rows alone: tables, a figure, and what is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Final

from experiments.gains.plan import (
    ARCHITECTURES,
    BASELINE,
    GREEDY_TUNING,
    OBJECTIVES,
    PARTS,
    RULE_LOSS,
    RULES,
    SAMPLES,
    TUNING,
    Run,
    runs_of,
    start_of,
)
from experiments.gains.results import Gain, Results, Row
from specforge_lk.evaluate.chart import Bars, draw_bars
from specforge_lk.evaluate.tables import number
from specforge_lk.files import atomic_write, write_text
from specforge_lk.markdown import markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: The rules of the tables and of the figure, hottest first.
SHOWN: Final = {"T = 1": RULES["T1"], "T = 0": RULES["T0"]}


@dataclass(frozen=True)
class Setting:
    """What the drafts that are compared have in common, seeds aside.

    Attributes:
        part: of the study.
        architecture: the algorithm.
        samples: responses that were trained on.
        start_steps: of the drafts that they start from; 0 is from scratch.
        steps: optimizer steps.
    """

    part: str
    architecture: str
    samples: int
    start_steps: int
    steps: int

    @classmethod
    def of(cls, row: Row) -> Setting:
        """Return a row's."""
        return cls(row.part, row.architecture, row.samples, row.start_steps, row.steps)

    @property
    def text(self) -> str:
        """Say it, the architecture aside."""
        after = f" after {self.start_steps} of KL" if self.start_steps else " from scratch"
        return f"{self.steps} steps{after}, {self.samples} responses"


@dataclass(frozen=True)
class Line:
    """A draft of a table, over seeds.

    Attributes:
        title: what the table calls it.
        pairs: of every seed, its run and the run that it is compared with.
    """

    title: str
    pairs: tuple[tuple[Run, Run], ...]


def lines_of(results: Results, setting: Setting) -> list[Line]:
    """Return the drafts to compare at a setting, the baseline and where it started from first."""
    rows = [row for row in results.rows if Setting.of(row) == setting]
    baselines = {row.seed: row.run.baseline for row in rows}
    found = []
    starts = [(s, b) for b in baselines.values() if (s := b.start) and results.find(s)]
    if starts:
        found.append(Line("(start)", tuple(starts)))
    for objective in OBJECTIVES:
        of = [row.run for row in rows if row.objective == objective]
        # The baseline has a row in the part that it was trained for.
        if not of and objective == BASELINE:
            of = [run for run in baselines.values() if results.find(run)]
        if of:
            found.append(Line(f"`{objective}`", tuple((run, run.baseline) for run in of)))
    if setting.part == "scratch":
        found += _then(results, setting, list(baselines.values()))
    return found


def _then(results: Results, setting: Setting, baselines: Sequence[Run]) -> list[Line]:
    """Return the drafts that were fine-tuned in the last of as many steps."""
    start = start_of(setting.steps)
    found: dict[str, list[tuple[Run, Run]]] = {}
    for objective in OBJECTIVES:
        for kl in baselines:
            run = Run(
                *(kl.architecture, objective, kl.seed, kl.samples), setting.steps - start, start
            )
            if results.find(run):
                found.setdefault(objective, []).append((run, kl))
    return [
        Line(f"{start} steps of `{BASELINE}`, then `{objective}`", tuple(pairs))
        for objective, pairs in found.items()
    ]


def settings_of(results: Results) -> list[Setting]:
    """Return the settings with more than a baseline, in the order of the parts."""
    found = dict.fromkeys(Setting.of(row) for row in results.rows if row.objective != BASELINE)
    # From scratch, what is fine-tuned later may be all that there is beside KL.
    for row in results.rows:
        setting = Setting.of(row)
        if row.part == "scratch" and _then(results, setting, [row.run]):
            found.setdefault(setting)
    return sorted(found, key=_place)


def _place(setting: Setting) -> tuple[int, int, int, int, int]:
    """Return what orders settings: architectures beside one another at every size of a part."""
    size = setting.samples, setting.start_steps, setting.steps
    return list(PARTS).index(setting.part), *size, ARCHITECTURES.index(setting.architecture)


def table(results: Results, setting: Setting) -> str:
    """Return a setting's table: τ, and what is gained over the baseline."""
    header = ["objective", "seeds"]
    for temperature in SHOWN:
        header += [f"τ, {temperature}", "over `kl` [95 %]", "of τ − 1 [95 %]"]
    header += ["α per position, T = 1"]
    rows = []
    for line in lines_of(results, setting):
        own = [row for run, _ in line.pairs if (row := results.find(run))]
        cells = [line.title, ", ".join(str(row.seed) for row in own)]
        for rule in SHOWN.values():
            taus = [row.measured[rule].tau for row in own if rule in row.measured]
            gain = results.gain(line.pairs, rule)
            cells += [number(mean(taus) if taus else None), *_cells(results, line, gain, rule)]
        alphas = [row.measured[SHOWN["T = 1"]].alpha for row in own]
        cells.append(" / ".join(number(_mean(of)) for of in zip(*alphas, strict=True)))
        rows.append(cells)
    return markdown_table(header, rows)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _cells(results: Results, line: Line, gain: Gain | None, rule: str) -> list[str]:
    """Return a gain with its interval, every seed's in parentheses, and as a share."""
    if gain is None:
        return ["", ""]
    text = f"{gain.difference:+.4f}{_interval(gain.ci, 4)}"
    if len(line.pairs) > 1:
        each = [found for pair in line.pairs if (found := results.gain([pair], rule))]
        text += f" ({', '.join(f'{found.difference:+.4f}' for found in each)})"
    return [text + _star(gain), percent(gain)]


def percent(gain: Gain) -> str:
    """Return a gain as a share of τ − 1, with its interval."""
    if gain.share is None:
        return "–"
    ci = [100 * bound for bound in gain.share_ci] if gain.share_ci else None
    return f"{100 * gain.share:+.1f} %{_interval(ci, 1)}"


def _interval(ci: Sequence[float] | None, digits: int) -> str:
    return f" [{ci[0]:+.{digits}f}, {ci[1]:+.{digits}f}]" if ci else ""


def _star(gain: Gain) -> str:
    return " *" if gain.ci and (gain.ci[0] > 0 or gain.ci[1] < 0) else ""


def crossed(results: Results, setting: Setting) -> str:
    """Return the table of rules trained for × served by, and what the diagonal beats."""
    trained = {
        name: [
            r.run for r in results.rows if Setting.of(r) == setting and r.objective == f"for-{name}"
        ]
        for name in RULES
    }
    trained = {name: of for name, of in trained.items() if of}
    rows, verdicts = [], []
    for name, of in trained.items():
        gains = [results.gain([(run, run.baseline) for run in of], r) for r in RULES.values()]
        shown = ["" if g is None else f"{g.difference:+.4f}{_interval(g.ci, 4)}" for g in gains]
        rows.append([f"`{RULES[name]}`", *shown])
    for name in trained:
        beaten = []
        for other in trained:
            pairs = _paired(trained[name], trained[other])
            gain = results.gain(pairs, RULES[name]) if other != name else None
            if gain:
                text = f"{gain.difference:+.4f}{_interval(gain.ci, 4)}{_star(gain)}"
                beaten.append(f"{text} over that for `{RULES[other]}`")
        if beaten:
            verdicts.append(
                f"- Served by `{RULES[name]}`, the draft that is trained for it has τ "
                f"{'; '.join(beaten)}."
            )
    header = ["trained for", *(f"served by `{rule}`" for rule in RULES.values())]
    return "\n\n".join(filter(None, [markdown_table(header, rows), "\n".join(verdicts)]))


def _paired(a: Sequence[Run], b: Sequence[Run]) -> list[tuple[Run, Run]]:
    seeds = {run.seed: run for run in b}
    return [(run, seeds[run.seed]) for run in a if run.seed in seeds]


def missing(results: Results) -> str:
    """Say which drafts have no row, at every size that the study has or is planned for."""
    begun_of = settings_of(results)
    rows = []
    for part, of in PARTS.items():
        begun = {(s.samples, s.steps, s.start_steps) for s in begun_of if s.part == part}
        planned = {(SAMPLES, s, start) for s in of.steps for start in of.start_steps or (0,)}
        for samples, steps, start in sorted(begun | planned):
            planned_runs = runs_of(
                part, steps=[steps], start_steps=[start] if start else None, samples=samples
            )
            cells = []
            for architecture in ARCHITECTURES:
                runs = [run for run in planned_runs if run.architecture == architecture]
                there = [run for run in runs if results.find(run)]
                cells.append(f"{len(there)} of {len(runs)}")
            after = f" after {start}" if start else ""
            rows.append([part, f"{steps}{after}, {samples} responses", *cells])
    return markdown_table(["part", "steps", *ARCHITECTURES], rows)


def notes(results: Results) -> list[str]:
    """Say what makes rows less comparable than they look."""
    found = []
    codes = {(row.architecture, row.code) for row in results.rows}
    several = sorted({a for a, _ in codes if sum(a == b for b, _ in codes) > 1})
    if several:
        found.append(f"Rows of {', '.join(several)} were made by more than one state of the code.")
    apart = 0
    for row in results.rows:
        other = results.find(row.run.baseline)
        apart += other is not None and other.start_weights != row.start_weights
    if apart:
        found.append(
            f"{apart} rows are compared with a draft that started from other weights: the KL "
            "draft of the same seed and steps, trained again on another machine or thread count."
        )
    if len(devices := sorted({row.device for row in results.rows})) > 1:
        found.append(f"Rows were measured on {' and '.join(devices)}.")
    return found


def markdown(results: Results, chart: str | None) -> str:
    """Return the report.

    Args:
        results: the rows.
        chart: name of the figure beside it; None for none.
    """
    lengths = {len(tokens) for tokens in results.responses.values()}
    parts = [
        "# What a draft gains by what it is trained with",
        "Written by `python -m experiments.gains report` from `gains.json`, which has the command, "
        "the settings, the last metrics and every response's rounds of each draft. The target is "
        "SmolLM2-135M-Instruct. τ is exact, K = 4, along "
        f"{' or '.join(map(str, sorted(lengths))) or 'no'} held-out responses that the target "
        "sampled under the rule. Differences are paired: between drafts of one seed and one start, "
        "`training.loss` and its options alone differ. Brackets have the 95 % interval over "
        "responses of the mean over seeds, which says nothing of other seeds; parentheses have "
        "every seed. `*`: the interval does not hold 0.",
        *notes(results),
    ]
    settings = settings_of(results)
    if settings and chart:
        parts.append(f"![gain of τ − 1 over KL]({chart})")
    for part, of_part in groupby(settings, lambda s: s.part):
        parts.append(f"## {PARTS[part].title}")
        if part == "rules":
            options = " ".join(f"`{word}`" for word in RULE_LOSS)
            parts.append(
                f"Fine-tuned with {options} and the rule as option `serving`, on responses sampled "
                f"at temperature 1; with `{GREEDY_TUNING[0]}` for greedy drafting and "
                f"`{TUNING[0]}` otherwise, KL's too. The gain over `kl`, by the rule that serves."
            )
        for setting in of_part:
            parts.append(f"### {setting.architecture}: {setting.text}")
            parts.append((crossed if part == "rules" else table)(results, setting))
    parts += [
        "## What is missing",
        "Drafts that have a row, of those that the study is planned for, three seeds of each. The "
        "larger sizes are for a GPU.",
        missing(results),
    ]
    return "\n\n".join(parts) + "\n"


@dataclass(frozen=True)
class Best:
    """The objective that gains most over KL at T = 1.

    Attributes:
        setting: of the comparison.
        title: of the objective.
        hot: its gain at T = 1.
        cold: its gain at T = 0; None where that was not measured.
    """

    setting: Setting
    title: str
    hot: Gain
    cold: Gain | None


def best_of(results: Results) -> list[Best]:
    """Return the best of every setting, but for drafts that are trained for a rule.

    Of objectives that have as many seeds as any: one seed more is worth more than a better mean.
    """
    found = []
    hot, cold = SHOWN.values()
    for setting in settings_of(results):
        compared = [
            (len(line.pairs), gain.share, line, gain)
            for line in lines_of(results, setting)
            if (gain := results.gain(line.pairs, hot)) and gain.share is not None
            if setting.part != "rules" and line.title != "(start)"
        ]
        if compared:
            *_, best, gain = max(compared, key=lambda found: found[:2])
            found.append(Best(setting, best.title, gain, results.gain(best.pairs, cold)))
    return found


def summary(results: Results) -> str | None:
    """Return the short form: the objective that gains most at T = 1; None where nothing is."""
    rows = []
    for best in best_of(results):
        cells = [best.setting.architecture, best.setting.text, best.title]
        cells.append(percent(best.hot) + _star(best.hot))
        rows.append([*cells, percent(best.cold) + _star(best.cold) if best.cold else ""])
    header = ["draft", "trained for", "gains most over `kl` at T = 1", "of τ − 1", "at T = 0"]
    return markdown_table(header, rows) if rows else None


def render(results: Results, path: Path) -> None:
    """Draw the gain of τ − 1 over KL: a row per setting, groups of bars per architecture."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown = [s for s in settings_of(results) if s.part != "rules"]
    rows = list(dict.fromkeys((s.part, s.text) for s in shown))
    titles = dict.fromkeys(
        line.title
        for s in shown
        for line in lines_of(results, s)
        if line.title not in ("(start)", f"`{BASELINE}`")
    )
    colors = {title: f"C{i % 10}" for i, title in enumerate(titles)}
    figure = Figure(figsize=(13, 1.5 + 2.8 * max(1, len(rows))), layout="constrained")
    grid = figure.subplots(max(1, len(rows)), len(SHOWN), squeeze=False)
    for line_of_axes, row in zip(grid, rows, strict=False):
        here = [s for s in shown if (s.part, s.text) == row]
        for axes, (temperature, rule) in zip(line_of_axes, SHOWN.items(), strict=True):
            _draw(axes, results, here, rule, colors)
            axes.set(title=f"{row[1]}; {temperature}", ylabel="gain of τ − 1 over KL, %")
    handles = [Patch(color=color, label=title.replace("`", "")) for title, color in colors.items()]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)))
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130, format=path.suffix.removeprefix("."))


def _draw(
    axes: Axes, results: Results, settings: Sequence[Setting], rule: str, colors: dict[str, str]
) -> None:
    bars: Bars = {}
    for setting in settings:
        for line in lines_of(results, setting):
            gain = results.gain(line.pairs, rule)
            if line.title in colors and gain and gain.share is not None:
                share = 100 * gain.share
                ci = [100 * bound for bound in gain.share_ci or [gain.share] * 2]
                bars[setting.architecture, line.title] = [(share, ci)]
    draw_bars(axes, bars, colors)
    axes.axhline(0, color="black", linewidth=0.8)


def write(results: Results, path: Path) -> list[Path]:
    """Write the report and its figure beside the rows; returns the files written.

    The figure is left out where matplotlib is not installed.
    """
    text, chart = path.with_suffix(".md"), path.with_suffix(".png")
    drawn = importlib.util.find_spec("matplotlib") is not None
    write_text(text, markdown(results, chart.name if drawn else None))
    if not drawn:
        return [text]
    render(results, chart)
    return [text, chart]
