"""The Triton kernels of the overlap operation, run on CPU tensors by Triton's interpreter."""

import importlib
import sys
import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, ReduceOps

from specforge_lk import overlap

MODULES = ("triton_tiles", "triton_kernels", "triton_target")
_REDUCTIONS = {
    "max": lambda x, axis: tl.reduce(x, axis, tl.standard._elementwise_max),
    "min": lambda x, axis: tl.reduce(x, axis, tl.standard._elementwise_min),
    "sum": lambda x, axis: tl.reduce(x, axis, tl.standard._sum_combine),
}


@cache
def _interpreted() -> dict[str, ModuleType]:
    """Second copies of the modules, their kernels interpreted.

    Triton decides when it decorates a kernel. Neither the environment, which processes started by
    other tests would inherit, nor the modules that programs import are changed, so the order of
    tests does not matter.
    """
    names = [f"{overlap.__name__}.{name}" for name in MODULES]
    found = {}
    with (
        triton.knobs.runtime.scope(),
        mock.patch.dict(sys.modules),
        mock.patch.dict(vars(overlap)),
    ):
        triton.knobs.runtime.interpret = True
        for name in names:
            sys.modules.pop(name, None)
        for short, name in zip(MODULES, names, strict=True):
            found[short] = importlib.import_module(name)
    return found


@cache
def interpreted_triton(module: str = "triton_kernels") -> ModuleType:
    """Return one of the modules; the functions that it launches kernels from are interpreted."""
    found = _interpreted()[module]
    for name in ("forward", "backward", "fill"):
        if hasattr(found, name):
            setattr(found, name, _with_reductions(getattr(found, name)))
    return found


def _with_reductions(kernel_pass: Callable[..., Any]) -> Callable[..., Any]:
    """Triton's own jitted functions were decorated when it was imported, perhaps long ago and not
    to be interpreted: replace those that the kernels call, while they run."""

    def run(*arguments: Any, **options: Any) -> Any:
        with (
            mock.patch.multiple(tl, **_REDUCTIONS),
            mock.patch.object(ReduceOps, "generic_reduce", _reduce_in_halves),
            mock.patch.object(InterpretedFunction, "__call__", _call),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # numpy's about nan, and about the interpreter itself
            return kernel_pass(*arguments, **options)

    return run


def _call(self: InterpretedFunction, *arguments: Any, **options: Any) -> Any:
    """Call a function of the kernel, for which Triton's language is patched already."""
    return self.rewrite()(*arguments, **options)


def _reduce_in_halves(self: ReduceOps, inputs: tuple[tl.tensor, ...]) -> list[tl.tensor]:
    """Join halves of the vectors, as warps do, where the interpreter goes value by value."""
    types = [value.dtype for value in inputs]
    values = [np.asarray(value.handle.data) for value in inputs]
    while (size := values[0].shape[self.axis]) > 1:
        halves = [np.split(v, [size // 2], axis=self.axis) for v in values]
        first, second = (
            [self.to_tensor(half[i], t) for half, t in zip(halves, types, strict=True)]
            for i in (0, 1)
        )
        values = [joined.handle.data for joined in self.combine_fn.fn(*first, *second)]
    return [
        self.to_tensor(np.squeeze(v, self.axis)[()], t) for v, t in zip(values, types, strict=True)
    ]
