"""What all commands share: how an expected error ends one, and the options that several have."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pickle import UnpicklingError
from types import MappingProxyType
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from specforge_lk.data.jsonl import MOST_LEFT_OUT

#: Exit code of a command that an expected error ended.
FAILED = 1
#: Rows left out that are named.
_NAMED = 5
#: Expected errors of modules that are slow to import, which an error shows to be imported.
_LATE = (
    ("torch", "OutOfMemoryError"),
    ("specforge.plugins", "PluginError"),
    ("safetensors", "SafetensorError"),
)
_EXPECTED = (OSError, ValueError, FloatingPointError, UnpicklingError)


class Dtype(StrEnum):
    """Floating-point types that a model can be loaded in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def example(commands: str) -> str:
    """Return the end of a command's ``--help``: examples of its use, one a line."""
    return "\n\n".join(["Example:", *commands.splitlines()])


def device_option(panel: str | None = None) -> Any:
    """Return the option ``--device``; its default is ``auto``."""
    text = "Torch device, such as cpu or cuda; auto takes a GPU if there is one."
    return typer.Option("--device", help=text, rich_help_panel=panel)


def chat_template_args_option(panel: str = "Chat template") -> Any:
    """Return the option ``--chat-template-args``; see `parse_chat_template_args`."""
    text = (
        'Further arguments of the chat template as JSON, such as {"enable_thinking": false}. '
        "Engines call them chat_template_kwargs. Give capture, generate and eval the same."
    )
    return typer.Option("--chat-template-args", metavar="JSON", help=text, rich_help_panel=panel)


def parse_chat_template_args(value: str | None) -> dict[str, Any]:
    """Return the arguments of ``--chat-template-args``; none where it is not given."""
    from specforge_lk.data.chat_template import check_arguments

    try:
        found = json.loads(value) if value else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise typer.BadParameter(
            f'--chat-template-args {value!r} is no JSON object such as {{"enable_thinking": false}}'
        )
    try:
        check_arguments(found)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return found


def skip_malformed_option() -> Any:
    """Return the flag ``--skip-malformed``."""
    text = "Leave out rows that cannot be used, and count them; otherwise the first is an error."
    return typer.Option("--skip-malformed", help=text)


def max_left_out_option() -> Any:
    """Return the option ``--max-left-out``; its default is a tenth."""
    text = "Largest share of a file's rows that may be left out; more are an error."
    return typer.Option("--max-left-out", metavar="SHARE", min=0, max=1, help=text)


def name_left_out(left_out: Sequence[str]) -> None:
    """Print what was wrong with the first rows that were left out."""
    for line in left_out[:_NAMED]:
        say(f"left out: {line}", "yellow", stderr=True)
    if len(left_out) > _NAMED:
        say(f"left out: {len(left_out) - _NAMED} more rows", "yellow", stderr=True)


def find_device(name: str) -> str:
    """Return the device that ``--device`` names, which ``auto`` leaves to this function.

    Raises:
        ValueError: the device cannot be used here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here ({reason})") from error
    return name


def parse_layers(value: str | None) -> tuple[int, ...] | None:
    """Return the layers of ``--aux-layers``."""
    try:
        return tuple(int(layer) for layer in value.split(",")) if value else None
    except ValueError:
        raise typer.BadParameter(f"--aux-layers {value!r} is not like 1,14,26") from None


@contextlib.contextmanager
def errors(
    *, memory: str = "", codes: Mapping[type[Exception], int] = MappingProxyType({})
) -> Iterator[None]:
    """End the command with one red line and an exit code where an expected error is raised.

    It decorates a command as well as it encloses a block. Usage errors and unexpected errors pass.

    Args:
        memory: What to do when the memory of a GPU does not suffice, such as ``lower --batch``.
        codes: Exit codes of further expected errors; the first class that fits counts.
    """
    try:
        yield
    except ImportError as error:
        fail(missing(error), error)
    except Exception as error:
        code = next((codes[kind] for kind in codes if isinstance(error, kind)), FAILED)
        late = [getattr(sys.modules.get(module), name, ()) for module, name in _LATE]
        if not isinstance(error, (*codes, *_EXPECTED, *late)):
            raise
        message = f"out of memory: {memory}" if isinstance(error, late[0]) else str(error)
        fail(message, error, code)


def fail(message: str, error: BaseException | None = None, code: int = FAILED) -> NoReturn:
    """Print a message in red and end the command."""
    say(message, "red", stderr=True)
    raise typer.Exit(code) from error


def say(text: str, style: str = "", *, stderr: bool = False) -> None:
    """Print a line, whole where the output is a pipe or a narrow terminal."""
    Console(stderr=stderr).print(Text(text, style), soft_wrap=True)


def missing(error: ImportError) -> str:
    """Return what a failed import means, and which extra of this package to install."""
    cause: BaseException | None = error
    while isinstance(cause, ImportError) and cause.name is None:
        cause = cause.__cause__
    if not isinstance(cause, ImportError) or cause.name is None:
        return str(error)  # raised by this package, with a message of its own
    package = cause.name.partition(".")[0]
    if find_spec(package) is None:
        # What no extra names is a dependency of SpecForge.
        extra = _extras().get(package, "specforge,data")
        return (
            f"{cause}; this command needs {package}: pip install '.[{extra}]' in a clone of "
            "SpecForge-LK"
        )
    if package == "specforge":
        from specforge_lk.patching import SUPPORTED

        return (
            f"{cause}: the installed SpecForge is not patched, or is of another version; install "
            f"specforge=={SUPPORTED['specforge']} and run 'specforge-lk patch apply'"
        )
    return f"{cause}: the installed {package} is of a version that this command does not know"


def _extras() -> dict[str, str]:
    """Return the smallest extra of this package that brings each optional dependency."""
    try:
        requirements = requires("specforge-lk") or []
    except PackageNotFoundError:  # a source tree that is not installed
        return {}
    form = re.compile(r"([\w-]+).*extra\s*==\s*['\"]([\w-]+)['\"]")
    pairs = [(match[1], match[2]) for line in requirements if (match := form.match(line))]
    size = Counter(extra for _, extra in pairs)
    return dict(sorted(pairs, key=lambda pair: -size[pair[1]]))


__all__ = [
    "MOST_LEFT_OUT",
    "Dtype",
    "chat_template_args_option",
    "device_option",
    "errors",
    "example",
    "fail",
    "find_device",
    "max_left_out_option",
    "missing",
    "name_left_out",
    "parse_chat_template_args",
    "parse_layers",
    "say",
    "skip_malformed_option",
]
