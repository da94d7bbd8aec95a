"""Commands in forks of a process that has imported their libraries: seconds of each are saved.

Such a command has a process, an environment, an output and an exit of its own, as one that starts
from nothing has; what it shares is the memory that its imports have filled.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


class Forks:
    """A process that imports modules once and then runs functions, each in a fork of itself.

    Args:
        modules: what it imports. None may start a thread: a fork has only the one that forks.
        env: its environment, for what is read when an interpreter starts or a module is imported.
    """

    def __init__(self, modules: tuple[str, ...], env: Mapping[str, str]) -> None:
        self._modules, self._env = modules, dict(env)
        self._open()

    def _open(self) -> None:
        self._channel, other = socket.socketpair()
        with other:
            self._server = subprocess.Popen(
                [sys.executable, __file__, str(other.fileno()), *self._modules],
                env=self._env,
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._replies = self._channel.makefile("r")

    def run(
        self,
        function: str,
        arguments: list[str],
        output: Path,
        env: Mapping[str, str],
        *,
        path: tuple[str, ...] = (),
        cwd: Path | None = None,
        ranks: int = 1,
        timeout: float = 600,
    ) -> int:
        """Run ``module:function`` as a console script does; return its exit code.

        Several ranks run it in a fork each; their code is the first that is not 0.

        Args:
            function: takes no arguments; what it returns is the argument of `sys.exit`.
            arguments: `sys.argv`, program included.
            output: the file that standard output and error go to.
            env: the environment.
            path: what comes first in `sys.path`.
            cwd: the directory that it runs in.
            ranks: how many run it; each but a single one finds its number in RANK and LOCAL_RANK.
            timeout: seconds after which it is killed.

        Raises:
            subprocess.TimeoutExpired: it was.
        """
        request = {
            "function": function,
            "arguments": arguments,
            "output": str(output),
            "env": dict(env),
            "path": path,
            "cwd": str(cwd or Path.cwd()),
            "ranks": ranks,
        }
        output.write_bytes(b"")
        self._channel.settimeout(None)
        self._channel.sendall(json.dumps(request).encode() + b"\n")
        children = self._reply()
        self._channel.settimeout(timeout)
        try:
            return next(filter(None, self._reply()), 0)
        except TimeoutError:
            for child in children:
                with suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
            # What it still replies about this request is not the next one's.
            self.close()
            self._open()
            raise subprocess.TimeoutExpired(arguments, timeout) from None

    def _reply(self) -> list[int]:
        line = self._replies.readline()
        assert line, f"the process that imports ended with {self._server.wait()}"
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._replies.close()
        self._channel.close()
        self._server.wait()


def _serve(channel: socket.socket, modules: list[str]) -> dict | None:
    """Fork for every rank of every request; return it in the fork, and None in the end."""
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # a fork that looks for garbage would copy all pages
    for line in channel.makefile("r"):
        request, children = json.loads(line), []
        for rank in range(request["ranks"]):
            child = os.fork()
            if not child:
                if request["ranks"] > 1:
                    request["env"] |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                return request
            children.append(child)
        channel.sendall(json.dumps(children).encode() + b"\n")
        channel.sendall(json.dumps(_ended(children)).encode() + b"\n")
    return None


def _ended(children: list[int]) -> list[int]:
    """Exit codes in the order of their end; where one fails, the others are killed."""
    running, codes = set(children), []
    while running:
        child, status = os.wait()
        running.remove(child)
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1]:
            for other in running:
                os.kill(other, signal.SIGKILL)
    return codes


def _become(request: dict) -> None:
    """Take over what a process is started with."""
    os.setsid()
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[:0] = request["path"]
    sys.argv = request["arguments"]


if __name__ == "__main__":
    del sys.path[0]  # the directory of this file
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        wanted = _serve(requests, sys.argv[2:])
    if wanted is not None:
        _become(wanted)
        module, _, name = wanted["function"].partition(":")
        # Returned to the interpreter, which ends as it always does.
        sys.exit(getattr(importlib.import_module(module), name)())
