"""The real series on pristine wheels: every patch stands by itself, and all can be taken back."""

from __future__ import annotations

import compileall
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forks import Forks
from patch_helpers import tree_hashes
from series_tree import ALL_SERIES, SERIES, VERSION, apply_until, unpack

from specforge_lk import patching
from specforge_lk.patching import Series
from tools.cover_letter import number, with_needs

pytestmark = pytest.mark.slow

#: SGLang's tests run beside stubs of its dependencies.
STUBS = str(Path(__file__).parents[1] / "helpers" / "sglang_stubs.py")
#: What SpecForge's tests import of others.
LIBRARIES = (
    "torch.distributed.fsdp",
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
    "accelerate.utils",
    "datasets",
    "pydantic",
)
#: Without plug-ins: this project's needs the whole series.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "SPECFORGE_PLUGINS": ""}


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """Processes that have imported what SpecForge needs, and nothing of SpecForge."""
    found = Forks(LIBRARIES, os.environ | ENVIRONMENT)
    yield found
    found.close()


@pytest.fixture
def tree(series: Series, pristine_wheel: Callable[[str], Path], tmp_path: Path) -> Path:
    wheel = pristine_wheel(f"{series.package.name}=={series.version}")
    return unpack(wheel, tmp_path / "tree", series)


@pytest.mark.parametrize(
    ("series", "patch"),
    [
        pytest.param(series, patch, id=f"{series.package.name}-{series.version}-{patch.name}")
        for series in ALL_SERIES
        for patch in series.patches
    ],
)
def test_patch_compiles_and_passes_its_own_tests(tree, series, patch, forks, tmp_path):
    """On top of the patches before it and without those after it."""
    apply_until(tree, series, patch)
    for path in patch.changes:
        if path.endswith(".py") and (tree / path).exists():
            assert compileall.compile_file(tree / path, quiet=1), f"{path} does not byte-compile"

    own = series.package.tests
    changed = [path for path in patch.changes if re.fullmatch(rf"{own}/(.+/)?test_\w+\.py", path)]
    assert changed, f"{patch.name} brings no tests of its own"
    # Packages, as in the package's repository; a patch adds only those that are new there.
    for folder in {parent for path in changed for parent in (tree / path).parents}:
        if folder.is_relative_to(tree / own) and folder.is_dir():
            (folder / "__init__.py").touch()
    tests = [path for path in changed if (tree / path).is_file()]
    if not tests:
        pytest.skip(f"{patch.name} only edits tests that the wheel lacks")
    # The tree comes first, so that it shadows an installed package.
    source = str(tree / series.package.source)
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | ENVIRONMENT | {"PYTHONPATH": path}
    output = tmp_path / "output"
    if series.package.name == "sglang":
        command = [sys.executable, STUBS, *tests]
        with output.open("w") as file:
            streams = {"stdout": file, "stderr": subprocess.STDOUT}
            code = subprocess.run(command, cwd=tree, env=env, timeout=600, **streams).returncode
    else:
        # As `python -m unittest`, which runs this module, with both directories first in its path.
        code = forks.run(
            "unittest.__main__:main",
            ["python -m unittest", *tests],
            output,
            env,
            path=(str(tree), source),
            cwd=tree,
            timeout=600,
        )
    said = output.read_text()
    assert code == 0, f"{patch.name}: {' '.join(tests)} failed\n{said}"
    assert "Ran 0 tests" not in said, f"{patch.name}: {' '.join(tests)} holds no tests"
    assert re.search(r"^Ran \d+ tests?", said, re.MULTILINE), said


def test_a_test_that_hangs_fails_alone(forks, tmp_path):
    output = tmp_path / "output"
    with pytest.raises(subprocess.TimeoutExpired):
        forks.run("signal:pause", ["hangs"], output, os.environ, timeout=1)
    assert forks.run("gc:enable", ["ends"], output, os.environ) == 0


def test_what_a_patch_needs_is_in_the_series_data(pristine_wheel, tmp_path):
    """Every patch applies to the release after those that series.toml names."""
    wheel = pristine_wheel(f"specforge=={VERSION}")
    for patch in SERIES.patches:
        wanted = with_needs({number(patch)})
        tree = unpack(wheel, tmp_path / patch.name, SERIES)
        for needed in SERIES.patches:
            if number(needed) in wanted:
                patching.git_apply(tree, needed, "--include=specforge/*")


@pytest.mark.parametrize(
    "series", ALL_SERIES, ids=lambda series: f"{series.package.name}-{series.version}"
)
def test_reversing_every_patch_gives_the_wheel_back(tree, series):
    pristine = tree_hashes(tree)
    done = apply_until(tree, series, series.patches[-1])
    assert tree_hashes(tree) != pristine
    for patch, options in reversed(done):
        patching.git_apply(tree, patch, *options, "--reverse")
    assert tree_hashes(tree) == pristine


@pytest.mark.parametrize(
    "series", ALL_SERIES, ids=lambda series: f"{series.package.name}-{series.version}"
)
def test_apply_and_revert_give_the_wheel_back(tree, series):
    """The same through the public functions, as for an installed package."""
    pristine = tree_hashes(tree)
    installed = tree / series.package.source
    target = patching.find_installation(series.package, installed)
    assert patching.apply(target, series).unchanged is False
    assert patching.status(target, series) == patching.Status(patching.State.APPLIED, True)
    assert not (installed / series.package.tests).exists()
    patching.revert(target)
    assert tree_hashes(tree) == pristine
