"""What the doctor says: costs, findings and the state of every check."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Final


class Weight(StrEnum):
    """What a finding means for serving."""

    #: A cost was measured, above the tolerance and with its whole interval above 0.
    COSTS = "costs"
    #: Something differs, and what it costs could not be measured.
    UNKNOWN = "cost unknown"
    #: Something differs, and was measured to cost nothing.
    HARMLESS = "harmless"


class State(StrEnum):
    """What became of a check."""

    OK = "ok"
    FOUND = "found"
    #: An input that it needs was not given.
    NOT_CHECKED = "not checked"
    #: There is nothing of the kind in this draft, or under this rule.
    NOT_CONCERNED = "not concerned"


@dataclass(frozen=True)
class Cost:
    """A difference of two measured τ: the remedied draft's or setting's, less that as served.

    Attributes:
        tau: remedied - served, tokens per verification step.
        interval: its 95 % interval, paired, by a bootstrap over responses.
        remedied: τ with the suspected setting changed.
        served: τ as it is served.
    """

    tau: float
    interval: tuple[float, float]
    remedied: float
    served: float

    def exceeds(self, tolerance: float) -> bool:
        """Return whether this is a cost at all, beyond chance and ``tolerance``."""
        return self.tau >= tolerance and self.interval[0] > 0


@dataclass(frozen=True)
class Finding:
    """A difference between how a draft was trained and how it will be served.

    Attributes:
        what: the difference, in a sentence.
        trained: the setting that fits the draft, or that it was trained with.
        served: the setting that it will be served with.
        remedy: what to change.
        weight: see `Weight`.
        cost: what was measured; None where nothing could be.
        caveat: why there is no cost, or what to keep in mind about it.
    """

    what: str
    trained: str
    served: str
    remedy: str
    weight: Weight
    cost: Cost | None = None
    caveat: str = ""


@dataclass(frozen=True)
class Outcome:
    """A check, as it came out.

    Attributes:
        check: its name.
        state: see `State`.
        note: which input to give, why it is not concerned, or what was compared.
        findings: what was found.
    """

    check: str
    state: State
    note: str = ""
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Expected:
    """The τ to expect under the rule, from the draft as served.

    Attributes:
        tau: tokens per verification step, pooled over responses.
        interval: its 95 % interval, by a bootstrap over responses.
        responses: how many were measured.
        tokens: their tokens that verification steps emit.
        caveat: what the figure takes for granted.
    """

    tau: float
    interval: tuple[float, float]
    responses: int
    tokens: int
    caveat: str = ""


@dataclass(frozen=True)
class Observed:
    """The τ that an engine had.

    Attributes:
        tau: tokens per verification step.
        interval: 95 %, from the spread of accepted lengths; None where counts do not show it.
        verifications: how many.
        source: where the counts are from.
        within: whether it differs from the expected τ by no more than both intervals allow; None
            without an expected τ.
    """

    tau: float
    interval: tuple[float, float] | None
    verifications: float
    source: str
    within: bool | None = None


#: Version of the JSON report.
FORMAT: Final = 1


@dataclass(frozen=True)
class Report:
    """Everything that the doctor found.

    Attributes:
        target, draft: as given.
        algorithm: of the draft.
        serving: the rule.
        engine: the engine whose reading of the draft was measured; None when unknown.
        heads: drafted tokens per verification step, K.
        tolerance: costs below it are none, in τ.
        outcomes: of all checks, in the order of the table.
        expected: None without held-out responses.
        observed: None without an engine's counts.
        versions: of the packages that took part.
        malformed_rows_left_out: how many held-out rows could not be used.
    """

    target: str
    draft: str
    algorithm: str
    serving: str
    engine: str | None
    heads: int
    tolerance: float
    outcomes: tuple[Outcome, ...]
    expected: Expected | None
    observed: Observed | None
    versions: dict[str, str] = field(default_factory=dict)
    malformed_rows_left_out: int = 0

    @property
    def findings(self) -> list[tuple[str, Finding]]:
        """All findings with the names of their checks, the costliest first."""
        found = [(outcome.check, f) for outcome in self.outcomes for f in outcome.findings]
        order = list(Weight)
        return sorted(
            found, key=lambda pair: (order.index(pair[1].weight), -_tau(pair[1].cost), pair[0])
        )

    @property
    def wrong(self) -> bool:
        """Whether something costs, or may cost."""
        return any(finding.weight is not Weight.HARMLESS for _, finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON's types."""
        return {"format": FORMAT, "wrong": self.wrong, **asdict(self)}


def _tau(cost: Cost | None) -> float:
    return cost.tau if cost else 0.0


__all__ = [
    "Cost",
    "Expected",
    "Finding",
    "Observed",
    "Outcome",
    "Report",
    "State",
    "Weight",
]
