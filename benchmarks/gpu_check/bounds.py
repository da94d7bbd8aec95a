"""What float32 can do: the bounds of errors, and the words of a report."""

from __future__ import annotations

from typing import Final

import torch

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
#: Error of a chain of operations over the size of their numbers: eight roundings of half an eps.
FLOAT32: Final = 4 * torch.finfo(F32).eps


def size(*tensors: torch.Tensor) -> float:
    """Return the size of the largest finite number."""
    return max(float(t.detach().nan_to_num(0, 0, 0).abs().max()) for t in tensors)


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    """Return the names of dtypes, as reports have them."""
    return " / ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
