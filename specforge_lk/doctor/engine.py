"""What an engine counted: accepted tokens in a file, or the metrics of a running server."""

from __future__ import annotations

import math
import re
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from specforge_lk.doctor.findings import Expected, Observed
from specforge_lk.files import read_json

#: A line of Prometheus text: name, labels, value.
_LINE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_POSITION = re.compile(r'position="(\d+)"')
#: Standard errors of a 95 % interval.
_Z = 1.96
#: Names of the counts, ours first, then vLLM's.
_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "drafts": ("drafts", "rounds", "num_drafts"),
    "draft_tokens": ("draft_tokens", "num_draft_tokens"),
    "accepted": ("accepted_tokens", "num_accepted_tokens"),
    "per_position": (
        "accepted_per_position",
        "accepted_tokens_per_position",
        "num_accepted_tokens_per_pos",
    ),
}
_VLLM, _SGLANG = "vllm:spec_decode_", "sglang:"


@dataclass(frozen=True)
class Counts:
    """What an engine counted since its start.

    Attributes:
        drafts: verification steps.
        accepted: drafted tokens accepted.
        draft_tokens: drafted tokens; None where the engine does not count them.
        per_position: how many steps accepted the drafted token of each position; may be empty.
        source: where the counts are from.
    """

    drafts: float
    accepted: float
    draft_tokens: float | None
    per_position: tuple[float, ...]
    source: str

    def __post_init__(self) -> None:
        if self.drafts <= 0:
            raise ValueError(
                f"{self.source}: no verification step was counted; let the engine answer some "
                "requests with speculative decoding first"
            )
        if self.draft_tokens is not None and self.accepted > self.draft_tokens:
            raise ValueError(
                f"{self.source}: {self.accepted:g} tokens were accepted of {self.draft_tokens:g} "
                "drafted ones; give the counts of one engine over one span of time"
            )

    @property
    def heads(self) -> int | None:
        """K, where the counts tell."""
        if self.per_position:
            return len(self.per_position)
        return round(self.draft_tokens / self.drafts) if self.draft_tokens else None

    @property
    def tau(self) -> float:
        """Tokens per verification step, the target's own included."""
        return 1 + self.accepted / self.drafts

    @property
    def standard_error(self) -> float | None:
        """Standard error of τ, by the spread of accepted lengths; None without positions.

        Verification steps are taken to be independent, so it is rather too small.
        """
        if not self.per_position:
            return None
        mean = self.accepted / self.drafts
        # E[n²] = Σ_k (2k - 1) P(n ≥ k).
        square = sum((2 * k - 1) * n for k, n in enumerate(self.per_position, 1)) / self.drafts
        return math.sqrt(max(0.0, square - mean**2) / self.drafts)


def read_counts(path: Path) -> Counts:
    """Read counts from a JSON file.

    It has ``drafts`` (or ``rounds``), ``accepted_tokens`` and, if known, ``draft_tokens`` and
    ``accepted_per_position``; or vLLM's names of the same, with or without their prefix.

    Raises:
        ValueError: a count is missing or no number.
    """
    read = read_json(path, "give one JSON object with the engine's counts")
    plain = {name.removeprefix(_VLLM).removesuffix("_total"): v for name, v in read.items()}
    found: dict[str, Any] = {
        field: next((plain[name] for name in names if name in plain), None)
        for field, names in _NAMES.items()
    }
    positions = found["per_position"] or ()
    if not isinstance(positions, list | tuple) or not all(map(_is_count, positions)):
        raise ValueError(
            f"--accepted {path}: accepted_per_position must be a list of counts, got {positions!r}"
        )
    drafts, accepted, drafted = (found[name] for name in ("drafts", "accepted", "draft_tokens"))
    if accepted is None and positions:
        accepted = sum(positions)
    if not (_is_count(drafts) and _is_count(accepted) and (drafted is None or _is_count(drafted))):
        raise ValueError(
            f"--accepted {path}: drafts is {drafts!r}, accepted_tokens {accepted!r} and "
            f"draft_tokens {drafted!r}; it needs counts as the first two and, if known, "
            "draft_tokens and accepted_per_position"
        )
    return Counts(float(drafts), float(accepted), drafted, tuple(map(float, positions)), str(path))


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def fetch_counts(url: str, timeout: float = 10) -> Counts:
    """Read counts from the metrics of a running vLLM or SGLang server.

    Args:
        url: of the server or of its ``/metrics``.
        timeout: in seconds.

    Raises:
        OSError: the server does not answer.
        ValueError: it has no metrics of speculative decoding.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--metrics {url}: give the address of a server, http://HOST:PORT")
    address = url if url.rstrip("/").endswith("/metrics") else f"{url.rstrip('/')}/metrics"
    try:
        with urllib.request.urlopen(address, timeout=timeout) as answer:
            text = answer.read().decode("utf-8", "replace")
    except OSError as error:
        raise OSError(
            f"--metrics {address} does not answer ({error}); check the address"
        ) from error
    return read_metrics(text, address)


def read_metrics(text: str, source: str) -> Counts:
    """Read counts from Prometheus text, summed over a server's engines.

    vLLM counts drafts, drafted and accepted tokens. SGLang counts verification calls and generated
    tokens, of which the first of every request comes from the prefill; its gauge of the accepted
    length is of the last moments only.

    Raises:
        ValueError: the text has no metrics of speculative decoding.
    """
    sums: dict[str, float] = {}
    positions: dict[int, float] = {}
    for line in text.splitlines():
        if not (match := _LINE.match(line)):
            continue
        name, labels, written = match[1].removesuffix("_total"), match[2] or "", match[3]
        try:
            value = float(written)
        except ValueError:
            continue
        sums[name] = sums.get(name, 0.0) + value
        if name == f"{_VLLM}num_accepted_tokens_per_pos" and (at := _POSITION.search(labels)):
            positions[int(at[1])] = positions.get(int(at[1]), 0.0) + value
    if (drafts := sums.get(f"{_VLLM}num_drafts")) is not None:
        return Counts(
            drafts,
            sums.get(f"{_VLLM}num_accepted_tokens", 0.0),
            sums.get(f"{_VLLM}num_draft_tokens"),
            tuple(positions[at] for at in sorted(positions)),
            source,
        )
    if (calls := sums.get(f"{_SGLANG}spec_verify_calls")) is not None:
        generated = sums.get(f"{_SGLANG}generation_tokens", 0.0)
        requests = sums.get(f"{_SGLANG}num_requests", 0.0)
        return Counts(calls, generated - requests - calls, None, (), source)
    raise ValueError(
        f"{source} has no metrics of speculative decoding; start vLLM with a speculative_config, "
        "or SGLang (0.5.14 or later) with a speculative algorithm and --enable-metrics"
    )


def observe(counts: Counts, expected: Expected | None) -> Observed:
    """Return the engine's τ, and whether it is within the intervals of the expected one."""
    error = counts.standard_error
    interval = None
    if error is not None:
        interval = (counts.tau - _Z * error, counts.tau + _Z * error)
    within = None
    if expected is not None:
        half = _half(expected.interval)
        allowed = math.hypot(half, _Z * (error or 0.0))
        within = abs(counts.tau - expected.tau) <= allowed
    return Observed(counts.tau, interval, counts.drafts, counts.source, within)


def _half(interval: Sequence[Any]) -> float:
    return (float(interval[1]) - float(interval[0])) / 2


__all__ = ["Counts", "fetch_counts", "observe", "read_counts", "read_metrics"]
