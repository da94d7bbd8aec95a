"""``make upstream-tests``: SpecForge's own tests before and after the patch series.

The tests are in SpecForge's repository, not in its wheel. So the trees compared are a checkout
with its ``specforge/`` replaced by that of the released wheel, and the same tree with the series
applied, tests included. Every directory of tests runs in a process of its own, first in one tree,
then in the other; an interrupted run continues. The machine may lack GPUs, SGLang and a network:
what counts is which outcomes differ.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

import typer
from rich.console import Console

from specforge_lk import patching
from specforge_lk.files import write_text
from specforge_lk.markdown import markdown_table
from specforge_lk.patching import (
    PatchFailedError,
    Series,
    git_apply,
    load_series,
    series_root,
)
from tools.cover_letter import number, with_needs
from tools.wheels import SPECFORGE, wheel

ROOT = Path(__file__).parent.parent
WORK = Path("runs/upstream-tests")
SERIES = load_series(patching.SPECFORGE)
#: Seconds that one test, and one file of tests, may take.
TEST_LIMIT, FILE_LIMIT = 120, 900
#: No plug-ins, for the tests pin the built-in names; nothing is downloaded, nothing compiled.
ENVIRONMENT = {
    "SPECFORGE_PLUGINS": "",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
}
#: The outcomes of a test, worst last; a file that does not import, crashes or hangs is one error.
OUTCOMES = ("passed", "skipped", "failed", "error")
ABSENT = "absent"
#: Outcomes by what a test case holds in a JUnit report.
JUNIT = {"error": "error", "failure": "failed", "skipped": "skipped"}

#: Outcome by test, ``tests/…/test_x.py::Class::test``.
Outcomes = dict[str, str]

console = Console(highlight=False, soft_wrap=True)


def main(
    repository: Annotated[
        Path,
        typer.Option(
            "--repository",
            envvar="SPECFORGE_REPO",
            help="A git checkout, or bare clone, of github.com/sgl-project/SpecForge.",
        ),
    ],
    commit: Annotated[str, typer.Option(help="The commit whose tests run.")] = "HEAD",
    publish: Annotated[
        Path | None, typer.Option(help="Also write the report here: a .json, with .md beside it.")
    ] = None,
) -> None:
    """Run SpecForge's tests with and without the series; exit 1 if a test got worse unexplained."""
    if not repository.is_dir():
        raise typer.BadParameter(
            f"{repository} is no directory: `git clone https://github.com/sgl-project/SpecForge` "
            "and set SPECFORGE_REPO to the clone",
            param_hint="--repository",
        )
    repository, publish = repository.resolve(), publish and publish.resolve()
    os.chdir(ROOT)
    trees = {"before": _tree(repository, commit, None), "after": _tree(repository, commit, SERIES)}
    outcomes = {when: Outcomes() for when in trees}
    for directory in sorted({path for tree in trees.values() for path in _directories(tree)}):
        for when, tree in trees.items():
            found = outcomes_in(tree, directory)
            outcomes[when] |= found
            counts = Counter(found.values())
            console.print(f"{directory}: {when} {_counted(counts)}", markup=False)

    # Tests with deadlines fail on a busy machine: what differs unexplained, to the better or the
    # worse, has a second run in both trees, and its better outcome counts in both.
    differing = compare(outcomes)["changed"].keys() - explanations().keys()
    again = sorted({test.partition("::")[0] for test in differing})
    for file in again:
        for when, tree in trees.items():
            if (tree / file).is_file():
                outcomes[when] |= _keep(tree, [file])[file]
    report = {
        "run twice": again,
        "commit": _git(repository, "show", "--no-patch", "--format=%H of %cs", commit),
        "plain": _plain(repository, commit),
        **compare(outcomes),
    }
    _write(WORK / "report.json", report)
    if publish is not None:
        _write(publish, report)
        write_text(publish.with_suffix(".md"), _markdown(report))
    console.print(_markdown(report), markup=False)
    raise typer.Exit(code=1 if report["unexplained"] else 0)


