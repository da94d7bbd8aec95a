"""Run a test or script of SGLang where only SGLang's own wheel is: ``sglang_stubs.py FILE ARGS``.

SGLang imports serving, grammar and GPU packages that neither the code under test nor its
tests call. A stub takes the place of each that is not installed: any name in it is a class that
can be called, subclassed, subscripted and used as an annotation, and that does nothing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import runpy
import sys
from types import ModuleType

STUBBED = {
    "IPython",
    "aiohttp",
    "compressed_tensors",
    "einops",
    "fastapi",
    "modelscope",
    "openai",
    "orjson",
    "partial_json_parser",
    "pybase64",
    "setproctitle",
    "sgl_kernel",
    "starlette",
    "torchvision",
    "tvm_ffi",
    "uvicorn",
    "xgrammar",
    "zmq",
}


class _Anything(type):
    """Metaclass of the stubs: class keywords are ignored, missing attributes are stubs."""

    def __new__(mcs, name: str, bases: tuple = (), members: dict | None = None, **_) -> type:
        return super().__new__(mcs, name, bases, members or {})

    def __init__(cls, name: str, bases: tuple = (), members: dict | None = None, **_) -> None:
        super().__init__(name, bases, members or {})

    def __getattr__(cls, name: str) -> type:
        return _stub(name)

    def __getitem__(cls, _) -> type:
        return cls

    def __or__(cls, _) -> type:
        return cls

    __ror__ = __or__


def _stub(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)

    def __get_pydantic_core_schema__(cls, *_):
        from pydantic_core import core_schema

        return core_schema.any_schema()

    members = {
        "__init__": lambda self, *_, **__: None,
        "__getattr__": lambda self, name: _stub(name),
        "__call__": lambda self, first=None, *_, **__: first,  # a decorator keeps its function
        "__get_pydantic_core_schema__": classmethod(__get_pydantic_core_schema__),
    }
    return _Anything(name, (), members)


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last finder to be asked: whatever is installed was found before."""

    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in STUBBED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = _stub


if __name__ == "__main__":
    sys.meta_path.append(_Stubs())
    sys.argv.pop(0)
    runpy.run_path(sys.argv[0], run_name="__main__")
