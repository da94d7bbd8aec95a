"""docs/extending.md: the commands that move the series to another release."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
FLAGS = ("-q", "-n", "--zero-commit", "--no-signature", "--no-renames", "--abbrev=7")
IDENTITY = {
    f"GIT_{who}_{what}": "test@localhost"
    for who in ("AUTHOR", "COMMITTER")
    for what in ("NAME", "EMAIL")
}


def test_the_documented_commands_move_a_series_to_the_next_release(tmp_path: Path) -> None:
    clone, old, new = tmp_path / "clone", tmp_path / "old", tmp_path / "new"
    clone.mkdir()
    env = os.environ | IDENTITY | {"GIT_CONFIG_GLOBAL": os.devnull}

    def git(*arguments: object) -> str:
        command = ["git", *map(str, arguments)]
        return subprocess.run(
            command, cwd=clone, env=env, check=True, capture_output=True, text=True
        ).stdout

    def commit(message: str, **files: str) -> None:
        for name, text in files.items():
            (clone / name).write_text(text)
        git("add", "-A")
        git("commit", "-q", "-m", message)

    git("init", "-q")
    commit("0.2.0", losses="kl\n\n\n\n", trainer="step\n")
    git("tag", "v2")
    commit("a loss", losses="kl\n\n\n\nlk\n")
    commit("a fix", trainer="step, mended\n")
    git("format-patch", *FLAGS, "-o", old, "v2..HEAD")
    names = sorted(path.name for path in old.iterdir())
    (old / "series").write_text("\n".join(["# Order.", *names, ""]))
    git("switch", "-q", "--detach", "v2")
    commit("0.3.0", losses="kl, faster\n\n\n\n")
    git("tag", "v3")

    (commands,) = re.findall(r'```sh title="rebase"\n(.*?)```', PAGE.read_text(), re.DOTALL)
    where = {"OLD": "v2", "NEW": "v3", "SERIES": str(old), "OUT": str(new)}
    subprocess.run(["bash", "-euc", commands], cwd=clone, env=env | where, check=True, timeout=60)
    assert [
        line for line in (new / "series").read_text().splitlines() if not line.startswith("#")
    ] == names
    git("switch", "-q", "--detach", "v3")
    git("apply", *(new / name for name in names))
    assert (clone / "losses").read_text() == "kl, faster\n\n\n\nlk\n"
    assert (clone / "trainer").read_text() == "step, mended\n"
