"""One's own τ beside the paper's: the right figures, wherever there are any, and nowhere else."""

import json
import shutil

import pytest
from tiny_target import save_draft, save_target
from typer.testing import CliRunner

from specforge_lk.cli import app
from specforge_lk.evaluate.published import HEADS, PUBLISHED, find_benchmark, find_target
from specforge_lk.evaluate.render import render_markdown
from specforge_lk.evaluate.report import Report, Result, read_report
from specforge_lk.evaluate.tables import published_rows

LLAMA = "Llama-3.1-8B-Instruct"


def result(benchmark: str, tau: float | None, **changes) -> Result:
    fields = {"algorithm": "eagle3", "loss": "lk_lambda", "seed": 0, "temperature": 1.0, "heads": 7}
    fields |= {"draft_sampling": "probabilistic", "alpha_per_head": [], "coverage": None}
    return Result(**{**fields, "benchmark": benchmark, "tau": tau, **changes})


def test_means_of_benchmarks_are_those_of_table_2():
    """Two tables of the paper, and model cards, have the same figures in different forms."""
    drafts = PUBLISHED[LLAMA]
    table_2 = {("kl", 0.0): 4.36, ("kl", 1.0): 3.86, ("lk_lambda", 0.0): 4.43}
    for (loss, temperature), mean in {**table_2, ("lk_lambda", 1.0): 4.01}.items():
        assert drafts["eagle3", loss][temperature].mean == pytest.approx(mean, abs=0.0051)
    both = [
        tau
        for target in PUBLISHED.values()
        for draft in target.values()
        for tau in draft.values()
        if tau.each
    ]
    assert len(both) == 27
    for tau in both:
        assert tau.mean == pytest.approx(sum(tau.each) / 3, abs=0.0051)
    assert {algorithm for drafts in PUBLISHED.values() for algorithm, _ in drafts} == set(HEADS)


def test_names_are_found_however_they_are_spelled():
    assert find_target("meta-llama/Llama-3.1-8B-Instruct") == LLAMA
    assert find_target("models/llama-3.1-8b-instruct/") == LLAMA
    assert find_target("Llama-3.1-8B") is None
    spellings = ["mt_bench", "MT-Bench", "human-eval", "gsm8k", "mtbench2"]
    assert [find_benchmark(name) for name in spellings] == [0, 0, 1, 2, None]


def test_rows_show_what_is_measured_beside_what_is_published():
    results = [
        result("mt_bench", 3.4),
        result("humaneval", 4.6),
        result("gsm8k", 4.0),
        result("gsm8k", 2.0, algorithm="medusa", loss="kl", heads=6, temperature=0.0),
        result("alpaca", 9.0),
        result("gsm8k", 9.0, loss="reverse_kl"),
        result("gsm8k", 9.0, temperature=0.7),
        result("held_out", None),
    ]
    header, rows = published_rows(Report(results=results, published=LLAMA))
    assert header[3:] == ["MT-bench (paper)", "HumanEval (paper)", "GSM8K (paper)", "mean (paper)"]
    hot = ["3.40 (3.48)", "4.60 (4.52)", "4.00 (4.02)", "4.00 (4.01)"]
    cold = ["– (2.05)", "– (2.41)", "2.00 (2.11)", "– (2.19)"]
    assert sorted(rows) == [
        ["0", "medusa kl", "6 (6)", *cold],
        ["1", "eagle3 lk_lambda", "7 (7)", *hot],
    ]
    # Only the mean is known of this one.
    _, rows = published_rows(Report(results=results[:3], published="gpt-oss-120b"))
    assert rows[0][3:] == ["3.40 (–)", "4.60 (–)", "4.00 (–)", "4.00 (2.65)"]
    assert published_rows(Report(results=results))[1] == []
    assert "Beside the paper" not in render_markdown(Report(results=results))


def test_the_command_compares_by_the_target_s_name(tmp_path):
    save_target(tmp_path / LLAMA)
    save_draft(tmp_path / "draft")
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps({"question": "1 + 1?"}))

    def evaluate(target: str, *more: str):
        paths = ["--target", str(tmp_path / target), "--out", str(tmp_path / "report.json")]
        measured = ["--benchmark", f"gsm8k={tmp_path / 'gsm8k.jsonl'}", "--temperature", "1"]
        draft = ["--draft", f"kl={tmp_path / 'draft'}", "--max-new-tokens", "8", "--heads", "3"]
        arguments = ["eval", *paths, *measured, *draft, *more]
        return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})

    run = evaluate(LLAMA)
    assert run.exit_code == 0 and f"τ with {LLAMA}, measured (paper)" in run.output, run.output
    report = read_report(tmp_path / "report.json")
    tau = report.results[0].tau_rounds
    row = f"| 1 | eagle3 kl | 3 (7) | – (3.39) | – (4.31) | {tau:.2f} (3.88) | – (3.86) |"
    assert row in (tmp_path / "report.md").read_text()

    shutil.move(tmp_path / LLAMA, tmp_path / "mine")
    assert "measured (paper)" not in evaluate("mine").output
    assert "(3.77)" in evaluate("mine", "--compare-with", "qwen3-235b-a22b-instruct-2507").output
    refused = evaluate("mine", "--compare-with", "Llama-4")
    assert refused.exit_code == 2 and "'Llama-4' is none of Llama-3.1-8B-Instruct" in refused.output