def _tree(repository: Path, commit: str, series: Series | None) -> Path:
    """Return the checkout with the wheel's package, patched by ``series``.

    It is named by its content and by the environment, as its kept outcomes are.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK) as scratch:
        root = _checkout(repository, commit, Path(scratch))
        shutil.rmtree(root / "specforge")
        shutil.copytree(
            wheel(SPECFORGE) / "specforge",
            root / "specforge",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        for patch in series.patches if series else ():
            git_apply(root, patch)
        # Outcomes are kept by tree: those of another environment are not this one's.
        digest = hashlib.sha256(json.dumps(_environment()).encode())
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        named = WORK / digest.hexdigest()[:16]
        if not named.exists():
            root.rename(named)
    return named.resolve()


def _checkout(repository: Path, commit: str, directory: Path) -> Path:
    root, archive = directory / "tree", directory / "checkout.tar"
    _git(repository, "archive", f"--output={archive.resolve()}", commit)
    with tarfile.open(archive) as tar:
        tar.extractall(root, filter="data")
    return root


def _plain(repository: Path, commit: str) -> dict[str, Any]:
    """Say how the series fares on the commit's own package, which is not quite the wheel's."""
    with tempfile.TemporaryDirectory() as scratch:
        root = _checkout(repository, commit, Path(scratch))
        released = wheel(SPECFORGE)
        sources = {
            path.relative_to(tree).as_posix()
            for tree in (root, released)
            for path in (tree / "specforge").rglob("*.py")
        }
        unlike = [
            path for path in sorted(sources) if _bytes(root / path) != _bytes(released / path)
        ]
        touched = {path for patch in SERIES.patches for path in patch.changes}
        conflicts = {}
        for patch in SERIES.patches:
            refused = {number(other) for other in SERIES.patches if other.name in conflicts}
            if needed := sorted(refused & with_needs({number(patch)})):
                conflicts[patch.name] = f"needs {', '.join(needed)}"
                continue
            try:
                git_apply(root, patch)
            except PatchFailedError as failure:
                conflicts[patch.name] = failure.reason
    return {
        "unlike the wheel": unlike,
        "of these patched": sorted(touched.intersection(unlike)),
        "conflicts": conflicts,
    }


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _git(repository: Path, *arguments: str) -> str:
    run = subprocess.run(["git", "-C", repository, *arguments], capture_output=True, text=True)
    if run.returncode:
        raise typer.BadParameter(f"{repository}: {run.stderr.strip()}", param_hint="--repository")
    return run.stdout.strip()


def _directories(tree: Path) -> set[str]:
    return {
        path.parent.relative_to(tree).as_posix() for path in (tree / "tests").rglob("test_*.py")
    }


def outcomes_in(tree: Path, directory: str) -> Outcomes:
    """Return outcomes of the test files in one directory, not below it; each file runs once."""
    files = [path.relative_to(tree).as_posix() for path in (tree / directory).glob("test_*.py")]
    kept = {file: _kept(tree, file) for file in sorted(files)}
    _keep(tree, [file for file, path in kept.items() if not path.is_file()])
    return {
        test: how for path in kept.values() for test, how in json.loads(path.read_text()).items()
    }


def _keep(tree: Path, files: Sequence[str]) -> dict[str, Outcomes]:
    """Run files of tests and keep their outcomes, the better one of tests that ran before."""
    found = _run(tree, files) if files else {}
    if found is None:
        # Something crashed or hung: by themselves, the others are not taken along.
        found = {file: (_run(tree, [file]) or {file: {file: "error"}})[file] for file in files}
    for file, outcomes in found.items():
        kept = _kept(tree, file)
        kept.parent.mkdir(exist_ok=True)
        earlier = json.loads(kept.read_text()) if kept.is_file() else {}
        for test in outcomes.keys() & earlier.keys():
            outcomes[test] = min(outcomes[test], earlier[test], key=OUTCOMES.index)
        _write(kept, outcomes)
    return found


def _kept(tree: Path, file: str) -> Path:
    return tree.with_name(f"{tree.name}.outcomes") / f"{file.replace('/', '.')}.json"


def _run(tree: Path, files: Sequence[str]) -> dict[str, Outcomes] | None:
    """Return outcomes by file from one process, or None if it did not come to its end."""
    # The tree comes first, so that it shadows an installed SpecForge.
    path = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as scratch:
        xml = Path(scratch) / "junit.xml"
        options = [f"--junitxml={xml}", f"--timeout={TEST_LIMIT}", f"--rootdir={tree}"]
        quiet = ["-p", "no:cacheprovider", "-p", "no:xdist", "--continue-on-collection-errors"]
        with subprocess.Popen(
            [sys.executable, "-m", "pytest", *quiet, *options, *files],
            cwd=tree,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path, "TMPDIR": scratch},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # A group of its own: what a test leaves behind ends with it.
            start_new_session=True,
        ) as process:
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(FILE_LIMIT * len(files))
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        return _read(xml, files) if xml.is_file() else None


def _read(xml: Path, files: Sequence[str]) -> dict[str, Outcomes]:
    """Return outcomes by file from pytest's JUnit report; the worst of a test's several."""
    modules = {file.removesuffix(".py").replace("/", "."): file for file in files}
    outcomes: dict[str, Outcomes] = {file: {} for file in files}
    for case in ElementTree.parse(xml).iter("testcase"):
        where, name = case.get("classname", ""), case.get("name", "")
        # A file that cannot be imported has no class and is named like its module.
        module = next(m for m in modules if f"{where or name}.".startswith(f"{m}."))
        file = modules[module]
        names = (file, where.removeprefix(module).strip("."), name) if where else (file,)
        test = "::".join(filter(None, names))
        results = [JUNIT[child.tag] for child in case if child.tag in JUNIT]
        outcomes[file][test] = max(
            [outcomes[file].get(test, "passed"), *results], key=OUTCOMES.index
        )
    return outcomes


def explanations() -> dict[str, str]:
    """Return why a test is meant to change, by test, from ``changed-upstream-tests.txt``."""
    path = series_root() / "specforge" / SERIES.version / "changed-upstream-tests.txt"
    lines = (line for line in path.read_text().splitlines() if line and not line.startswith("#"))
    rows = (line.split(" | ") for line in lines)
    return {test: f"{patch}: {why}" for test, patch, why in rows}


def compare(outcomes: Mapping[str, Outcomes]) -> dict[str, Any]:
    """Return the report's part on what differs between ``before`` and ``after``."""
    before, after = outcomes["before"], outcomes["after"]
    changed = {
        test: [outcome, after.get(test, ABSENT)]
        for test, outcome in sorted(before.items())
        if outcome != after.get(test)
    }
    added = {test: outcome for test, outcome in sorted(after.items()) if test not in before}
    listed = explanations()
    worse = [test for test, (old, new) in changed.items() if _rank(new) > _rank(old)]
    worse += [test for test, outcome in added.items() if outcome in ("failed", "error")]
    return {
        "specforge": SPECFORGE,
        "patches": [patch.name for patch in SERIES.patches],
        "environment": _environment(),
        "counts": {
            when: {outcome: list(found.values()).count(outcome) for outcome in OUTCOMES}
            for when, found in outcomes.items()
        },
        "changed": changed,
        "added": {name: list(added.values()).count(name) for name in OUTCOMES},
        "explained": {test: listed[test] for test in worse if test in listed},
        "unexplained": [test for test in worse if test not in listed],
        "failing in both": {
            test: outcome
            for test, outcome in sorted(after.items())
            if outcome in ("failed", "error") and before.get(test) == outcome
        },
    }


