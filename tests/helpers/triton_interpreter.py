"""The Triton kernels of the overlap operation, run on CPU tensors by Triton's interpreter."""

import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any
from unittest import mock

import triton
import triton.language as tl

_REDUCTIONS = {
    "max": lambda x, axis: tl.reduce(x, axis, tl.standard._elementwise_max),
    "sum": lambda x, axis: tl.reduce(x, axis, tl.standard._sum_combine),
}


@cache
def interpreted_triton() -> ModuleType:
    """A second copy of the module, its kernels interpreted.

    Triton decides when it decorates a kernel. Neither the environment, which processes started by
    other tests would inherit, nor the module that programs import is changed, so the order of
    tests does not matter.
    """
    spec = find_spec("specforge_lk.overlap.triton_kernels")
    module = module_from_spec(spec)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    module.forward = _with_reductions(module.forward)
    module.backward = _with_reductions(module.backward)
    return module


def _with_reductions(kernel_pass: Callable[..., Any]) -> Callable[..., Any]:
    """Triton's own jitted functions were decorated when it was imported, perhaps long ago and not
    to be interpreted: replace those that the kernels call, while they run."""

    def run(*arguments: Any, **options: Any) -> Any:
        with mock.patch.multiple(tl, **_REDUCTIONS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's about nan, and about the interpreter itself
            return kernel_pass(*arguments, **options)

    return run
