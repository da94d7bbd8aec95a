"""FSDP1 on a CPU, with its mixed precision untouched.

FSDP1 runs there but for two things: torch never chooses the CPU as its device by itself, and its
streams have no counterpart. So the device is named, and the streams do nothing.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch.distributed.fsdp import FullyShardedDataParallel


class _Inert:
    """A stream or an event of a device that runs everything in order."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record_event(self, *_: Any) -> _Inert:
        """An event that has already happened."""
        return self

    def query(self) -> bool:
        """Whether it has happened."""
        return True

    def _nothing(self, *_: Any) -> None: ...

    record = synchronize = wait = wait_event = wait_stream = _nothing


def install() -> None:
    """Let FSDP1 wrap modules on a CPU, for the rest of this process."""
    torch.cpu.Stream = torch.cpu.Event = _Inert
    torch.cpu.current_stream = _Inert
    torch.cpu.stream = lambda _: contextlib.nullcontext()
    torch.cpu.set_device = lambda *_: None
    torch.Tensor.record_stream = lambda *_: None
    wrap = FullyShardedDataParallel.__init__
    if not isinstance(wrap, functools.partialmethod):
        FullyShardedDataParallel.__init__ = functools.partialmethod(
            wrap, device_id=torch.device("cpu")
        )
