"""Released wheels, unpatched and unpacked: what tools and benchmarks compare this project with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

from specforge_lk.files import atomic_write
from specforge_lk.patching import SUPPORTED

#: Where unpacked wheels are kept, from the root of the repository.
WHEELS: Final = Path("runs/benchmarks")
#: The release of SpecForge that the patch series is for.
SPECFORGE: Final = f"specforge=={SUPPORTED['specforge']}"


def wheel(requirement: str) -> Path:
    """Return the directory of an unpacked wheel of PyPI, without its dependencies.

    Args:
        requirement: name and version, such as ``torch==2.13.0``; downloaded once.

    Raises:
        subprocess.CalledProcessError: pip could not install it; its own message is on stderr.
    """
    directory = WHEELS / requirement.replace("==", "-")
    if not directory.exists():
        with atomic_write(directory) as temporary:
            subprocess.run(
                [
                    *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"),
                    *("--disable-pip-version-check", "--target", str(temporary), requirement),
                ],
                check=True,
            )
    return directory
