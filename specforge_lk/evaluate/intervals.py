"""95 % bootstrap intervals of ratios of sums."""

from __future__ import annotations

import numpy as np

RESAMPLES = 1000


def resamples(count: int, seed: int) -> np.ndarray:
    """Return [RESAMPLES, count], how often each of ``count`` entries is drawn."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)


def percentiles(values: np.ndarray) -> list[float]:
    """Return the bounds between which 95 % of the values of all resamples lie."""
    return [float(bound) for bound in np.percentile(values, [2.5, 97.5])]


def bootstrap_ratio(numerator: np.ndarray, denominator: np.ndarray, seed: int) -> list[float]:
    """95 % percentile interval of Σ numerator / Σ denominator, resampling the entries [C]."""
    weights = resamples(len(numerator), seed)
    total = weights @ denominator
    return percentiles((weights @ numerator)[total > 0] / total[total > 0])


def pooled(
    numerator: np.ndarray, denominator: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Return Σ numerator / Σ denominator over the entries, for every resample.

    Args:
        numerator: [C, ...].
        denominator: [C, ...].
        weights: [R, C], how often each entry counts; None counts all once.

    Returns:
        [R, ...], or [...] without weights; NaN where the denominator is 0.
    """
    of = np.ones(len(numerator)) if weights is None else weights
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.tensordot(of, numerator, 1) / np.tensordot(of, denominator, 1)
    return np.where(np.isfinite(ratio), ratio, np.nan)


def bounds(values: np.ndarray) -> list[float] | None:
    """Return the 95 % percentiles of resampled values [R]; None where all are NaN."""
    known = values[~np.isnan(values)]
    return percentiles(known) if len(known) else None


def resampled(numerator: np.ndarray, denominator: np.ndarray, seed: int) -> np.ndarray:
    """Return the pooled ratio [R, ...] of every resample of the entries [C, ...].

    It is NaN where there is one entry only: a single draw says nothing of how draws vary.
    """
    ratio = pooled(numerator, denominator, resamples(len(numerator), seed))
    return ratio if len(numerator) > 1 else np.full_like(ratio, np.nan)


__all__ = ["RESAMPLES", "bootstrap_ratio", "bounds", "percentiles", "pooled", "resampled"]
__all__ += ["resamples"]
