"""Start the check of a bundle: ``python3 check.py [PHASE …] [--out DIR] [--dry]``.

`make gpu-bundle` copies this file to the root of the bundle. It needs torch, and Triton on a GPU:
everything else is in the bundle. The wheels are unpacked once, beside the system's other temporary
files, and reports go to ``reports`` in the bundle unless ``--out`` names a folder.
``python3 check.py --help`` lists the phases.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import zipfile
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Put the bundle's packages on the path, and go on as `benchmarks.gpu_check`."""
    wanted = json.loads((HERE / "bundle.json").read_text())["python"]
    found = ".".join(map(str, sys.version_info[:2]))
    if found != wanted:
        sys.exit(
            f"{sys.executable} is Python {found}, and this bundle is for {wanted}: start check.py "
            f'with python{wanted}, or pack one with make gpu-bundle GPU="--python {found}"'
        )
    packages = unpacked()
    os.environ["PATH"] = os.pathsep.join([str(packages / "bin"), os.environ.get("PATH", "")])
    # In this order: the bundle's patched SpecForge, not one that is installed.
    paths = [str(HERE), str(HERE / "site"), str(packages), os.environ.get("PYTHONPATH", "")]
    if find_spec("datasets") is None:
        paths.insert(0, str(HERE / "stand-in"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    # Folders are named from where the command is given; the experiments run in the bundle's.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=HERE / "reports")
    parser.add_argument("--model", type=Path)
    folders, words = parser.parse_known_args()
    words.append(f"--out={folders.out.resolve()}")
    if folders.model is not None:
        words.append(f"--model={folders.model.resolve()}")
    os.chdir(HERE)
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu_check", *words])


def unpacked() -> Path:
    """Return the folder of the wheels' packages, with their commands in ``bin``."""
    wheels = sorted((HERE / "wheels").glob("*.whl"))
    digest = hashlib.sha256("".join(wheel.name for wheel in wheels).encode())
    digest.update((HERE / "bundle.json").read_bytes() + sys.executable.encode())
    folder = Path(tempfile.gettempdir()) / f"specforge-lk-gpu-{digest.hexdigest()[:16]}"
    if folder.exists():
        return folder
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(part)
    (part / "bin").mkdir(exist_ok=True)
    for distribution in distributions(path=[str(part), str(HERE / "site")]):
        for entry in distribution.entry_points.select(group="console_scripts"):
            script = part / "bin" / entry.name
            script.write_text(
                f"#!{sys.executable}\nimport sys\nfrom {entry.module} import {entry.attr}\n"
                f"sys.exit({entry.attr}())\n"
            )
            script.chmod(0o755)
    try:
        part.rename(folder)
    except OSError:  # another process was faster
        if not folder.exists():
            raise
    return folder


if __name__ == "__main__":
    main()
