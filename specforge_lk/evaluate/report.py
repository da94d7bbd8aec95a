"""The report of an evaluation or an experiment: one schema, read from and written to JSON.

``report.json`` is the source; its markdown and its chart are drawn from it alone, see `render`.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from specforge_lk.files import write_text

#: Benchmark name of the teacher-forced measurement on held-out responses.
HELD_OUT = "held_out"

Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Result(_Strict):
    """Acceptance of one draft on one benchmark under one serving rule.

    ``tau_rounds`` is τ: tokens behind the first of each response, over the rounds of decoding that
    they take. By the ``exact`` method rounds are expected ones, along responses that the target
    has sampled (`specforge_lk.evaluate.rounds`); by the ``sampled`` method they were decoded and
    counted. Intervals are 95 % bootstrap intervals over prompts or conversations.

    A figure per draft position is null where the position was never reached.

    Reports made before there was ``serving`` have other estimates of τ: on benchmarks ``tau``, and
    on held-out responses ``tau_expected``, 1 + mean over chain starts of Σ_k Π_{i≤k} α_i, which is
    biased.
    """

    algorithm: str
    loss: str
    seed: int = Field(description="training seed of the draft")
    temperature: float = Field(description="of the serving rule")
    benchmark: str
    draft_sampling: str = Field(description="drafting of the serving rule")
    heads: int
    serving: str | None = Field(default=None, description="the serving rule, as text")
    method: Literal["exact", "sampled"] | None = None
    tau_rounds: float | None = None
    tau_rounds_ci: Interval | None = None
    rounds: float | None = Field(default=None, description="rounds that all responses take")
    tau_start: float | None = Field(
        default=None,
        description="tokens of a round that begins at a chain start drawn evenly; all K follow it",
    )
    tau_start_ci: Interval | None = None
    tokens_per_forward: float | None = Field(
        default=None, description="tokens over rounds and prefills, each a target forward"
    )
    tokens_per_forward_ci: Interval | None = None
    tau: float | None = Field(
        default=None, description="sampled: K · accepted / drafted + 1, pooled over all chains"
    )
    tau_ci: Interval | None = None
    tau_expected: float | None = None
    tau_expected_ci: Interval | None = None
    alpha_per_head: list[float | None] = Field(
        description="exact: mean acceptance probability over all chain starts that K tokens "
        "follow; sampled: over the chains that reached the position"
    )
    alpha_per_head_ci: list[Interval | None] | None = None
    acceptance_per_head: list[float | None] | None = Field(
        default=None, description="exact: acceptance over the rounds that reach the position"
    )
    acceptance_per_head_ci: list[Interval | None] | None = None
    survival_per_head: list[float | None] | None = Field(
        default=None, description="share of the rounds in which the position was accepted"
    )
    survival_per_head_ci: list[Interval | None] | None = None
    alpha_per_head_empirical: list[float | None] | None = Field(
        default=None, description="sampled: acceptances counted where alpha_per_head is computed"
    )
    coverage: float | None
    coverage_ci: Interval | None = None
    drafted: int | None = None
    accepted: int | None = None
    prompts: int | None = None
    skipped: int = Field(
        default=0, description="prompts or conversations left out: too long, or too short"
    )
    generated_tokens: int | None = None
    conversations: int | None = None
    responses: int | None = None
    chain_starts: int | None = None
    off_rule_tokens: int | None = Field(
        default=None, description="tokens of the responses that have no probability under the rule"
    )
    off_policy: str | None = Field(
        default=None, description="what the responses were sampled by, where it is not the rule"
    )
    arrays: str | None = Field(
        default=None, description="arrays per chain start or per prompt, beside the report"
    )
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
            self.serving,
            self.method,
        )

    @property
    def check(self) -> bool:
        """Whether it was decoded to check an exact result, and says nothing new."""
        return self.method == "sampled"

    @property
    def measured_tau(self) -> float | None:
        """τ by rounds; in older reports expected τ on held-out responses, pooled τ elsewhere."""
        if self.serving is not None:
            return self.tau_rounds
        return self.tau_expected if self.benchmark == HELD_OUT else self.tau

    @property
    def measured_interval(self) -> list[float] | None:
        """The interval of `measured_tau`."""
        if self.serving is not None:
            return self.tau_rounds_ci
        return self.tau_expected_ci if self.benchmark == HELD_OUT else self.tau_ci


class Difference(_Strict):
    """A difference per draft position, or one: null where a draft has no such figure."""

    difference: list[float | None]
    ci: list[Interval | None]


class Paired(_Strict):
    """The difference in `Result.measured_tau` between two drafts, ``loss`` minus ``baseline``.

    Both were measured along the same responses, or decoded the same prompts.
    """

    benchmark: str
    algorithm: str
    seed: int
    temperature: float
    draft_sampling: str
    loss: str
    baseline: str
    difference: float
    ci: Interval
    serving: str | None = None
    method: Literal["exact", "sampled"] | None = None
    others: dict[str, Difference] = Field(
        default={}, description="exact: the differences of the other figures, by field of a result"
    )
    off_policy: str | None = Field(default=None, description="as of both results")
    chain_starts: int | None = None
    conversations: int | None = None
    responses: int | None = None
    prompts: int | None = None

    def compares(self, result: Result) -> bool:
        """Whether a result is one of the two."""
        same = ("algorithm", "seed", "benchmark", "temperature", "draft_sampling")
        return result.loss in (self.loss, self.baseline) and all(
            getattr(result, name) == getattr(self, name) for name in (*same, "serving", "method")
        )


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
    """Everything one evaluation or experiment measured."""

    preface: str | None = Field(
        default=None, description="markdown that sums the figures up, made with them"
    )
    results: list[Result] = []
    paired: list[Paired] = []
    training: list[Training] = []
    stages: dict[str, float | None] = Field(
        default={},
        description="wall clock of every stage in seconds; None where it was interrupted",
    )
    settings: dict[str, Any] = {}
    versions: dict[str, str] = {}
    command: list[str] = []
    notes: list[str] = Field(
        default=[], description="what a reader of these figures has to know first, added by hand"
    )
    published: str | None = Field(
        default=None, description="target in the paper's tables to compare with"
    )
    gains: dict[str, str] = Field(
        default={},
        description="by algorithm, the target whose gains in the paper to put beside these",
    )

    def find(self, key: tuple, fingerprint: str | None) -> Result | None:
        """Return the result with this key, if it was measured with the same settings and files."""
        for result in self.results:
            if result.key == key and result.fingerprint == fingerprint:
                return result
        return None

    def put(self, result: Result) -> None:
        """Add a result in place of an older one for the same key, and drop that one's pairs.

        What was measured before there was ``serving``, of the same draft on the same benchmark at
        the same temperature, goes too: it is another estimate of the same τ.
        """
        self._drop(
            lambda old: (
                old.key == result.key
                or (result.serving and old.serving is None and old.key[:5] == result.key[:5])
            )
        )
        self.results.append(result)

    def drop_outdated(self, result: Result) -> None:
        """Drop the result with this key, and its pairs, if it is of other settings or files."""
        self._drop(lambda old: old.key == result.key and old.fingerprint != result.fingerprint)

    def _drop(self, goes: Callable[[Result], object]) -> None:
        gone = [old for old in self.results if goes(old)]
        self.paired = [p for p in self.paired if not any(p.compares(old) for old in gone)]
        self.results = [old for old in self.results if old not in gone]

    def write(self, path: Path) -> None:
        """Write ``path`` as JSON, whole or not at all."""
        write_text(path, self.model_dump_json(indent=2) + "\n")


def read_report(path: Path) -> Report:
    """Read a report.

    Raises:
        ValueError: the file is not a report; the message names it, and the field that is wrong.
    """
    try:
        return Report.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(
            f"{path} is not a report of this version; move it away or choose another --out "
            f"({error.errors()[0]['msg']} at {error.errors()[0]['loc']})"
        ) from error


def versions() -> dict[str, str]:
    """Versions of what the figures depend on; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in ("specforge-lk", "specforge", "torch", "transformers", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


__all__ = [
    "HELD_OUT",
    "Difference",
    "Interval",
    "Paired",
    "Report",
    "Result",
    "Training",
    "read_report",
    "versions",
]
