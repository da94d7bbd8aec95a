"""What the cover letter of SpecForge's series repeats: needs of patches, counts of tests.

`tools.pages` writes these blocks. The needs come from ``series.toml`` beside the series, which
tests/patches/test_series.py tests; the counts from the report of ``make upstream-tests``.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from specforge_lk.markdown import markdown_table
from specforge_lk.patching import SPECFORGE, Patch, load_series, series_root

SERIES: Final = load_series(SPECFORGE)
FOLDER: Final = series_root() / SERIES.package.name / SERIES.version
UPSTREAM: Final = Path(__file__).parent / "results" / "upstream-tests.json"


@dataclass(frozen=True)
class Entry:
    """A patch in ``series.toml``, which says what the fields mean."""

    title: str
    drop_when: str
    needs: tuple[str, ...] = ()
    neighbors: tuple[str, ...] = ()
    stock: str = "unchanged"
    baseline: str | None = None


def number(patch: Patch) -> str:
    """Return the number that a patch's name begins with."""
    return patch.name.partition("-")[0]


def entries() -> dict[str, Entry]:
    """Return the entries of ``series.toml`` by number, in their order.

    Raises:
        ValueError: a patch of the series has none, an entry has no patch, or one needs a patch that
            does not come before it.
    """
    data = tomllib.loads((FOLDER / "series.toml").read_text(encoding="utf-8"))
    found = {name: Entry(**fields) for name, fields in data.items()}
    numbers = [number(patch) for patch in SERIES.patches]
    if list(found) != numbers:
        raise ValueError(f"series.toml: {', '.join(found)}; series: {', '.join(numbers)}")
    for name, entry in found.items():
        if wrong := [n for n in (*entry.needs, *entry.neighbors) if n >= name or n not in found]:
            raise ValueError(f"series.toml: {name} needs {', '.join(wrong)}, not before it")
    return found


def with_needs(wanted: Iterable[str]) -> set[str]:
    """Return the numbers of patches and of all that they need, directly or not."""
    known, found = entries(), set(wanted)
    for name in reversed(known):
        if name in found:
            found.update(known[name].needs, known[name].neighbors)
    return found


def dependencies() -> str:
    """Return the table of needs, which patches have none, and which change stock training."""
    rows = []
    for name, entry in entries().items():
        needs = [*entry.needs, *(f"{n} (neighboring lines)" for n in entry.neighbors)]
        rows.append([f"{name} {entry.title}", ", ".join(needs), entry.stock, entry.drop_when])
    alone = [name for name, entry in entries().items() if not (entry.needs or entry.neighbors)]
    changed = [name for name, entry in entries().items() if "**changed**" in entry.stock]
    return (
        f"These {len(alone)} of {len(rows)} patches apply to the release by themselves: "
        f"{', '.join(alone)}.\n\n"
        f"These {len(changed)} change training without `training.loss`: {', '.join(changed)}.\n\n"
        + markdown_table(["patch", "needs", "stock training", "drop when"], rows)
    )


def upstream() -> str:
    """Return what SpecForge's own tests say, and how the series fares on a later commit."""
    report = json.loads(UPSTREAM.read_text(encoding="utf-8"))
    count, plain = len(report["patches"]), report["plain"]
    outcomes = list(report["added"])
    rows = [
        [title, *(str(counts[name]) for name in outcomes)]
        for title, counts in (
            ("the release", report["counts"]["before"]),
            (f"with patches 0001 to {count:04}", report["counts"]["after"]),
            ("of these, tests that the series adds", report["added"]),
        )
    ]
    commit, _, date = report["commit"].partition(" of ")
    where = f"SpecForge's repository at {commit[:7]} of {date}"
    patched = ", ".join(f"`{path}`" for path in plain["of these patched"])
    applied = count - len(plain["conflicts"])
    refused, needing = (
        ", ".join(
            name.partition("-")[0]
            for name, reason in plain["conflicts"].items()
            if reason.startswith("needs ") is dependent
        )
        for dependent in (False, True)
    )
    if refused:
        refused = f" Not {refused}, whose context has lines that only the release has"
        refused += f", and what needs it: {needing}." if needing else "."
    return (
        f"SpecForge's own tests, of {where}, on a CPU with the package of the release:\n\n"
        + markdown_table(["", *outcomes], rows)
        + f"\n\n{len(report['failing in both'])} tests fail or are errors before and after; "
        f"{len(report['changed'])} others change their outcome, and "
        f"{len(report['unexplained'])} of these get worse without an explanation.\n\n"
        f"The package of that commit is not quite the release: {len(plain['unlike the wheel'])} "
        f"source files differ, and the series changes {len(plain['of these patched'])} of them "
        f"({patched}). {applied} of {count} patches apply to it in order, without fuzz or "
        f"three-way merge.{refused}"
    )
