"""SGLang with the newest series decodes as `specforge_lk.evaluate` computes, token for token alike.

SGLang's own draft workers and verification run on the CPU around Markov models (`sglang_decode`),
in batches whose requests have unlike temperatures, top-k and top-p. Given what came out, the number
of verification steps has an exact expectation, and every token has the target's distribution.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from series_tree import apply_until, unpack

from specforge_lk.data.conversations import Tokens
from specforge_lk.decode.sampling import distribution
from specforge_lk.evaluate.settings import Settings
from specforge_lk.evaluate.teacher_forced import measure_responses
from specforge_lk.patching import PACKAGES, load_series
from specforge_lk.serving import Serving

pytestmark = pytest.mark.slow

HELPERS = Path(__file__).parents[1] / "helpers"
SERIES = load_series(PACKAGES["sglang"])
HARNESS = Path("test/registered/unit/spec/test_eagle_rejection_sampling.py")
STEPS = 3
#: Temperature, top-k and top-p of the requests of a batch, in turns; the last is greedy.
RULES = [(0.7, 0, 1.0), (0.7, 2, 1.0), (1.2, 0, 0.8), (1.0, 1, 1.0)]
SAMPLED = range(3)
GREEDY = 3
BLOCK = {"speculative_use_block_verification": True}
FOLLOW = {"speculative_use_draft_top_k_top_p": True}


@dataclass(frozen=True)
class Case:
    """What is decoded: see `sglang_decode.Decoder`."""

    name: str
    server: dict[str, bool]
    seeded: bool = False
    multi_layer: bool = False
    taken_back: str | None = None

    def rule(self, temperature: float, top_k: int, top_p: float) -> Serving:
        """How requests of these settings are decoded; SGLang's greedy ones have top-k 1."""
        follows = "speculative_use_draft_top_k_top_p" in self.server
        # The draft of multi-layer EAGLE does not take its likeliest token for them.
        if top_k == 1 and (follows or not self.multi_layer):
            return Serving(temperature=0)
        rule: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        if follows:
            rule |= {"draft_top_k": top_k, "draft_top_p": top_p}
        if "speculative_use_block_verification" in self.server:
            rule["verification"] = "block"
        return Serving(**rule)


SOUND = [
    Case("token", {}),
    Case("block", BLOCK),
    Case("token, draft filtered", FOLLOW),
    Case("block, draft filtered", BLOCK | FOLLOW),
    Case("block, draft filtered, seeds", BLOCK | FOLLOW, seeded=True),
    Case("token, multi-layer, draft filtered", FOLLOW, multi_layer=True),
    Case("block, multi-layer", BLOCK, multi_layer=True),
]
#: With the one or the other part of the series undone, the output is wrong.
UNSOUND = [
    Case("token, q at other tokens", {}, taken_back="scatter"),
    Case("block, q at other tokens", BLOCK, taken_back="scatter"),
    Case("token, q not filtered", FOLLOW, taken_back="filtered q"),
    Case("block, q not filtered", BLOCK | FOLLOW, taken_back="filtered q"),
]


