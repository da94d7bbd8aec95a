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


__all__ = ["RESAMPLES", "bootstrap_ratio", "percentiles", "resamples"]
