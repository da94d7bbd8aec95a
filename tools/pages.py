"""``make pages``: what README.md and docs/ repeat from reports, settings and versions.

A page holds each such block between two comments; a test asserts that all of them are up to date.
Nothing here measures: every figure is read from a results file of this repository, or is the
paper's.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Final

from benchmarks.gpu_check import predictions
from configs import recipes
from experiments.serving.report import Prediction, ServingReport, server_lines
from specforge_lk.cli.losses import Option, find_losses
from specforge_lk.cost import TARGET_HELD, StepLogits
from specforge_lk.evaluate.report import HELD_OUT, Result, read_report
from specforge_lk.evaluate.tables import gain_rows, held_out_name
from specforge_lk.losses import LOSSES
from specforge_lk.markdown import markdown_table
from specforge_lk.patching import PACKAGES, SUPPORTED, known_versions
from specforge_lk.serving import PRESETS
from tools import cover_letter, engines, gains

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = ROOT / "experiments" / "results"


# ---------------------------------------------------------------------------- experiments


def algorithms() -> str:
    """Expected τ of every algorithm of SpecForge with every loss, over seeds."""
    report = read_report(RESULTS / "algorithms.json")
    titles = {
        "eagle3": "EAGLE-3",
        "peagle": "P-EAGLE",
        "dflash": "DFlash",
        "domino": "Domino",
        "dspark": "DSpark",
    }
    losses = list(dict.fromkeys(r.loss for r in report.results))
    compared = [loss for loss in losses if loss.startswith("lk_")]
    rows = []
    for temperature in (1.0, 0.0):
        for name, title in titles.items():
            here = [
                r
                for r in report.results
                if (r.algorithm, r.benchmark, r.temperature) == (name, HELD_OUT, temperature)
            ]
            taus = {loss: mean(_taus(here, loss)) for loss in losses}
            best = max(taus, key=taus.__getitem__)
            row = [title, f"{temperature:g}"]
            row += [
                f"**{tau:.3f}**" if loss == best else f"{tau:.3f}" for loss, tau in taus.items()
            ]
            for loss in compared:
                pairs = [
                    p.difference
                    for p in sorted(report.paired, key=lambda p: p.seed)
                    if (p.algorithm, p.benchmark, p.temperature) == (name, HELD_OUT, temperature)
                    and (p.loss, p.baseline) == (loss, "kl")
                ]
                row.append(f"{mean(pairs):+.4f} ({', '.join(f'{d:+.4f}' for d in pairs)})")
            rows.append(row)
    header = [
        "",
        "T",
        *(f"`{loss}`" for loss in losses),
        *(f"`{loss}` − `kl`" for loss in compared),
    ]
    return markdown_table(header, rows)


def _taus(results: Sequence[Result], loss: str) -> list[float]:
    found = (r.measured_tau for r in results if r.loss == loss and not r.check)
    return [tau for tau in found if tau is not None]


def paper() -> str:
    """Gains over KL in percent of τ - 1: ours beside the paper's."""
    report = read_report(RESULTS / "paper.json")
    header, rows = gain_rows(report)
    ours = f"{held_out_name(report)} - 1"
    at = {name: header.index(name) for name in ("T", "draft", "τ - 1", ours)}
    by_draft: dict[str, dict[str, tuple[str, str]]] = {}
    for row in rows:
        measured = by_draft.setdefault(row[at["draft"]], {})
        measured[row[at["T"]]] = row[at[ours]], row[at["τ - 1"]]
    return markdown_table(
        ["", "T = 1: here", "the paper", "T = 0: here", "the paper"],
        [[draft, *measured["1"], *measured["0"]] for draft, measured in by_draft.items()],
    )


