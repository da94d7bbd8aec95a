"""Tolerances between computations that add up the same terms in another order.

A CPU's vector width, its fused multiply-add, the number of rows and that of threads decide in which
order libraries add up. None of it may decide whether a test passes.
"""

from __future__ import annotations

import math

import torch

#: The largest of a million roundings is 5 standard deviations out; the rest is for terms larger
#: than what they add up to.
SAFETY = 8


def rounding(magnitude: float | torch.Tensor, dtype: torch.dtype, *lengths: int) -> dict:
    """``rtol`` and ``atol`` of a value computed twice, each time through sums of these lengths.

    A sum of n terms takes n roundings of up to eps / 2 of its size. Unlike orders round
    independently of each other, so that all roundings on the way add up as a random walk does: to
    eps √n, n being the number of terms of all sums.

    Args:
        magnitude: size of the values, or a tensor of them, of which the largest counts.
        dtype: of the arithmetic.
        lengths: numbers of terms of the sums, in the order of the computation.
    """
    if isinstance(magnitude, torch.Tensor):
        magnitude = float(magnitude.detach().abs().max())
    walk = torch.finfo(dtype).eps * math.sqrt(sum(lengths))
    return {"rtol": 0.0, "atol": SAFETY * walk * magnitude}
