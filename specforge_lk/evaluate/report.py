"""The report of an evaluation or an experiment: one schema, read from and written to JSON.

``report.json`` is the source; its markdown and its chart are drawn from it alone, see `render`.
"""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from specforge_lk.files import write_text

#: Benchmark name of the teacher-forced measurement on held-out responses.
HELD_OUT = "held_out"

Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Result(_Strict):
    """Acceptance of one draft on one benchmark at one temperature.

    A sampled benchmark has ``tau`` (pooled, K · accepted / drafted + 1); held-out responses have
    ``tau_expected`` (1 + mean over chain starts of Σ_k Π_{i≤k} α_i). Intervals are 95 % bootstrap
    intervals over prompts or conversations.

    ``alpha_per_head`` has a value per draft position: the exact Σ min(p, q), averaged over all
    chain starts of held-out responses, and on benchmarks over the chains in which the position was
    reached; ``alpha_per_head_empirical`` counts acceptances there. A draft position that was never
    reached has null.
    """

    algorithm: str
    loss: str
    seed: int = Field(description="training seed of the draft")
    temperature: float
    benchmark: str
    draft_sampling: str
    heads: int
    tau: float | None = None
    tau_ci: Interval | None = None
    tau_expected: float | None = None
    tau_expected_ci: Interval | None = None
    alpha_per_head: list[float | None]
    alpha_per_head_empirical: list[float | None] | None = None
    coverage: float | None
    drafted: int | None = None
    accepted: int | None = None
    prompts: int | None = None
    skipped: int = Field(
        default=0, description="prompts or conversations left out: too long, or too short"
    )
    generated_tokens: int | None = None
    conversations: int | None = None
    chain_starts: int | None = None
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
        )

    @property
    def measured_tau(self) -> float | None:
        """Expected τ on held-out responses, pooled τ on a benchmark."""
        return self.tau_expected if self.benchmark == HELD_OUT else self.tau


class Paired(_Strict):
    """The difference in τ between two drafts, ``loss`` minus ``baseline``.

    On held-out responses it is that of expected τ over the same chain starts, on a benchmark that
    of pooled τ over the same prompts.
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
    chain_starts: int | None = None
    conversations: int | None = None
    prompts: int | None = None


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
        """Add a result in place of an older one for the same key."""
        self.results = [old for old in self.results if old.key != result.key] + [result]

    def write(self, path: Path) -> None:
        """Write ``path`` as JSON, whole or not at all."""
        write_text(path, self.model_dump_json(indent=2) + "\n")


def read_report(path: Path) -> Report:
    """Read a report.

    Raises:
        ValueError: the file is not a report; the message names it, and the field that is wrong.
    """
    try:
        return Report.model_validate_json(path.read_text(encoding="utf-8"))
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


__all__ = ["HELD_OUT", "Interval", "Paired", "Report", "Result", "Training", "read_report"]
__all__ += ["versions"]
