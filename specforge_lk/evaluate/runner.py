"""The whole evaluation: every draft on all that is asked for, continued where it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import numpy as np
import torch

from specforge_lk.data.chat_template import as_option
from specforge_lk.data.conversations import Tokens
from specforge_lk.data.prompts import DataError
from specforge_lk.decode.checkpoint import DraftError
from specforge_lk.decode.draft import Draft
from specforge_lk.decode.prefill import Prefills
from specforge_lk.decode.target import Target
from specforge_lk.evaluate.arrays import Arrays
from specforge_lk.evaluate.asked import Asked, Benchmark, read
from specforge_lk.evaluate.benchmarks import respond
from specforge_lk.evaluate.compare import compare
from specforge_lk.evaluate.report import HELD_OUT, Report, Result, read_report, versions
from specforge_lk.evaluate.responses import Chosen, Recorded, conversations_of
from specforge_lk.evaluate.sampled import decode_benchmark
from specforge_lk.evaluate.settings import MEASUREMENT, Settings, Track, digest, fingerprint
from specforge_lk.evaluate.teacher_forced import measure_responses
from specforge_lk.serving import Serving


@dataclass(frozen=True)
class LoadedDraft:
    """A draft with the names it is reported under: its training loss and training seed."""

    loss: str
    seed: int
    path: str
    model: Draft


def run(
    target: Target,
    target_path: str,
    drafts: Sequence[LoadedDraft],
    asked: Asked,
    *,
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
        asked: what to measure.
        settings: see `Settings`.
        out: report.json to write or to continue.
        track: opens a progress display.
        command: command line, for the report.
        published: target of `specforge_lk.evaluate.published` to compare with.

    Raises:
        ValueError: the drafts, the target, the data or the report in ``out`` do not fit.
    """
    _require(target, target_path, drafts, asked, settings)
    report = read_report(out) if out.exists() else Report()
    dtype = str(target.head.weight.dtype).removeprefix("torch.")
    # Read all data first: a bad row should not surface after an hour of measuring.
    material = read(asked, target, target_path, settings)
    rules = material.rules
    report.settings = {
        "target": target_path,
        "dtype": dtype,
        "device": str(target.device),
        "threads": torch.get_num_threads(),
        **asdict(settings),
        "serving": "; ".join(map(str, rules)),
    }
    if target.chat_template_args:
        report.settings["chat_template_args"] = as_option(target.chat_template_args)
    if asked.left_out:
        report.settings["malformed_rows_left_out"] = {
            name: len(lines) for name, lines in asked.left_out.items()
        }
    report.versions, report.command = versions(), list(command)
    report.published = published
    common = [MEASUREMENT, digest(target_path), dtype, asdict(settings)]
    if target.chat_template_args:
        common.append(target.chat_template_args)
    evaluation = _Evaluation(
        target, target_path, drafts, rules, settings, out, track, report, common
    )
    if asked.held_out:
        evaluation.measure_held_out(material.recorded)
    for benchmark in material.benchmarks:
        evaluation.measure_benchmark(benchmark)
        if asked.sampled:
            evaluation.decode_benchmark(benchmark)
    compare(
        report,
        out.parent,
        [(draft.model.algorithm, draft.loss, draft.seed) for draft in drafts],
        [*([HELD_OUT] if asked.held_out else []), *asked.benchmarks],
        [str(rule) for rule in rules],
        settings.seed,
    )
    report.write(out)
    return report


