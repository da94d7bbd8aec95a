"""`tau` under a serving rule, with every algorithm: training reports what decoding meets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from training_run import EPOCH, HEADS, MEAN_ERROR, capture_arguments, prepare, run

from specforge_lk.drafts.table import DRAFTS
from specforge_lk.evaluate.report import read_report

pytestmark = pytest.mark.slow

#: Every trainer with truncated targets; half of them with greedy drafting, half without.
RULES = ("temperature=0.7,top_p=0.9", "temperature=0.8,top_k=20,drafting=greedy")
CASES = [(name, RULES[i % 2]) for i, name in enumerate(DRAFTS)]
#: More anchors than a sample has positions, and no depth thinned out.
ALL_POSITIONS = ("training.num_anchors=256", "training.down_sample_ratio=1")


@pytest.mark.parametrize(("algorithm", "rule"), CASES, ids=[name for name, _ in CASES])
def test_training_and_evaluation_measure_the_same(
    algorithm: str, rule: str, tmp_path: Path
) -> None:
    setup = prepare(tmp_path, algorithm)
    loss = ("training.loss=tau", f"training.loss_options.serving={rule}")
    held_out = setup.held_out_features
    run("specforge-lk", *capture_arguments(setup), *loss)
    run("specforge-lk", *capture_arguments(setup, setup.held_out, held_out), *loss)
    positions = ALL_POSITIONS if algorithm in ("peagle", "dflash", "domino", "dspark") else ()
    evaluate = (f"training.eval_interval={EPOCH}", f"data.eval_hidden_states_path={held_out}")
    finished = setup.train("tau", *loss, *positions, *evaluate, "training.num_epochs=1")
    # Features of before, and of other programs, do not say what responses are samples of.
    assert re.search(r"does not say of all responses.*temperature=0\.[78],top_", finished.output)
    measured = finished.evaluations[EPOCH]
    for head in range(HEADS):
        reach = measured[f"reach_{head}"]
        assert reach == 1 if head == 0 else 0 <= reach <= measured[f"reach_{head - 1}"] + 1e-6

    draft, report = setup.root / "export", setup.root / "report.json"
    paths = ["--checkpoint", setup.checkpoint("tau", EPOCH), "--output-dir", draft]
    paths += ["--embedding-source", setup.target] if algorithm == "eagle3" else []
    run("specforge", "export", "--to", "hf", *paths, "--draft-config", setup.draft_config)
    asked = ["--held-out", setup.held_out, "--serving", rule, "--off-policy", "--heads", HEADS]
    models = ["--target", setup.target, "--draft", f"tau={draft}"]
    run("specforge-lk", "eval", *models, *asked, "--out", report)
    (exact,) = read_report(report).results
    assert exact.tau_start - 1 == pytest.approx(measured["tau_expected"] - 1, rel=MEAN_ERROR)
    last = f"alpha_{HEADS - 1}"
    assert exact.alpha_per_head[-1] == pytest.approx(measured[last], rel=MEAN_ERROR)
