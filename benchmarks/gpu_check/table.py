"""The tables of a folder of reports, what was predicted beside what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu_check.predictions import predicted
from specforge_lk.files import write_text
from specforge_lk.markdown import markdown_table

Row = Mapping[str, Any]
NAME: Final = "README.md"


def write(folder: Path) -> None:
    """Write the tables of the reports in a folder beside them."""
    write_text(folder / NAME, render(folder))


def render(folder: Path) -> str:
    """Return the tables of the reports in a folder.

    Raises:
        ValueError: there is no report.
    """
    from benchmarks.gpu_check.__main__ import PHASES

    found = {name: folder / f"{name}.json" for name in PHASES}
    reports = {n: json.loads(p.read_text()) for n, p in found.items() if p.exists()}
    if not reports:
        raise ValueError(f"{folder} has no report: name the folder of a card, below --out")
    first = next(iter(reports.values()))
    card = first["machine"]["card"]
    parts = [
        f"# {card}",
        "Written by `make gpu-check` from the reports beside it. Times are medians in "
        "milliseconds. *Over copy* is the time over that of moving, as fast as the card copies, "
        "the bytes that must be moved. Memory is the peak beyond what is there before, in MiB. "
        "What is predicted was, for an H100, before anything was measured.",
    ]
    if first["dry"]:
        parts.append("**A rehearsal on a CPU: no figure means anything.**")
    parts.append(markdown_table(["phase", "ended", "seconds", *_FACTS], list(_facts(reports))))
    for name, report in reports.items():
        parts += _PARTS[name](report["rows"])
        if report["left_out"]:
            parts.append(f"Not measured, for want of time: {'; '.join(report['left_out'])}.")
    return "\n\n".join(parts) + "\n"


#: Facts of the machine, by their names in a report.
_FACTS: Final = ("commit", "driver", "cuda", "torch", "triton")


def _facts(reports: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, report in reports.items():
        whole = report["commit"]
        facts = {**report["machine"], "commit": whole[:8] + "+" * whole.endswith("+")}
        known = [str(facts.get(fact) or "") for fact in _FACTS]
        rows.append([name, report["ended"], f"{report['seconds']:.0f}", *known])
    return rows


# ------------------------------------------------------------------------------- phases


def _correctness(rows: Sequence[Row]) -> list[str]:
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row["check"], []).append(row)
    table = [
        [
            kind,
            str(len(of)),
            _text(max(row.get("error_over_bound", math.inf) for row in of)),
            str(sum(not row["ok"] for row in of)),
        ]
        for kind, of in kinds.items()
    ]
    header = ["checked", "cells", "largest error over its bound", "wrong"]
    return ["## Correctness", markdown_table(header, table), *_failed(rows)]


def _operations(rows: Sequence[Row]) -> list[str]:
    parts = ["## Operations"]
    checks = [row for row in rows if row["section"] == "check"]
    for row in checks:
        measured = {name: row[name] for name in row if name.endswith(("_per_s", "_tflops"))}
        table = [[name, _text(value), predicted(row, name)] for name, value in measured.items()]
        parts.append(markdown_table(["card", "measured", "predicted"], table))
    operation = [row for row in rows if row["section"] == "operation"]
    for cell in dict.fromkeys(row["cell"] for row in operation):
        here = [row for row in operation if row["cell"] == cell]
        parts += [f"### {cell}", _measured(here, ["name"], ("forward_ms", "both_ms"))]
    for section in ("target", "linear_overlap"):
        here = [row for row in rows if row["section"] == section]
        names = ["size", "way", *(["head"] if section == "linear_overlap" else [])]
        if here:
            parts += [f"### {section}", _measured(here, names, ("ms",))]
    if left_out := [row for row in rows if row["section"] == "left out"]:
        reasons = [[row["name"], row["failure"]] for row in left_out]
        parts += ["### Left out", markdown_table(["name", "why"], reasons)]
    return parts


def _sharded(rows: Sequence[Row]) -> list[str]:
    table = []
    for row in rows:
        where = [str(row.get(name, "")) for name in ("algorithm", "way", "sharding")]
        errors = ", ".join(f"{k} {_text(v)}" for k, v in row.get("errors", {}).items())
        said = row.get("failure") or row.get("reason") or errors
        verdict = {True: "ok", False: "WRONG", None: "–"}[row.get("ok")]
        table.append([*where, f"{row['world']}, {row['backend']}", said, verdict])
    header = ["draft", "trained with", "sharding", "processes", "largest errors", ""]
    return ["## Sharded", markdown_table(header, table)]


def _steps(rows: Sequence[Row]) -> list[str]:
    return ["## Training steps", _measured(rows, ["algorithm", "size", "way"], ("step_ms",))]


def _study(rows: Sequence[Row]) -> list[str]:
    table = []
    for row in rows:
        if "tau" in row:
            steps = f"{row['start_steps']} + {row['steps']}"
            taus = [
                f"{tau:.4f}" + _gain(row["gain_over_kl"].get(rule))
                for rule, tau in row["tau"].items()
            ]
            table.append([row["architecture"], row["objective"], steps, *taus])
    if not table:
        return ["## Study", *(row["skipped"] for row in rows if "skipped" in row)]
    rules = next(list(row["tau"]) for row in rows if "tau" in row)
    return ["## Study", markdown_table(["draft", "objective", "steps", *rules], table)]


def _gain(gain: Sequence[float] | None) -> str:
    if gain is None:
        return ""
    difference, low, high = gain
    return f": {difference:+.4f} [{low:+.4f}, {high:+.4f}]"


_PARTS: Final[Mapping[str, Callable[[Sequence[Row]], list[str]]]] = {
    "correctness": _correctness,
    "operations": _operations,
    "sharded": _sharded,
    "steps": _steps,
    "study": _study,
}


# ------------------------------------------------------------------------------- tables


def _measured(rows: Sequence[Row], names: Sequence[str], times: Sequence[str]) -> str:
    """Return a table of times and memory, each with its prediction where there is one."""
    header = [*names]
    fields = [*times, "peak_mib"]
    shown = {f: any(predicted(row, f) for row in rows) for f in fields}
    for name in fields:
        header += [name.replace("_", " "), *(["predicted"] if shown[name] else [])]
    over = any("over_copy" in row for row in rows)
    table = []
    for row in rows:
        line = [str(row[name]) for name in names]
        for name in fields:
            value = row.get(name)
            line.append(row.get("failure", "") if value is None else _text(value))
            line += [predicted(row, name)] if shown[name] else []
        table.append([*line, *([_text(row.get("over_copy", {}).get("both_ms"))] if over else [])])
    return markdown_table([*header, *(["over copy"] if over else [])], table)


def _failed(rows: Sequence[Row]) -> list[str]:
    wrong = [row for row in rows if row.get("ok") is False]
    return [f"Wrong: `{json.dumps(row)}`" for row in wrong]


def _text(value: Any) -> str:
    """Return a figure with three digits; of three quartiles the median."""
    if value is None:
        return ""
    if isinstance(value, list):
        value = value[1]
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
