"""The evidence for the patch series: what `make upstream-tests` and `make defects` report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from series_tree import SERIES

import tools
from tools import upstream_tests
from tools.levels import FIXES
from tools.probes import PROBES

REPORTS = Path(tools.__file__).parent / "results"

TESTS = """
import os, unittest

class Case(unittest.TestCase):
    def test_good(self): pass
    def test_bad(self): self.fail()
    def test_one_bad_of_several(self):
        for number in range(3):
            with self.subTest(number): self.assertEqual(number, 0)
    @unittest.skip("no GPU")
    def test_skipped(self): pass

class Broken(unittest.TestCase):
    @classmethod
    def setUpClass(cls): raise RuntimeError
    def test_never(self): pass
"""


@pytest.mark.slow
def test_outcomes_of_every_kind(tmp_path):
    """A crash takes no other file along, and a file that cannot be imported is an error."""
    pytest.importorskip("pytest_timeout")
    tree = tmp_path / "tree"
    (tree / "tests").mkdir(parents=True)
    for name, text in {
        "__init__": "",
        "test_cases": TESTS,
        "test_cases_of_a_function": "def test_good(): pass",
        "test_no_import": "import absent_module",
        "test_crash": "import os\ndef test_crash(): os._exit(3)",
    }.items():
        (tree / "tests" / f"{name}.py").write_text(text)
    expected = {
        "tests/test_cases.py::Case::test_good": "passed",
        "tests/test_cases.py::Case::test_bad": "failed",
        "tests/test_cases.py::Case::test_one_bad_of_several": "failed",
        "tests/test_cases.py::Case::test_skipped": "skipped",
        "tests/test_cases.py::Broken::test_never": "error",
        "tests/test_cases_of_a_function.py::test_good": "passed",
        "tests/test_no_import.py": "error",
        "tests/test_crash.py": "error",
    }
    assert upstream_tests.outcomes_in(tree, "tests") == expected
    # Kept: what ran once is not run again.
    (tree / "tests" / "test_crash.py").write_text("def test_crash(): pass")
    assert upstream_tests.outcomes_in(tree, "tests") == expected


def test_what_got_worse_needs_an_explanation(monkeypatch):
    monkeypatch.setattr(upstream_tests, "explanations", lambda: {"a": "0001: why"})
    report = upstream_tests.compare(
        {
            "before": {"a": "passed", "b": "passed", "c": "failed", "d": "failed", "e": "passed"},
            "after": {"a": "failed", "b": "skipped", "c": "passed", "d": "failed", "new": "error"},
        }
    )
    assert report["explained"] == {"a": "0001: why"}
    assert report["unexplained"] == ["b", "e", "new"]
    assert report["changed"]["e"] == ["passed", "absent"]
    assert report["failing in both"] == {"d": "failed"}


def test_reports_are_those_of_the_series():
    defects = json.loads((REPORTS / "defects.json").read_text())
    names = [patch.name for patch in SERIES.patches]
    assert [fix["patch"] for fix in defects["fixes"]] == names[: len(FIXES)]
    assert set(FIXES) <= PROBES.keys()
    upstream = json.loads((REPORTS / "upstream-tests.json").read_text())
    assert not upstream["unexplained"]
    # On the commit's own package only what the release has changed may be in the way.
    plain = upstream["plain"]
    for reason in plain["conflicts"].values():
        if not reason.startswith("needs "):
            files = set(re.findall(r"(?:^|; )([^;:]+): patch does not apply", reason))
            assert files and files <= set(plain["of these patched"])
    refused = [name.partition("-")[0] for name in plain["conflicts"]]
    assert refused == ["0036", "0037", "0038"]
    # The cover letter says which patches its counts are of.
    assert upstream["patches"] == names[: len(upstream["patches"])]
    numbers = {name.partition("-")[0] for name in names}
    for why in upstream_tests.explanations().values():
        assert set(why.partition(": ")[0].split(", ")) <= numbers