def _environment() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "triton", "sglang")},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _rank(outcome: str) -> int:
    """Return the rank of an outcome; a test that is gone is worse than any."""
    return (*OUTCOMES, ABSENT).index(outcome)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts[name]} {name}" for name in OUTCOMES if counts.get(name)) or "none"


def _markdown(report: dict[str, Any]) -> str:
    environment = ", ".join(f"{key} {value}" for key, value in report["environment"].items())
    added = {"of these, tests that the series adds": report["added"]}
    outcomes = [
        (title, *(str(counts[name]) for name in OUTCOMES))
        for title, counts in (report["counts"] | added).items()
    ]
    changed = [
        (f"`{test}`", before, after, report["explained"].get(test, ""))
        for test, (before, after) in report["changed"].items()
    ]
    lines = [
        "# SpecForge's own tests before and after the series",
        "",
        f"Written by `make upstream-tests`. Tests of SpecForge's repository at {report['commit']}, "
        f"package of {report['specforge']}; {environment}; no GPU, no network. A file that "
        "does not import, crashes or hangs is one error.",
        "",
        markdown_table(("", *OUTCOMES), outcomes, tight=True),
        "",
        "## Tests whose outcome changes",
        "",
        markdown_table(("test", "before", "after", "why"), changed, tight=True),
    ]
    if report["run twice"]:
        files = ", ".join(f"`{file}`" for file in report["run twice"])
        lines += [
            "",
            f"Differed without an explanation, so run twice in both trees: {files}. The "
            "better outcome counts.",
        ]
    lines += ["", "Worse without an explanation in `changed-upstream-tests.txt`: "]
    lines[-1] += ", ".join(f"`{test}`" for test in report["unexplained"]) or "none."
    plain = report["plain"]
    lines += [
        "",
        "## On the commit's own package",
        "",
        f"{len(plain['unlike the wheel'])} source files differ from the wheel's; the series "
        f"changes {len(plain['of these patched'])} of them: "
        f"{', '.join(f'`{path}`' for path in plain['of these patched'])}. "
        f"{len(report['patches']) - len(plain['conflicts'])} of {len(report['patches'])} patches "
        "apply in order, without fuzz or three-way merge.",
        *(f"- {patch}: {reason}" for patch, reason in plain["conflicts"].items()),
        "",
        "## Tests that fail before and after",
        "",
    ]
    lines += [f"- `{test}`: {outcome}" for test, outcome in report["failing in both"].items()]
    return "\n".join(lines) + "\n"


def _write(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    typer.run(main)