@pytest.fixture(scope="module")
def decoded(pristine_wheel: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Everything that `sglang_decode` saved, in SGLang with the whole series."""
    folder = tmp_path_factory.mktemp("sglang")
    tree = unpack(pristine_wheel(f"sglang=={SERIES.version}"), folder, SERIES)
    apply_until(tree, SERIES, SERIES.patches[-1])
    path = os.pathsep.join(map(str, (tree / SERIES.package.source, tree / HARNESS.parent, HELPERS)))
    env = os.environ | {
        "PYTHONPATH": path,
        "TRITON_INTERPRET": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
    }
    asked = {"rules": RULES, "cases": [vars(case) for case in SOUND + UNSOUND]}
    command = [sys.executable, HELPERS / "sglang_stubs.py", HELPERS / "sglang_decode.py"]
    given = [HARNESS.stem, json.dumps(asked), folder / "decoded.npz"]
    run = subprocess.run([*command, *given], env=env, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    return np.load(folder / "decoded.npz")


class MarkovTarget:
    """A `Target` whose logits depend on the last token: a hidden state is that token."""

    device = torch.device("cpu")

    def __init__(self, logits: np.ndarray) -> None:
        self.table = torch.from_numpy(logits).double()
        self.vocab_size = len(logits)

    def forward(
        self, tokens: torch.Tensor, mask: torch.Tensor, layers: tuple[int, ...] = ()
    ) -> SimpleNamespace:
        hidden = tokens[..., None]
        return SimpleNamespace(hidden=hidden, features=hidden.double())

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.table[hidden[..., 0]]


class MarkovDraft:
    """A `Draft` of the same kind."""

    capture_layers = (0,)

    def __init__(self, logits: np.ndarray, ids: np.ndarray | None) -> None:
        self.table = torch.from_numpy(logits).double()
        self.draft_ids = None if ids is None else torch.from_numpy(ids)

    def teacher_forced(
        self, tokens: torch.Tensor, features: torch.Tensor, starts: torch.Tensor, heads: int
    ) -> Iterator[torch.Tensor]:
        row, position = starts.nonzero().unbind(1)
        for head in range(heads):
            yield self.table[tokens[row, position + 1 + head]]


def outputs(decoded: Any, case: Case, rule: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [R, n] behind token 0, and verification steps [R], of the requests of a rule."""
    return tuple(decoded[f"{case.name}/{of}"][rule :: len(RULES)] for of in ("tokens", "steps"))


def p_value(decoded: Any, case: Case, rule: int) -> float:
    """That the first three tokens are the target's, by chi-square; rare outputs count as one."""
    tokens, _ = outputs(decoded, case, rule)
    logits = torch.from_numpy(decoded["target"]).double()
    p = distribution(logits, case.rule(*RULES[rule]).target).numpy()
    expected = len(tokens) * np.einsum("a,ab,bc->abc", p[0], p, p).ravel()
    cells = tokens[:, :3] @ len(p) ** np.arange(2, -1, -1)
    counts = np.bincount(cells, minlength=len(expected))
    if counts[expected == 0].any():
        return 0.0
    rare = expected < 5
    pairs = [(counts[~rare], expected[~rare]), (counts[rare].sum(), expected[rare].sum())]
    observed, wanted = (np.append(*of) for of in zip(*pairs, strict=True))
    return stats.chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue


@pytest.mark.parametrize("case", SOUND, ids=lambda case: case.name)
def test_the_output_has_the_targets_distribution(decoded: Any, case: Case) -> None:
    assert min(p_value(decoded, case, rule) for rule in SAMPLED) > 1e-3
    tokens, _ = outputs(decoded, case, GREEDY)
    best = decoded["target"].argmax(1)
    before = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    assert (tokens == best[before]).all()


@pytest.mark.parametrize("case", UNSOUND, ids=lambda case: case.name)
def test_the_test_sees_what_is_undone(decoded: Any, case: Case) -> None:
    assert min(p_value(decoded, case, rule) for rule in SAMPLED) < 1e-12


def deviation(decoded: Any, case: Case, index: int, rule: Serving) -> np.ndarray:
    """Verification steps counted less those expected under a rule, given the output [2000]."""
    tokens, counted = (of[:2000] for of in outputs(decoded, case, index))
    full = case.multi_layer
    draft = MarkovDraft(decoded["full" if full else "hot"], None if full else decoded["ids"])
    # A prompt of one token, and token 0 as the first of the response: that of the prefill.
    rows = np.pad(tokens, ((0, 0), (2, 0))).tolist()
    conversations = [Tokens(row, [0] + [1] * (len(row) - 1)) for row in rows]
    target, settings = MarkovTarget(decoded["target"]), Settings(heads=STEPS, batch_size=2000)
    (measured,) = measure_responses(target, [(draft, [rule])], conversations, settings)
    return counted - measured[rule].expected.rounds


@pytest.mark.parametrize("case", SOUND, ids=lambda case: case.name)
def test_verification_steps_are_those_that_eval_computes(decoded: Any, case: Case) -> None:
    """Given the output, their expectation is exact: what is left is chance."""
    for index, settings in enumerate(RULES):
        rule = case.rule(*settings)
        difference = deviation(decoded, case, index, rule)
        if rule.temperature == 0:
            assert np.abs(difference).max() < 1e-6
            continue
        error = difference.std(ddof=1) / len(difference) ** 0.5
        assert abs(difference.mean()) <= 4 * error + 1e-6
        assert error < 0.03


def test_verification_steps_tell_rules_apart(decoded: Any) -> None:
    case, settings = SOUND[2], RULES[2]
    other = SOUND[0].rule(*settings)
    difference = deviation(decoded, case, 2, other)
    assert abs(difference.mean()) > 10 * difference.std(ddof=1) / len(difference) ** 0.5


def test_the_option_may_cost_acceptance(decoded: Any) -> None:
    """Top-k 2 gains by it; top-p 0.8 of a q on few tokens cuts off some that the target keeps."""
    for index, sign in ((1, -1), (2, 1)):
        plain, follow = (outputs(decoded, SOUND[case], index)[1] for case in (0, 2))
        change = follow.mean() - plain.mean()
        error = np.hypot(plain.std(), follow.std()) / len(plain) ** 0.5
        assert sign * change > 4 * error


def test_the_kernels_of_the_helpers_are_sglangs(decoded: Any) -> None:
    assert decoded["kernels"]
