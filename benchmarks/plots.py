"""Time and memory of the operation against N and V_d, as PNG."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.measured import Measured, allocated

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: What is held while the other size varies.
TOKENS: Final = 1024
VOCABULARY: Final = 32000

#: Color, line and marker.
STYLES: Final = {
    "ours kl": ("#08519c", "-", "o"),
    "ours lk_alpha": ("#3182bd", "-", "s"),
    "ours lk_lambda": ("#6baed6", "-", "^"),
    "specforge kl": ("#a63603", "-", "o"),
    "specforge lk_alpha": ("#e6550d", "-", "s"),
    "specforge lk_lambda": ("#fd8d3c", "-", "^"),
    "specforge kl, inductor": ("#a63603", ":", "o"),
    "specforge lk_lambda, inductor": ("#fd8d3c", ":", "^"),
    "speculators kl_div": ("#006d2c", "-", "o"),
    "speculators nla": ("#31a354", "-", "s"),
    "speculators lk_hybrid": ("#74c476", "-", "^"),
    "cross-entropy": ("#756bb1", "-", "D"),
    "floor": ("black", "--", ""),
    "floor, new gradient": ("#777777", "--", ""),
}

Value = Callable[[dict[str, Any]], float]


def draw(measured: Measured, directory: Path) -> list[Path]:
    """Write time.png and memory.png: float32, all positions supervised.

    Returns:
        The files; none where too little was measured to draw a line.
    """
    from matplotlib.figure import Figure

    cells = {
        cell: found
        for cell, found in measured.operation.items()
        if (cell.dtype, cell.supervised) == ("float32", 1.0)
    }
    over_tokens = {c.tokens: found for c, found in cells.items() if c.vocabulary == VOCABULARY}
    over_vocabulary = {c.vocabulary: found for c, found in cells.items() if c.tokens == TOKENS}
    if min(len(over_tokens), len(over_vocabulary)) < 2:
        return []
    written = []
    for name, label, value in (
        ("time", "forward + backward [ms]", lambda record: 1e3 * record["median"]),
        ("memory", "peak beyond inputs [MiB]", lambda record: allocated(record) / 2**20),
    ):
        figure = Figure(figsize=(15, 7), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        left.set(xlabel=f"positions N (V_d = {VOCABULARY})", ylabel=label)
        right.set(xlabel=f"draft vocabulary V_d (N = {TOKENS})")
        # Names are placed once both panels have set the limits that they share.
        ends = [_lines(left, over_tokens, value), _lines(right, over_vocabulary, value)]
        _names(left, ends[0])
        _names(right, ends[1])
        machine = measured.machine
        figure.suptitle(
            f"Overlap losses, float32, {machine['cpu']}, {machine['threads']} threads, "
            f"{machine['simd']}, torch {machine['torch']}",
            fontsize=11,
        )
        written.append(directory / f"{name}.png")
        figure.savefig(written[-1], dpi=130)
    return written


def _lines(
    axes: Axes, found: dict[int, dict[str, Any]], value: Value
) -> dict[str, tuple[float, float]]:
    """Draw one line per implementation; return where each of them ends."""
    ends: dict[str, tuple[float, float]] = {}
    for name, (color, line, marker) in STYLES.items():
        points = sorted(
            (size, value(records[name]))
            for size, records in found.items()
            # The floor that allocates nothing has no memory to show.
            if "median" in records.get(name, {}) and value(records[name]) > 1e-3
        )
        if points:
            axes.plot(*zip(*points, strict=True), line, color=color, marker=marker, ms=5, lw=1.5)
            ends[name] = points[-1]
    axes.set(xscale="log", yscale="log")
    sizes = sorted(found)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return ends


def _names(axes: Axes, ends: dict[str, tuple[float, float]]) -> None:
    """Write every line's name beside its right end."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    names = sorted(ends, key=lambda name: ends[name][1])
    wanted = [(math.log(ends[name][1]) - low) / (high - low) for name in names]
    for name, height in zip(names, _apart(wanted, 0.036), strict=True):
        axes.annotate(
            name,
            ends[name],
            xytext=(1.04, height),
            textcoords="axes fraction",
            color=STYLES[name][0],
            fontsize=9,
            va="center",
            arrowprops={
                **{"arrowstyle": "-", "color": STYLES[name][0], "lw": 0.5, "alpha": 0.6},
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )


def _apart(heights: list[float], gap: float) -> list[float]:
    """Return ascending heights moved as little as needed to be ``gap`` apart.

    Groups that touch are centered on their mean.
    """
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _lowest(groups[-1], gap) < _highest(groups[-2], gap) + gap:
            last = groups.pop()
            groups[-1] += last
    return [_lowest(group, gap) + gap * i for group in groups for i in range(len(group))]


def _lowest(group: list[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _highest(group: list[float], gap: float) -> float:
    return sum(group) / len(group) + gap * (len(group) - 1) / 2
