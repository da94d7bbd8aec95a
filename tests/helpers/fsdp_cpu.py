"""FSDP1 on a CPU, with its mixed precision untouched.

FSDP1 runs there but for three things: torch never chooses the CPU as its device by itself, its
streams have no counterpart, and what it frees after moving whole parameters to the CPU is what it
moved. So the device is named, the streams do nothing, and whole parameters stay where they are.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel


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
        configure = FullStateDictConfig.__init__

        def stay(self: FullStateDictConfig, offload_to_cpu: bool = False, **options: Any) -> None:
            configure(self, offload_to_cpu=False, **options)

        FullStateDictConfig.__init__ = stay
