"""What the study trains: objectives, serving rules, and the runs of each of its parts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml
from pydantic import ValidationError
from specforge.losses import LossRegistry

from experiments.assets import GGUF_MEMBER, RESPONSES, TARGET_PACKAGE
from experiments.runner import RUNS, Training, code_of
from specforge_lk.serving import parse

#: Of every difference.
BASELINE: Final = "kl"
#: Samples per optimizer step, those of the configs.
BATCH: Final = 4
#: For fine-tuning; the configs' learning rate is for a draft from scratch.
TUNING: Final = ("training.learning_rate=0.0005",)
#: For a rule with greedy drafting: the likeliest token's probability has a gradient in few tokens
#: alone, and at `TUNING`'s rate 36 steps of it left a draft below its start.
GREEDY_TUNING: Final = ("training.learning_rate=0.0001",)

#: Serving rules by short name. Every draft is measured under each; `RULE_LOSS` trains for each.
RULES: Final = {
    "T0": "temperature=0",
    "T1": "temperature=1",
    "T1-greedy": "temperature=1,drafting=greedy",
    "T0.7": "temperature=0.7,top_p=0.9",
}


def _loss(name: str, **options: object) -> tuple[str, ...]:
    words = (f"training.loss_options.{option}={value}" for option, value in options.items())
    return (f"training.loss={name}", *words)


#: The loss whose option `serving` names each rule in turn. Not one with KL: below temperature 1 the
#: draft is served sharper than it is, which KL to the sharper target undoes. With lk_lambda, eta
#: 10, a draft trained for temperature 0.7 accepted less there than its start.
RULE_LOSS: Final = _loss("tv")
#: By name, what an objective is in a run's command.
OBJECTIVES: Final = {
    BASELINE: _loss("kl"),
    "lk_lambda-3": _loss("lk_lambda", eta=3),
    "lk_lambda-10": _loss("lk_lambda", eta=10),
    "lk_alpha": _loss("lk_alpha"),
    "tv": _loss("tv"),
    # With the lambda of lk_lambda-10: beside it, these five differ in how they see the chain alone.
    "tau-product": _loss("tau", eta=10, estimator="product"),
    "tau": _loss("tau", eta=10, estimator="weighted"),
    "survival": _loss("lk_lambda", eta=10, chain_weight="survival"),
    "dpace": _loss("lk_lambda", eta=10, chain_weight="dpace"),
    "auf": _loss("lk_lambda", eta=10, chain_weight="auf"),
    # Without KL, and weighted.
    "tv-survival": _loss("tv", chain_weight="survival"),
    "tv-auf": _loss("tv", chain_weight="auf"),
    # KL's weight falls to 0 in the first half of the run, whatever the acceptance rate.
    "schedule": _loss("lk_lambda", lambda_scope="schedule"),
    "tau-schedule": _loss("tau", lambda_scope="schedule"),
    # The expectation alone, from a start that has a gradient.
    "tau-alone": _loss("tau", lambda_scope="fixed", lambda_fixed=0),
    **{
        f"for-{name}": (*RULE_LOSS, f"training.loss_options.serving={rule}")
        for name, rule in RULES.items()
    },
}


def tuning_of(objective: str) -> tuple[str, ...]:
    """Return the settings that an objective fine-tunes with, beside its own."""
    rule = RULES.get(objective.removeprefix("for-"))
    return GREEDY_TUNING if rule and parse(rule).greedy_draft else TUNING


@dataclass(frozen=True)
class Part:
    """A question of the study.

    Attributes:
        title: its heading in the report.
        objectives: what is trained, baseline first.
        steps: optimizer steps of every draft that is compared.
        start_steps: of the KL drafts that they start from; empty where they start from scratch.
        then: objectives that fine-tune a KL draft in the last fifth of the steps, beside those
            that have all steps from scratch.
    """

    title: str
    objectives: tuple[str, ...]
    steps: tuple[int, ...]
    start_steps: tuple[int, ...] = ()
    then: tuple[str, ...] = ()


PARTS: Final = {
    "fine-tune": Part(
        "Fine-tuning a KL draft",
        tuple(n for n in OBJECTIVES if not n.startswith("for-") and "schedule" not in n),
        steps=(96, 384),
        start_steps=(384, 1536),
    ),
    "scratch": Part(
        "From scratch, and KL then another objective, at equal steps",
        (BASELINE, "lk_lambda-3", "lk_lambda-10", "schedule", "lk_alpha", "tau", "tau-schedule"),
        steps=(480, 1920),
        then=("lk_lambda-10", "tv", "tau"),
    ),
    "rules": Part(
        "Trained for one serving rule, served by another",
        (BASELINE, *(f"for-{name}" for name in RULES)),
        steps=(96,),
        start_steps=(384,),
    ),
}
ARCHITECTURES: Final = ("eagle3", "medusa", "mlp_speculator", "mtp", "dflash")
SEEDS: Final = (0, 1, 2)
#: All responses that there are to train on.
SAMPLES: Final = 768


def start_of(total: int) -> int:
    """Return the KL steps before a fine-tuning that ends after ``total``: four fifths."""
    return total * 4 // 5


@dataclass(frozen=True)
class Run:
    """One draft.

    Attributes:
        architecture: the algorithm, which has a config of its own.
        objective: of `OBJECTIVES`.
        seed: of training.
        samples: responses that are trained on.
        steps: optimizer steps.
        start_steps: of the KL draft of the same seed that it starts from; 0 is from scratch.
    """

    architecture: str
    objective: str
    seed: int
    samples: int
    steps: int
    start_steps: int = 0

    @property
    def part(self) -> str:
        """The part of the study that it is trained for."""
        if self.objective.startswith("for-"):
            return "rules"
        return "fine-tune" if self.start_steps else "scratch"

    @property
    def start(self) -> Run | None:
        """The draft that it starts from."""
        if not self.start_steps:
            return None
        return Run(self.architecture, BASELINE, self.seed, self.samples, self.start_steps)

    @property
    def baseline(self) -> Run:
        """The draft that differs from it in the objective alone."""
        return Run(
            *(self.architecture, BASELINE, self.seed),
            *(self.samples, self.steps, self.start_steps),
        )

    @property
    def training(self) -> Training:
        """Return what trains it."""
        home = RUNS / "gains"
        return Training(
            *(self.architecture, self.objective, self.seed),
            home / f"{self.samples}" / f"{self.start_steps}-{self.steps}",
            # As many passes as the steps need; the steps end the last one.
            epochs=math.ceil(self.steps * BATCH / self.samples),
            batch=BATCH,
            max_steps=self.steps,
            start=self.start.training if self.start else None,
            settings=tuning_of(self.objective) if self.start_steps else (),
            objective=OBJECTIVES[self.objective],
            captured=home / f"features-{self.samples}",
        )

    @property
    def inputs(self) -> str:
        """Return a digest of what the draft is made from, code aside.

        It needs nothing but the repository, so that a row is known again on a fresh machine.
        """
        training = self.training
        sources = [training.config_path, training.draft_config, RESPONSES]
        return _digest(
            [training.command, TARGET_PACKAGE, GGUF_MEMBER, self.samples],
            [self.start.inputs if self.start else ""],
            [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources],
        )

    @property
    def code(self) -> str:
        """Return a digest of the sources that the draft depends on."""
        sources = code_of(self.architecture)
        return _digest([hashlib.sha256(path.read_bytes()).hexdigest() for path in sources])


def _digest(*parts: list[object] | list[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def runs_of(
    part: str,
    architectures: Iterable[str] = ARCHITECTURES,
    objectives: Sequence[str] | None = None,
    seeds: Iterable[int] = SEEDS,
    steps: Sequence[int] | None = None,
    start_steps: Sequence[int] | None = None,
    samples: int = SAMPLES,
) -> list[Run]:
    """Return the runs of a part, each after the run that it starts from.

    Args:
        part: of `PARTS`.
        architectures: which.
        objectives: which of the part's; the baseline is always among them.
        seeds: which.
        steps: in place of the part's.
        start_steps: in place of the part's; no effect on drafts from scratch.
        samples: responses that are trained on.
    """
    of = PARTS[part]

    def chosen(names: Iterable[str]) -> list[str]:
        return [n for n in names if objectives is None or n in objectives]

    tuned = chosen(n for n in of.objectives if n != BASELINE)
    found: dict[Run, None] = {}
    for architecture in architectures:
        for seed in seeds:

            def add(objective: str, steps: int, start: int = 0) -> None:
                run = Run(architecture, objective, seed, samples, steps, start)  # noqa: B023
                for before in filter(None, (run.start, run.baseline, run)):
                    found.setdefault(before)

            for count in steps or of.steps:
                if of.start_steps:
                    for start in start_steps or of.start_steps:
                        for objective in (BASELINE, *tuned):
                            add(objective, count, start)
                    continue
                for objective in (BASELINE, *tuned):
                    add(objective, count)
                for objective in chosen(of.then):
                    start = start_of(count)
                    add(objective, count - start, start)
    return list(found)


def check_objectives(names: Iterable[str], registry: LossRegistry) -> None:
    """Refuse objectives that the installed losses do not have, before anything is trained.

    Raises:
        ValueError: a loss or one of its options is not there.
    """
    for name in names:
        loss, *options = (word.partition("=")[2] for word in OBJECTIVES[name])
        names_of = [word.partition("=")[0].rpartition(".")[2] for word in OBJECTIVES[name][1:]]
        values = dict(zip(names_of, map(yaml.safe_load, options), strict=True))
        try:
            registry.resolve(loss).options.model_validate(values)
        except (KeyError, ValidationError) as error:
            known = error.args[0] if isinstance(error, KeyError) else error
            raise ValueError(
                f"objective {name}: {known}; leave it out with --objectives"
            ) from error


def features_of(runs: Iterable[Run]) -> dict[tuple[Path, Path | None], Path]:
    """Return what must be captured, features and draft vocabulary, with a config that does it."""
    found: dict[tuple[Path, Path | None], Path] = {}
    for run in runs:
        training = run.training
        found.setdefault((training.features, training.vocab_mapping), training.config_path)
    return found
