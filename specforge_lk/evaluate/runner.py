"""The whole evaluation: every draft on all that is asked for, continued where it was."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from specforge_lk.data.conversations import tokenize
from specforge_lk.data.prompts import HUB_PREFIX, read_rows, user_turns
from specforge_lk.decode.checkpoint import DraftError
from specforge_lk.decode.draft import Draft
from specforge_lk.decode.prefill import Prefills
from specforge_lk.decode.target import Target
from specforge_lk.evaluate.arrays import Arrays
from specforge_lk.evaluate.benchmarks import (
    Drafted,
    measure_benchmark,
    paired_benchmark_difference,
)
from specforge_lk.evaluate.held_out import ChainStarts, measure_held_out, paired_difference
from specforge_lk.evaluate.report import HELD_OUT, Paired, Report, Result, read_report, versions
from specforge_lk.evaluate.settings import MEASUREMENT, Settings, Track, digest, fingerprint


@dataclass(frozen=True)
class LoadedDraft:
    """A draft with the names it is reported under: its training loss and training seed."""

    loss: str
    seed: int
    path: str
    model: Draft


@dataclass(frozen=True)
class Source:
    """What to measure on.

    Attributes:
        name: `HELD_OUT` or the benchmark's name.
        path: a file or a dataset of the hub.
        rows: its rows, as many as the settings allow.
        identity: what tells its content from another.
    """

    name: str
    path: str
    rows: list[dict[str, Any]]
    identity: str

    @classmethod
    def read(cls, name: str, path: str, limit: int | None) -> Source:
        """Read the first rows of a JSONL file or of a dataset of the hub."""
        rows = read_rows(path)[:limit]
        return cls(name, path, rows, path if path.startswith(HUB_PREFIX) else digest(path))


def run(
    target: Target,
    target_path: str,
    drafts: Sequence[LoadedDraft],
    *,
    benchmarks: dict[str, str],
    held_out: str | None,
    temperatures: Sequence[float],
    settings: Settings,
    out: Path,
    track: Track,
    command: Sequence[str] = (),
    published: str | None = None,
) -> Report:
    """Measure every draft on everything asked for, writing ``out`` after each measurement.

    A result already in ``out`` is kept when the models, the data and the settings are the same.

    Args:
        target: the loaded target.
        target_path: where it was loaded from.
        drafts: the drafts; each is compared with every earlier one.
        benchmarks: name -> JSONL file or ``hub:…``.
        held_out: JSONL of conversations, or None.
        temperatures: sampling temperatures, 0 for greedy decoding.
        settings: see `Settings`.
        out: report.json to write or to continue.
        track: opens a progress display.
        command: command line, for the report.
        published: target of `specforge_lk.evaluate.published` to compare with.

    Raises:
        ValueError: the drafts, the target, the data or the report in ``out`` do not fit.
    """
    _require(target, target_path, drafts, benchmarks, settings)
    report = read_report(out) if out.exists() else Report()
    dtype = str(target.head.weight.dtype).removeprefix("torch.")
    report.settings = {
        "target": target_path,
        "dtype": dtype,
        "device": str(target.device),
        "threads": torch.get_num_threads(),
        **asdict(settings),
        "draft_sampling": str(settings.draft_sampling),
    }
    report.versions, report.command = versions(), list(command)
    report.published = published
    common = [MEASUREMENT, digest(target_path), dtype, asdict(settings)]
    evaluation = _Evaluation(target, drafts, temperatures, settings, out, track, report, common)

    # Read all data first: a bad row should not surface after an hour of measuring.
    sources = [Source.read(name, path, settings.limit) for name, path in benchmarks.items()]
    responses = Source.read(HELD_OUT, held_out, settings.held_out_limit) if held_out else None
    ends = sorted(target.eos_ids)
    if responses is not None and ends != [target.tokenizer.eos_token_id]:
        # Figures of responses that ended at the tokenizer's token alone are not continued.
        responses = replace(responses, identity=f"{responses.identity}, ended by {ends}")
    prompts = [[user_turns(row, source.path) for row in source.rows] for source in sources]
    if responses is not None:
        evaluation.measure_held_out(responses)
        evaluation.compare([HELD_OUT])
    for source, turns in zip(sources, prompts, strict=True):
        evaluation.measure_benchmark(source, turns)
    evaluation.compare(list(benchmarks))
    return report


def _require(
    target: Target,
    target_path: str,
    drafts: Sequence[LoadedDraft],
    benchmarks: dict[str, str],
    settings: Settings,
) -> None:
    """Refuse what cannot be measured, before anything is."""
    for draft in drafts:
        limit = draft.model.max_heads
        if limit is not None and settings.heads > limit:
            raise DraftError(
                f"draft {draft.path} proposes {limit} tokens at most, not {settings.heads}; "
                f"set --heads to at most {limit}"
            )
    if benchmarks and not target.rewinds:
        raise ValueError(
            f"benchmarks ({', '.join(benchmarks)}) are decoded speculatively, but the target "
            f"{target_path} has layers whose cache cannot leave out rejected tokens here "
            "(recurrent ones, or attention that is neither full nor sliding); leave out "
            "--benchmark and give --held-out, or measure in a serving engine"
        )


@dataclass
class _Evaluation:
    """One run of the evaluation: what is measured, and the report that it fills.

    Attributes:
        common: what the fingerprints of all its results begin with.
        identities: what tells each draft from another.
    """

    target: Target
    drafts: Sequence[LoadedDraft]
    temperatures: Sequence[float]
    settings: Settings
    out: Path
    track: Track
    report: Report
    common: list[Any]
    identities: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.identities = [digest(draft.path) for draft in self.drafts]

    def measure_held_out(self, source: Source) -> None:
        """Measure all drafts at once, since they share the target's pass over a response."""
        pending: list[list[Result]] = [
            [r for t in self.temperatures if not self._kept(r := self._empty(i, source, t))]
            for i in range(len(self.drafts))
        ]
        wanted = [
            (draft.model, [result.temperature for result in results])
            for draft, results in zip(self.drafts, pending, strict=True)
            if results
        ]
        if not wanted:
            return
        encoded = [tokenize(row, self.target.tokenizer, self.target.eos_ids) for row in source.rows]
        longest = min(self.settings.max_length, self.target.max_positions - self.settings.heads)
        fitting = [c for c in encoded if len(c.input_ids) <= longest]
        began = time.monotonic()
        with self.track("held-out responses", sum(len(c.input_ids) for c in fitting)) as progress:
            measured = measure_held_out(
                self.target, wanted, fitting, self.settings, progress.advance
            )
        seconds = round(time.monotonic() - began, 1)
        for results, found in zip(filter(None, pending), measured, strict=True):
            for result in results:
                starts = found[result.temperature]
                figures = starts.figures(self.settings.seed)
                skipped = len(encoded) - len(fitting)
                self._put(result, starts, {**figures, "skipped": skipped, "seconds": seconds})
        self.report.write(self.out)

    def measure_benchmark(self, source: Source, prompts: Sequence[Sequence[str]]) -> None:
        """Measure every draft at every temperature, and write the report after each."""
        layers = [layer for draft in self.drafts for layer in draft.model.capture_layers]
        prefills = Prefills(self.target, layers)
        turns = sum(min(len(turns), self.settings.turns) for turns in prompts)
        for temperature in self.temperatures:
            for index, draft in enumerate(self.drafts):
                result = self._empty(index, source, temperature)
                if self._kept(result):
                    continue
                began = time.monotonic()
                what = f"{source.name}, T = {temperature:g}, {draft.loss}"
                with self.track(what, turns * self.settings.max_new_tokens) as progress:
                    figures, counts = measure_benchmark(
                        self.target,
                        draft.model,
                        prompts,
                        temperature,
                        self.settings,
                        prefills,
                        progress.advance,
                    )
                seconds = round(time.monotonic() - began, 1)
                self._put(result, counts, {**figures, "seconds": seconds})
                self.report.write(self.out)

    def _empty(self, index: int, source: Source, temperature: float) -> Result:
        """Return a result without its figures."""
        draft = self.drafts[index]
        layers = list(draft.model.capture_layers)
        return Result(
            algorithm=draft.model.algorithm,
            loss=draft.loss,
            seed=draft.seed,
            temperature=temperature,
            benchmark=source.name,
            draft_sampling=str(self.settings.draft_sampling),
            heads=self.settings.heads,
            alpha_per_head=[],
            coverage=None,
            draft=draft.path,
            fingerprint=fingerprint(self.common, self.identities[index], layers, source.identity),
        )

    def _kept(self, result: Result) -> bool:
        """Whether the report already has this measurement, its arrays included."""
        found = self.report.find(result.key, result.fingerprint)
        if found is None:
            return False
        return found.arrays is None or (self.out.parent / found.arrays).is_file()

    def _put(self, result: Result, arrays: Arrays, figures: dict[str, Any]) -> None:
        """Save the arrays of a measurement and put its figures into the report."""
        name = f"{result.algorithm}-{result.loss}-seed{result.seed}-T{result.temperature:g}"
        if result.benchmark != HELD_OUT:
            name = f"{quote(result.benchmark, safe='')}-{name}"
        # Relative to the report's folder.
        path = f"{self.out.stem}-arrays/{name}-{result.draft_sampling}.npz"
        arrays.save(self.out.parent / path)
        self.report.put(result.model_copy(update={**figures, "arrays": path}))

    def compare(self, benchmarks: Sequence[str]) -> None:
        """Compare every draft with every earlier one of its algorithm and seed; write the report.

        Pairs that this run did not measure stay as they are.
        """
        order = [(d.model.algorithm, d.loss, d.seed) for d in self.drafts]

        def measured_here(of: Paired | Result, loss: str) -> bool:
            return (
                of.benchmark in benchmarks
                and of.temperature in self.temperatures
                and of.draft_sampling == self.settings.draft_sampling
                and (of.algorithm, loss, of.seed) in order
            )

        self.report.paired = [
            p
            for p in self.report.paired
            if not (measured_here(p, p.loss) or measured_here(p, p.baseline))
        ]
        measured = [r for r in self.report.results if r.arrays and measured_here(r, r.loss)]
        measured.sort(key=lambda r: order.index((r.algorithm, r.loss, r.seed)))
        measured.sort(key=lambda r: (benchmarks.index(r.benchmark), r.temperature))
        same = ("algorithm", "seed", "benchmark", "temperature")
        for baseline, result in combinations(measured, 2):
            if all(getattr(baseline, name) == getattr(result, name) for name in same):
                self.report.paired.append(self._paired(result, baseline))
        self.report.write(self.out)

    def _paired(self, result: Result, baseline: Result) -> Paired:
        """Compare two results, from the arrays of both."""
        files = [self.out.parent / str(r.arrays) for r in (result, baseline)]
        size: dict[str, int]
        if result.benchmark == HELD_OUT:
            a, b = map(ChainStarts.load, files)
            difference, interval = paired_difference(a, b, self.settings.seed)
            size = a.size
        else:
            c, d = map(Drafted.load, files)
            difference, interval = paired_benchmark_difference(
                c, d, result.heads, self.settings.seed
            )
            size = c.size
        return Paired(
            benchmark=result.benchmark,
            algorithm=result.algorithm,
            seed=result.seed,
            temperature=result.temperature,
            draft_sampling=result.draft_sampling,
            loss=result.loss,
            baseline=baseline.loss,
            difference=difference,
            ci=interval,
            **size,
        )


__all__ = ["LoadedDraft", "Source", "run"]