def _require(
    target: Target,
    target_path: str,
    drafts: Sequence[LoadedDraft],
    asked: Asked,
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
    if asked.sampled and not target.rewinds:
        raise ValueError(
            f"--sampled decodes speculatively, but the target {target_path} has layers whose cache "
            "cannot leave out rejected tokens here (recurrent ones, or attention that is neither "
            "full nor sliding); leave --sampled out, or measure in a serving engine"
        )


@dataclass
class _Evaluation:
    """One run of the evaluation: what is measured, and the report that it fills.

    Attributes:
        common: what the fingerprints of all its results begin with.
        identities: what tells each draft from another.
    """

    target: Target
    target_path: str
    drafts: Sequence[LoadedDraft]
    rules: Sequence[Serving]
    settings: Settings
    out: Path
    track: Track
    report: Report
    common: list[Any]
    identities: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.identities = [digest(draft.path) for draft in self.drafts]

    def measure_held_out(self, recorded: Recorded) -> None:
        """Measure along held-out responses."""
        # Every rule's are looked for before anything is measured.
        chosen = {rule: recorded.along(rule, self.settings.held_out_limit) for rule in self.rules}
        ends = sorted(self.target.eos_ids)
        for identity, rules in _together(chosen, lambda rule: chosen[rule].identity):
            of = chosen[rules[0]]
            self._measure(
                "held-out responses",
                HELD_OUT,
                rules,
                f"{identity}, ended by {ends}",
                partial(conversations_of, of, self.target),
                {"off_policy": of.off_policy},
            )

    def measure_benchmark(self, benchmark: Benchmark) -> None:
        """Measure along the target's own responses to a benchmark."""
        for sampling, rules in _together(self.rules, lambda rule: rule.target):
            answers = respond(
                *(self.target, self.target_path, benchmark.name, benchmark.prompts, sampling),
                *(self.settings, self.out.parent / f"{self.out.stem}-responses", self.track),
            )
            self._measure(
                f"{benchmark.name}, {sampling}",
                benchmark.name,
                rules,
                fingerprint(benchmark.identity, answers.rows),
                partial(conversations_of, Chosen(answers.rows), self.target),
                {"prompts": len(set(answers.prompt.tolist())), "skipped": answers.skipped},
                answers.prompt,
            )
        # What another draft of this name decoded would stand beside the new figures.
        for rule in self.rules:
            for index in range(len(self.drafts)):
                self.report.drop_outdated(
                    self._empty(index, benchmark.name, benchmark.identity, rule, "sampled")
                )
        self.report.write(self.out)

    def _measure(
        self,
        what: str,
        name: str,
        rules: Sequence[Serving],
        identity: str,
        conversations: Callable[[], list[Tokens]],
        known: dict[str, Any],
        prompt: np.ndarray | None = None,
    ) -> None:
        """Measure all drafts at once, since they share the target's pass over a response."""
        pending = [
            {
                rule: result
                for rule in rules
                if not self._kept(result := self._empty(i, name, identity, rule, "exact"))
            }
            for i in range(len(self.drafts))
        ]
        wanted = [
            (draft.model, list(results))
            for draft, results in zip(self.drafts, pending, strict=True)
            if results
        ]
        if not wanted:
            return
        encoded = conversations()
        longest = self.settings.longest(self.target.max_positions)
        fits = [len(c.input_ids) <= longest for c in encoded]
        fitting = [c for c, fit in zip(encoded, fits, strict=True) if fit]
        began = time.monotonic()
        with self.track(what, sum(len(c.input_ids) for c in fitting)) as progress:
            try:
                measured = measure_responses(
                    self.target, wanted, fitting, self.settings, progress.advance
                )
            except DataError as error:
                raise DataError(f"{what}: {error}") from error
        seconds = round(time.monotonic() - began, 1)
        for results, found in zip(filter(None, pending), measured, strict=True):
            for rule, result in results.items():
                rounds = found[rule]
                if prompt is not None:
                    rounds = replace(rounds, conversation=prompt[fits][rounds.conversation])
                figures = rounds.figures(self.settings.seed)
                skipped = known.get("skipped", 0) + len(encoded) - len(fitting)
                more = {**known, "skipped": skipped, "seconds": seconds}
                self._put(result, rounds, {**figures, **more})
        self.report.write(self.out)

    def decode_benchmark(self, benchmark: Benchmark) -> None:
        """Decode with every draft under every rule, and write the report after each."""
        layers = [layer for draft in self.drafts for layer in draft.model.capture_layers]
        prefills = Prefills(self.target, layers)
        turns = sum(min(len(turns), self.settings.turns) for turns in benchmark.prompts)
        for rule in self.rules:
            for index, draft in enumerate(self.drafts):
                result = self._empty(index, benchmark.name, benchmark.identity, rule, "sampled")
                if self._kept(result):
                    continue
                began = time.monotonic()
                what = f"{benchmark.name}, {rule}, {draft.loss}"
                with self.track(what, turns * self.settings.max_new_tokens) as progress:
                    figures, counts = decode_benchmark(
                        *(self.target, draft.model, benchmark.prompts, rule, self.settings),
                        *(prefills, progress.advance),
                    )
                seconds = round(time.monotonic() - began, 1)
                self._put(result, counts, {**figures, "seconds": seconds})
                self.report.write(self.out)

    def _empty(
        self,
        index: int,
        benchmark: str,
        identity: str,
        rule: Serving,
        method: Literal["exact", "sampled"],
    ) -> Result:
        """Return a result without its figures."""
        draft = self.drafts[index]
        layers = list(draft.model.capture_layers)
        measured = [self.common, self.identities[index], layers, identity, str(rule), method]
        return Result(
            algorithm=draft.model.algorithm,
            loss=draft.loss,
            seed=draft.seed,
            temperature=rule.temperature,
            benchmark=benchmark,
            draft_sampling=str(rule.drafting),
            serving=str(rule),
            method=method,
            heads=self.settings.heads,
            alpha_per_head=[],
            coverage=None,
            draft=draft.path,
            fingerprint=fingerprint(*measured),
        )

    def _kept(self, result: Result) -> bool:
        """Whether the report already has this measurement, its arrays included."""
        found = self.report.find(result.key, result.fingerprint)
        if found is None:
            return False
        return found.arrays is None or (self.out.parent / found.arrays).is_file()

    def _put(self, result: Result, arrays: Arrays, figures: dict[str, Any]) -> None:
        """Save the arrays of a measurement and put its figures into the report."""
        name = f"{result.algorithm}-{result.loss}-seed{result.seed}-{result.serving}"
        name = f"{quote(result.benchmark, safe='')}-{name}-{result.method}"
        # Relative to the report's folder.
        path = f"{self.out.stem}-arrays/{name}.npz"
        arrays.save(self.out.parent / path)
        self.report.put(result.model_copy(update={**figures, "arrays": path}))


_Key = TypeVar("_Key")


def _together(
    rules: Iterable[Serving], key: Callable[[Serving], _Key]
) -> list[tuple[_Key, list[Serving]]]:
    """Group rules by what they are measured along, in order."""
    found: dict[_Key, list[Serving]] = {}
    for rule in rules:
        found.setdefault(key(rule), []).append(rule)
    return list(found.items())


__all__ = ["LoadedDraft", "run"]
