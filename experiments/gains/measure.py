"""Exact τ of trained drafts along the target's held-out responses, under every rule at once."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from experiments.assets import HELD_OUT, HELD_OUT_GREEDY, HELD_OUT_TRUNCATED
from experiments.gains.plan import RULES, Run
from experiments.gains.results import Measured, Results, Row
from specforge_lk.data.prompts import read_rows
from specforge_lk.decode.draft import load_draft
from specforge_lk.decode.target import Target
from specforge_lk.evaluate.report import versions
from specforge_lk.evaluate.responses import Chosen, Recorded, conversations_of
from specforge_lk.evaluate.settings import MEASUREMENT, Settings, digest, fingerprint
from specforge_lk.evaluate.teacher_forced import measure_responses
from specforge_lk.serving import Serving, parse

#: Responses to the same held-out prompts, a file per distribution that they were sampled from.
FILES = (HELD_OUT, HELD_OUT_GREEDY, HELD_OUT_TRUNCATED)
SETTINGS = Settings(heads=4, max_length=512, seed=0)


@dataclass
class Measurement:
    """What drafts are measured with.

    Attributes:
        target: folder of the target.
        conversations: how many responses of each file, from its start.
        device: torch device.
        chosen: by rule, the responses to measure along.
    """

    target: Path
    conversations: int
    device: str = "cpu"
    chosen: dict[Serving, Chosen] = field(init=False)
    _loaded: Target | None = None

    def __post_init__(self) -> None:
        rows = [row for path in FILES for row in read_rows(str(path))]
        recorded = Recorded.of(rows, sampled_by=None, off_policy=False, remedy="")
        rules = [parse(text) for text in RULES.values()]
        self.chosen = {rule: recorded.along(rule, self.conversations) for rule in rules}

    @property
    def responses(self) -> dict[str, str]:
        """By rule, what tells its responses, and how rounds along them are counted, from others."""
        return {
            str(rule): fingerprint(MEASUREMENT, chosen.identity, asdict(SETTINGS))
            for rule, chosen in self.chosen.items()
        }

    def add(self, results: Results, runs: Sequence[Run]) -> None:
        """Measure the drafts of runs, and put their rows into ``results``."""
        target = self._loaded or Target.load(str(self.target), device=self.device)
        self._loaded = target
        drafts = [load_draft(run.training.draft, target) for run in runs]
        measured: list[dict[str, Measured]] = [{} for _ in runs]
        for chosen, rules in self._together():
            conversations = conversations_of(chosen, target)
            wanted = [(draft, rules) for draft in drafts]
            found = measure_responses(target, wanted, conversations, SETTINGS)
            for of_draft, by_rule in zip(measured, found, strict=True):
                for rule, rounds in by_rule.items():
                    identity = self.responses[str(rule)]
                    results.responses[identity] = rounds.tokens.tolist()
                    of_draft[str(rule)] = Measured.of(rounds, identity)
        for run, by_rule_text in zip(runs, measured, strict=True):
            in_order = {text: by_rule_text[text] for text in self.responses}
            results.put(row_of(run, in_order, self.device))

    def _together(self) -> list[tuple[Chosen, list[Serving]]]:
        """Group the rules by the responses that they are measured along."""
        found: dict[str, tuple[Chosen, list[Serving]]] = {}
        for rule, chosen in self.chosen.items():
            found.setdefault(chosen.identity, (chosen, []))[1].append(rule)
        return list(found.values())


def row_of(run: Run, measured: dict[str, Measured], device: str) -> Row:
    """Return the row of a run that was trained on this machine."""
    training = run.training
    start = run.start
    return Row(
        part=run.part,
        architecture=run.architecture,
        objective=run.objective,
        seed=run.seed,
        samples=run.samples,
        steps=run.steps,
        start_steps=run.start_steps,
        start_weights=digest(str(start.training.draft))[:16] if start else None,
        inputs=run.inputs,
        code=run.code,
        command=shlex.join(training.command),
        device=device,
        seconds=training.seconds,
        last_step={k: float(f"{v:.5g}") for k, v in training.last_metrics().items()},
        versions=versions(),
        measured=measured,
    )