def vllm() -> str:
    """What vLLM accepted of exported drafts, beside our own decoding."""
    report = ServingReport.model_validate_json((RESULTS / "serving.json").read_text())
    rows = []
    for c in report.comparisons:
        engine, ours = (
            " / ".join(f"{count / side.cycles:.3f}" for count in side.accepted)
            for side in (c.engine, c.ours)
        )
        same = "(sampled)" if c.same_output is None else f"{c.same_output} of {c.prompts}"
        differing = "(sampled)" if c.differing is None else f"{c.differing} of {c.prompts}"
        row = [c.draft, f"{c.temperature:g}, {c.drafting}", same, engine, ours, differing]
        rows.append([*row, *(_rounds(c.prediction) if c.prediction else ["–", "–"])])
    header = ["draft", "T, drafting", "output is the target's", "vLLM accepts, by position"]
    header += ["our decoding", "prompts that differ", "rounds computed", "vLLM's rounds"]
    sentences = ["", *server_lines(report.server)] if report.server else []
    return "\n".join([markdown_table(header, rows), *sentences])


def support() -> str:
    """Which drafts the engines have methods and architectures for."""
    report = ServingReport.model_validate_json((RESULTS / "serving.json").read_text())
    return engines.table(engines.read_record(), report)


def _rounds(found: Prediction) -> list[str]:
    return [f"{found.rounds:.1f}", f"{found.taken} ± {found.error:.1f}"]


# --------------------------------------------------------------------------------- losses


def options() -> str:
    """Every option of this package's losses, as `specforge-lk losses` has them."""
    # An option of one name may have another default, and so another meaning, in another loss.
    found: dict[tuple[str, str], tuple[Option, list[str]]] = {}
    for loss in find_losses()[0]:
        for option in loss.options if loss.name in {own.name for own in LOSSES} else ():
            key = option.name, option.meaning
            found.setdefault(key, (option, []))[1].append(f"`{loss.name}`")
    rows = []
    for (name, _), (option, losses) in sorted(found.items(), key=lambda item: item[0][0]):
        shown = "–" if option.default is None else f"`{option.default}`"
        shown += "".join(
            f"; {where}: `{value}`" for where, value in option.algorithm_defaults.items()
        )
        values = option.values.replace(" | ", ", ")
        rows.append(
            [f"`{name}`", ", ".join(losses), values, shown, option.meaning.replace("|", r"\|")]
        )
    return markdown_table(["option", "of", "values", "default", "meaning"], rows)


# ------------------------------------------------------------------------------ evaluation


def presets() -> str:
    """Every serving rule that has an engine's name."""
    rows = [
        [f"`{name}`", f"`{preset.rule}`", preset.engine, preset.options]
        for name, preset in PRESETS.items()
    ]
    return markdown_table(["name", "rule", "read from", "what has the engine decode so"], rows)


# ------------------------------------------------------------------------------ benchmark


def bounds() -> str:
    """Every bound of the benchmark, and what was measured."""
    words = {"target head": "the target's LM head", "4 heads": "4 draft positions"}
    rows = []
    for target in gains.bench_summary()["targets"]:
        if target["bound"] is None:
            continue
        name = target["name"]
        for old, new in words.items():
            name = name.replace(old, new)
        measured = f"{target['measured']:.3g}"
        rows.append(
            [
                name,
                f"{target['bound']:g}",
                measured if target["met"] else f"**{measured}**",
                f"{target['median']:.3g}",
                f"{target['worst']:.3g}",
                f"{target['cells_met']} of {target['cells']}",
            ]
        )
    return markdown_table(["", "bound", "measured", "median", "worst", "cells within"], rows)


#: The implementations of the page, of those that the benchmark measures.
_SHOWN: Final = {
    "ours kl": "`kl`",
    "ours lk_alpha": "`lk_alpha`",
    "ours lk_lambda": "`lk_lambda`",
    "floor": "memory-bandwidth bound: two reads, one write",
    "floor, new gradient": "the same, into a new tensor",
    "specforge kl": "SpecForge's KL, eager",
    "specforge kl, inductor": "SpecForge's KL, through inductor",
    "specforge lk_lambda": "SpecForge's KL + acceptance, eager",
    "specforge lk_lambda, inductor": "SpecForge's KL + acceptance, KL through inductor",
    "speculators lk_hybrid": "speculators 0.9.0 `lk_hybrid`",
    "cross-entropy": "cross-entropy with hard labels",
}


