"""What drafts need beyond torch's modules: a typed list, and a cast that keeps buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import nn

_Part = TypeVar("_Part", bound=nn.Module)
_WIDTH = 4  # bytes of a float32


class Stack(nn.ModuleList, Generic[_Part]):
    """An ``nn.ModuleList`` of modules of one type, for type checkers."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[_Part]: ...


@contextmanager
def float32_buffers_kept(module: nn.Module) -> Iterator[None]:
    """Keep the float32 buffers of ``module`` in float32 through a cast inside this block.

    They move to another device with the rest. Rounded to bfloat16, rotary frequencies would stand
    for other positions, and the biases of a router would choose other experts, than in engines.
    """
    before = {
        name: buffer for name, buffer in module.named_buffers() if buffer.dtype.itemsize == _WIDTH
    }
    yield
    for name, buffer in before.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        cast = owner.get_buffer(leaf)
        if cast.dtype.itemsize < _WIDTH:
            setattr(owner, leaf, buffer.to(cast.device))
