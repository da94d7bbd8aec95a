"""What all commands share: how an expected error ends one, as one line.

`specforge_lk.cli.options` has the options that several have.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from types import MappingProxyType
from typing import NoReturn

import typer
from rich.console import Console
from rich.text import Text

from specforge_lk.files import DiskFull

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
_EXPECTED = (OSError, ValueError, FloatingPointError, UnpicklingError, EOFError)
#: Errors of the operating system -> what is wrong with a path, and what to do.
_PATHS = {
    errno.ENOENT: "does not exist; check the path",
    errno.EISDIR: "is a folder, where a file is meant; name a file",
    errno.ENOTDIR: "is a file, where a folder is meant; name another path",
    errno.EEXIST: "is a file, where a folder is meant; name another path",
    errno.EACCES: "may not be read or written here; change its permissions, or name another path",
    errno.EPERM: "may not be read or written here; change its permissions, or name another path",
    errno.EROFS: "is on a disk that cannot be written to; name another path",
    errno.ENAMETOOLONG: "is too long a name; give a shorter one",
}


def example(commands: str) -> str:
    """Return the end of a command's ``--help``: examples of its use, one a line."""
    return "\n\n".join(["Example:", *commands.splitlines()])


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
        made = torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device {name} cannot be used here ({reason}); give cpu, or auto"
        ) from error
    if made.is_meta:
        raise ValueError(f"--device {name} computes nothing; give cpu, or auto")
    return name


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
        message = f"out of memory: {memory}" if isinstance(error, late[0]) else one_line(error)
        fail(message, error, code)


def one_line(error: Exception) -> str:
    """Return an expected error as one line: file or field, what is wrong, and what to do."""
    if isinstance(error, OSError) and error.filename and not isinstance(error, DiskFull):
        path = Path(os.fsdecode(error.filename2 or error.filename))
        if error.errno in (errno.ENOTDIR, errno.EEXIST):  # perhaps a folder above it is none
            path = next((p for p in (*reversed(path.parents), path) if p.is_file()), path)
        return f"{path} {_PATHS.get(error.errno or 0, f'cannot be used: {error.strerror}')}"
    lines = (line.strip() for line in str(error).splitlines())
    return " ".join(filter(None, lines)) or type(error).__name__


def check_out(path: Path, *, folder: bool = False) -> None:
    """Refuse a path that could not be written, before the hours that make what goes there.

    Args:
        path: what a command will write.
        folder: whether that is a folder, not a file.

    Raises:
        OSError: a file or a folder is in the way, or may not be written to.
    """

    def refuse(code: int, place: Path) -> OSError:
        return OSError(code, os.strerror(code), str(place))

    if not folder and path.is_dir():
        raise refuse(errno.EISDIR, path)
    place = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not place.is_dir() and (folder or place != path):
        raise refuse(errno.ENOTDIR, place)
    home = place if place.is_dir() else place.absolute().parent
    if not os.access(home, os.W_OK | os.X_OK):
        raise refuse(errno.EACCES, home)


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
    "check_out",
    "errors",
    "example",
    "fail",
    "find_device",
    "missing",
    "name_left_out",
    "one_line",
    "say",
]