def operation() -> str:
    """Time and memory of the losses at 1024 × 32000 float32."""
    cells = json.loads((ROOT / "benchmarks" / "results" / "operation.json").read_text())["cells"]
    wanted = {"tokens": 1024, "vocabulary": 32000, "dtype": "float32", "supervised": 1.0}
    (found,) = (c["implementations"] for c in cells if c["cell"] == wanted)
    return markdown_table(
        ["", "median [ms]", "peak beyond inputs [MiB]"],
        [
            [
                title,
                f"{1e3 * found[name]['median']:.0f}",
                f"{found[name]['memory']['allocated'] / 2**20:.0f}",
            ]
            for name, title in _SHOWN.items()
        ],
    )


_TITLES: Final = {"eagle3": "EAGLE-3", "dflash": "DFlash", "mtp": "MTP"}


def step_memory() -> str:
    """Peak of a training step, with logits held and without, by its number of positions."""
    cells = json.loads((ROOT / "benchmarks" / "results" / "step_memory.json").read_text())["cells"]
    peaks = {
        (found["cell"]["algorithm"], found["cell"]["tokens"]): found["peaks"] for found in cells
    }
    (vocabulary,) = {found["cell"]["vocabulary"] for found in cells}
    tokens = sorted({tokens for _, tokens in peaks})
    rows = []
    for algorithm, title in _TITLES.items():
        for way, name in (("held", "held"), ("fused", "`loss_fused_head`")):
            of_tokens = [peaks[algorithm, n][way] for n in tokens]
            slope = (of_tokens[-1] - of_tokens[-2]) / (tokens[-1] - tokens[-2]) / vocabulary
            mebibytes = [f"{peak / 2**20:.0f}" for peak in of_tokens]
            rows.append([f"{title}, {name}", *mebibytes, f"{slope:.1f}"])
    headers = ["", *(f"N {n} [MiB]" for n in tokens), f"B per position and token of {vocabulary}"]
    return markdown_table(headers, rows)


def computed_memory() -> str:
    """Return what the cost sheet's formula gives for a step of 8192 positions in bfloat16."""
    size, vocabulary, hidden = 8192, 128256, 4096
    rows = []
    for algorithm, heads, trained in (
        ("eagle3", 7, vocabulary * hidden),
        ("dflash", 1, 0),
        ("mtp", 7, 0),
    ):
        logits = StepLogits(
            size, heads, vocabulary, vocabulary, 2, 2, algorithm in TARGET_HELD, trained
        )
        gigabytes = [f"{size / 1e9:.1f}" for size in (logits.held, logits.fused)]
        rows.append([_TITLES[algorithm], str(heads), *gigabytes])
    return markdown_table(
        ["", "draft positions", "held [GB]", "`loss_fused_head` [GB]"],
        rows,
    )


# ----------------------------------------------------------------- sources and versions


def source(path: str) -> str:
    """Return a source file of the repository as a block of code, with its path."""
    return f'```python title="{path}"\n{(ROOT / path).read_text(encoding="utf-8")}```'


