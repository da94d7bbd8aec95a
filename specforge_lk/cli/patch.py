"""``specforge-lk patch``: apply a patch series to SpecForge or SGLang, inspect it, take it back."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from specforge_lk import patching
from specforge_lk.cli import shell
from specforge_lk.cli.shell import example, say

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help=(
        "Patch SpecForge, or with --package another: the installed one, or with --target a "
        "checkout or an unpacked wheel.\n\n"
        "Exit codes: 0: done, or nothing to do. 1: refused and nothing was written (a patch does "
        "not apply, or somebody else edited the files), or a write failed (run apply again). "
        "2: no package of a known version, a bad patch series, or no git."
    ),
)
# The members are the packages of the registry.
PackageName = enum.StrEnum("PackageName", list(patching.PACKAGES))  # type: ignore[misc]
DEFAULT = PackageName(patching.SPECFORGE.name)
PackageOption = Annotated[
    PackageName,
    typer.Option(
        "--package",
        help="What to patch: specforge, to train; sglang, to serve drafts with a truncated "
        "vocabulary by rejection sampling.",
    ),
]
TargetOption = Annotated[
    Path | None,
    typer.Option(
        "--target",
        help="Directory that contains the package, or its checkout. Default: the installed one.",
        show_default=False,
    ),
]
TestsOption = Annotated[
    bool | None,
    typer.Option(
        "--tests/--no-tests",
        help="Also the hunks outside the package, which are its own tests and documents. "
        "Default: only in a checkout that has its tests.",
        show_default=False,
    ),
]


@app.command("status", epilog=example("specforge-lk patch status --json"))
def show_status(
    package: PackageOption = DEFAULT,
    target: TargetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the version and the state of the installation, and the patches of the series.

    The state is pristine, applied, partially applied (an apply or revert was interrupted: apply
    finishes it, revert takes it back) or foreign edits. Exit code 0 whatever the state.
    """
    with _errors():
        found, series = _find(package, target)
        status = patching.status(found, series)
    if as_json:
        report = {
            "package": package,
            "target": str(found.root),
            "version": found.version,
            "state": status.state.value,
            "current": status.current,
            "problem": status.problem,
            "patches": [
                {"name": patch.name, "subject": patch.subject, "sha256": patch.sha256}
                for patch in series.patches
            ],
        }
        typer.echo(json.dumps(report, indent=2))
        return
    older = status.state is patching.State.APPLIED and not status.current
    say(f"{found.package.title} {found.version} in {found.root}")
    say(f"state: {status.state}{', but of another series: apply replaces it' if older else ''}")
    if status.problem:
        say(status.problem, "red")
    table = Table("patch", "subject")
    for patch in series.patches:
        table.add_row(Text(patch.name), Text(patch.subject))
    Console().print(table)


@app.command("check", epilog=example("specforge-lk patch check --target SpecForge/"))
def check(
    package: PackageOption = DEFAULT, target: TargetOption = None, tests: TestsOption = None
) -> None:
    """Try the whole series on a copy and name each patch OK or failed. Writes nothing.

    Of a patched installation, the copy has the original files. Exit code 1 if the series does not
    apply.
    """
    with _errors():
        found, series = _find(package, target)
        dry = patching.plan(found, series, tests=tests)
        for name in dry.passed:
            say(f"OK      {name}")
        if isinstance(dry.failure, patching.PatchFailedError):
            say(f"failed  {dry.failure.patch}", "red")
        if dry.failure:
            raise dry.failure


@app.command("apply", epilog=example("specforge-lk patch apply --package sglang"))
def apply(
    package: PackageOption = DEFAULT, target: TargetOption = None, tests: TestsOption = None
) -> None:
    """Apply the whole series, or nothing.

    Applying again does nothing. An older series in the installation is reverted first, and so is
    what an interrupted apply left.
    """
    with _errors():
        found, series = _find(package, target)
        done = patching.apply(found, series, tests=tests)
    if done.unchanged:
        say(f"already applied: {_count(series)}, nothing to do")
        return
    if done.replaced:
        say(f"reverted {done.replaced} first")
    say(
        f"applied {_count(series)} to {found.package.title} {found.version} in {found.root}: "
        f"{len(done.files)} files changed"
    )


@app.command("revert", epilog=example("specforge-lk patch revert"))
def revert(
    package: PackageOption = DEFAULT,
    target: TargetOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Discard edits made to patched files after apply.")
    ] = False,
) -> None:
    """Restore every file byte for byte and remove the files that the series added."""
    with _errors():
        found = patching.find_installation(patching.PACKAGES[package], target)
        leftovers = found.state_dir.exists()
        files = patching.revert(found, force=force)
    if files:
        say(f"reverted {len(files)} files in {found.root}")
    elif leftovers:
        say(f"no file was changed; removed {found.state_dir}, left by an interrupted command")
    else:
        say(f"nothing is applied in {found.root}, nothing to do")


def _find(package: str, path: Path | None) -> tuple[patching.Installation, patching.Series]:
    found = patching.find_installation(patching.PACKAGES[package], path)
    return found, patching.load_series(found.package, found.version)


def _count(series: patching.Series) -> str:
    return "1 patch" if len(series.patches) == 1 else f"{len(series.patches)} patches"


@contextmanager
def _errors() -> Iterator[None]:
    """End the command where patching raises, with the exit codes that its help promises."""
    with shell.errors(codes={patching.RefusedError: 1, patching.PatchError: 2}):
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{error}; the installation must be writable. If files were half written, run "
                "apply again"
            ) from error
