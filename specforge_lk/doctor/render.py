"""The doctor's report as tables."""

from __future__ import annotations

from collections.abc import Sequence

from specforge_lk.doctor.findings import Cost, Finding, Observed, Report, State, Weight

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def finding_rows(report: Report) -> Table:
    """Return header and rows of the findings, the costliest first."""
    header = ("check", "what differs", "fits the draft", "as served", "cost in τ", "remedy")
    return header, [
        (check, f.what, f.trained, f.served, _cost(f), f.remedy) for check, f in report.findings
    ]


def outcome_rows(report: Report) -> Table:
    """Return header and rows of all checks."""
    return ("check", "state", "note"), [
        (outcome.check, str(outcome.state), outcome.note or _summary(outcome.findings))
        for outcome in report.outcomes
    ]


def conclusion(report: Report) -> list[str]:
    """Return the lines that a report ends with."""
    lines = []
    if report.expected is None:
        lines.append("τ to expect: not measured; give --held-out")
    else:
        found = report.expected
        caveat = f"; {found.caveat}" if found.caveat else ""
        lines.append(
            f"τ to expect under {report.serving}, K = {report.heads}: {found.tau:.3f} "
            f"{_interval(found.interval)} on {found.responses} responses{caveat}"
        )
    if report.malformed_rows_left_out:
        lines.append(f"{report.malformed_rows_left_out} malformed rows were left out")
    if report.observed:
        lines.append(_observed(report.observed))
    costly = [f for _, f in report.findings if f.weight is Weight.COSTS]
    unknown = [f for _, f in report.findings if f.weight is Weight.UNKNOWN]
    left = sum(outcome.state is State.NOT_CHECKED for outcome in report.outcomes)
    lines.append(
        f"{len(costly)} findings cost something, of {len(unknown)} the cost is unknown; "
        f"{left} checks were not made"
    )
    return lines


def _observed(observed: Observed) -> str:
    spread = _interval(observed.interval) if observed.interval else "(no spread is counted)"
    verdict = {None: "", True: ": within the interval", False: ": outside the interval"}
    return (
        f"the engine's τ: {observed.tau:.3f} {spread} over {observed.verifications:.0f} "
        f"verification steps{verdict[observed.within]}"
    )


def _summary(findings: Sequence[Finding]) -> str:
    return "; ".join(_cost(finding) for finding in findings)


def _cost(finding: Finding) -> str:
    if finding.cost is None:
        return f"not measured: {finding.caveat}"
    text = _measured(finding.cost)
    return f"{text}; {finding.caveat}" if finding.caveat else text


def _measured(cost: Cost) -> str:
    change = f"{cost.served:.3f}, not {cost.remedied:.3f}"
    return f"{cost.tau:+.3f} {_interval(cost.interval, '+')} ({change})"


def _interval(interval: tuple[float, float], sign: str = "") -> str:
    low, high = interval
    return f"[{low:{sign}.3f}, {high:{sign}.3f}]"


__all__ = ["conclusion", "finding_rows", "outcome_rows"]
