"""Print the lowest versions that pyproject.toml allows, for `make test-lowest` to install."""

from __future__ import annotations

import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
EXTRAS = ("data", "plots", "demo", "test")


def floors() -> list[str]:
    """``NAME==VERSION`` of every requirement; torch is the Makefile's."""
    listed = [*PROJECT["dependencies"]]
    for extra in EXTRAS:
        listed += PROJECT["optional-dependencies"][extra]
    return [
        wanted.replace(">=", "==")
        for wanted in listed
        if not wanted.startswith(("torch", PROJECT["name"]))
    ]


if __name__ == "__main__":
    print(*floors())
