"""A tiny package and patches made for it, so that patch handling is tested in milliseconds."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
from pathlib import Path

VERSION = "0.2.0"
FILES = {
    "specforge/__init__.py": "version = '0.2.0'\n",
    "specforge/loss.py": "".join(f"line{i} = {i}\n" for i in range(12)),
    "specforge/core/teacher.py": "teacher = 1\nstudent = 2\n",
    "specforge/old.py": "old = True\n",
}


def write_tree(root: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def write_wheel(
    root: Path,
    name: str = "specforge",
    version: str = VERSION,
    files: dict[str, str] = FILES,
) -> Path:
    """An installed wheel: the package, METADATA and a RECORD with true hashes."""
    write_tree(root, files)
    info = f"{name}-{version}.dist-info"
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
        record += f"{path},sha256={digest.rstrip(b'=').decode()},{len(text)}\n"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    write_tree(
        root, {f"{info}/METADATA": metadata, f"{info}/RECORD": record + f"{info}/RECORD,,\n"}
    )
    return root


def write_checkout(root: Path) -> Path:
    """A checkout: pyproject.toml with a dynamic version, as SpecForge has it, and tests/."""
    pyproject = (
        '[project]\nname = "specforge"\ndynamic = ["version"]\n'
        '[tool.setuptools.dynamic]\nversion = {file = "version.txt"}\n'
    )
    extra = {"pyproject.toml": pyproject, "version.txt": f"{VERSION}\n", "tests/__init__.py": ""}
    write_tree(root, FILES | extra)
    return root


def write_series(
    folder: Path,
    work: Path,
    steps: list[tuple[str, dict[str, str | None]]],
    base: dict[str, str] = FILES,
) -> None:
    """Commit each step (subject, path -> text, None deletes) on base and format the commits."""

    def git(*args: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *args], cwd=work, check=True, capture_output=True)

    write_tree(work, base)
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "base")
    for subject, files in steps:
        for path in [path for path, text in files.items() if text is None]:
            (work / path).unlink()
        write_tree(work, {path: text for path, text in files.items() if text is not None})
        git("add", "-A")
        git("commit", "-qm", f"{subject}\n\nWhy: a test.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    git("format-patch", "-q", "--no-renames", f"HEAD~{len(steps)}", "-o", str(folder))
    names = sorted(path.name for path in folder.glob("*.patch"))
    (folder / "series").write_text("# in order\n" + "".join(f"{name}\n" for name in names))


def tree_hashes(root: Path) -> dict[str, str]:
    """sha256 of every file, byte code included: the tree as the file system has it."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