def versions() -> str:
    """What works together: what the package allows, and what the tests ran with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = dict(_requirement(text) for text in project["dependencies"])
    for extra in project["optional-dependencies"].values():
        allowed |= dict(_requirement(text) for text in extra)
    pinned: dict[str, str] = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if "==" in line:
            pinned |= dict([_requirement(line)])
    torch, engine = (
        re.search(rf"^{name} +\?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for name in ("TORCH", "VLLM")
    )
    assert torch and engine
    pinned |= dict([_requirement(torch[1])])
    specforge, sglang = SUPPORTED["specforge"], known_versions(PACKAGES["sglang"])
    return markdown_table(
        ["", "allowed", "tested with"],
        [
            ["Python", project["requires-python"], "3.11"],
            ["SpecForge", f"=={specforge}, patched", specforge],
            *(
                [name, allowed[name], pinned[name]]
                for name in ("torch", "transformers", "numpy", "pydantic", "triton")
            ),
            [
                "SGLang, to serve",
                f"{' or '.join(f'=={version}' for version in sglang)}, "
                "patched for a truncated vocabulary",
                "its code, on a CPU",
            ],
            ["vLLM, to serve", "not restricted", engine[1].replace("==", " ")],
        ],
    )


def _requirement(text: str) -> tuple[str, str]:
    """Name and version of "name>=1" or "name==1"; the version without "=="."""
    found = re.fullmatch(r"([\w.-]+)(?:\[[^]]*\])?(?:(==|>=)(.*))?", text)
    if found is None:
        raise ValueError(f"requirement {text!r}: neither NAME, NAME==VERSION nor NAME>=VERSION")
    name, sign, version = found.groups()
    return name.lower(), f"{sign or ''}{version or ''}".removeprefix("==")


# --------------------------------------------------------------------------------- blocks

#: Page -> name of the block -> what stands in it.
BLOCKS: Final[Mapping[str, Mapping[str, Callable[[], str]]]] = {
    "README.md": {"gains": gains.gains},
    "docs/results.md": {
        "demo": gains.demo,
        "study": gains.study,
        "served": gains.served,
        "algorithms": algorithms,
        "paper": paper,
    },
    "docs/finetune.md": {"gain": gains.fine_tuning},
    "docs/cost.md": {
        "operation": operation,
        "bounds": bounds,
        "predictions": predictions.table,
        "step memory": step_memory,
        "computed memory": computed_memory,
    },
    "docs/evaluate.md": {"presets": presets},
    "docs/serving.md": {"engines": support, "vllm": vllm},
    "docs/install.md": {"versions": versions},
    "docs/losses.md": {"options": options},
    "docs/extending.md": {
        "loss": partial(source, "examples/plugin_loss/specforge_hellinger.py"),
        "draft": partial(source, "examples/plugin_draft/specforge_linear_heads/model.py"),
        "registration": partial(source, "examples/plugin_draft/specforge_linear_heads/__init__.py"),
    },
    f"patches/specforge/{SUPPORTED['specforge']}/README.md": {
        "upstream": cover_letter.upstream,
        "dependencies": cover_letter.dependencies,
    },
    "configs/README.md": {"recipes": recipes.table, "serving": recipes.serving_commands},
}


def fill(text: str, name: str, content: str) -> str:
    """Return ``text`` with ``content`` between the two comments of the block ``name``.

    Raises:
        ValueError: the comments are not there, or not in this order.
    """
    begin, end = f"<!-- {name}: written by `make pages` -->", f"<!-- {name}: end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"block {name!r}: no line {begin!r} with {end!r} after it")
    return f"{before}{begin}\n{content}\n{end}{after}"


def filled(page: str) -> str:
    """Return a page's text with all its blocks written anew.

    Raises:
        ValueError: a block's comments are missing; the page is named.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, content in BLOCKS[page].items():
        try:
            text = fill(text, name, content())
        except ValueError as error:
            raise ValueError(f"{page}: {error}") from None
    return text


def write_all() -> list[str]:
    """Write every page whose blocks are not up to date; returns their names."""
    texts = {page: filled(page) for page in BLOCKS}
    changed = [page for page, text in texts.items() if text != (ROOT / page).read_text("utf-8")]
    for page in changed:
        (ROOT / page).write_text(texts[page], encoding="utf-8")
    return changed


if __name__ == "__main__":
    for changed_page in write_all():
        print(f"wrote {changed_page}")
