"""The report's schema and renderers."""

import json

import pytest

from specforge_lk.evaluate.render import render_markdown, write_all
from specforge_lk.evaluate.report import Paired, Report, Result, read_report

KL = Result(
    algorithm="eagle3",
    loss="kl",
    seed=0,
    temperature=1.0,
    benchmark="mt_bench",
    draft_sampling="probabilistic",
    heads=2,
    tau=1.5,
    tau_ci=[1.4, 1.6],
    alpha_per_head=[0.3, None],
    coverage=0.8,
    fingerprint="a",
)


PAIRED = Paired(
    benchmark="held_out",
    algorithm="eagle3",
    seed=0,
    temperature=1.0,
    draft_sampling="probabilistic",
    loss="lk_lambda",
    baseline="kl",
    difference=0.012,
    ci=[0.01, 0.014],
    chain_starts=100,
    conversations=5,
)


def test_round_trip_and_rendering(tmp_path):
    held_out = KL.model_copy(
        update={
            "benchmark": "held_out",
            "tau": None,
            "tau_ci": None,
            "tau_expected": 1.61,
            "tau_expected_ci": [1.5, 1.7],
            "alpha_per_head": [0.4, 0.3],
        }
    )
    sampled = {"benchmark": "mt_bench", "difference": 0.1, "ci": [0.05, 0.15], "prompts": 32}
    sampled |= {"chain_starts": None, "conversations": None}
    paired = [PAIRED, PAIRED.model_copy(update=sampled)]
    command = ["specforge-lk", "eval"]
    report = Report(results=[KL, held_out], paired=paired, command=command, notes=["Old."])
    written = write_all(report, tmp_path / "new" / "report.json")
    assert [path.name for path in written] == ["report.json", "report.md", "acceptance.png"]
    assert read_report(written[0]) == report
    markdown = written[1].read_text()
    assert markdown.startswith("# Acceptance\n\nOld.\n\n")
    assert "| 1.500 [1.400, 1.600] | 0.300 / – | 0.800 |" in markdown
    assert "| held-out (exact) | 1 | eagle3 kl | 1.610 [1.500, 1.700] |" in markdown
    # 0.012 of the 0.61 that the baseline's draft adds; 0.1 of the 0.5 on the benchmark.
    row = "| 1 | eagle3 lk_lambda | kl | +0.0120 [+0.0100, +0.0140] | +2.0 % | 100 chain starts |"
    assert f"| held-out (exact) {row}" in markdown
    row = "| 1 | eagle3 lk_lambda | kl | +0.1000 [+0.0500, +0.1500] | +20.0 % | 32 prompts |"
    assert f"| mt_bench {row}" in markdown
    assert written[2].read_bytes().startswith(b"\x89PNG")


def test_seeds_are_summarized(tmp_path):
    held_out = {"benchmark": "held_out", "tau": None, "tau_ci": None, "alpha_per_head": [0.4, 0.2]}
    results, paired = [], []
    for algorithm in ("eagle3", "dflash"):
        for seed, tau in ((0, 1.60), (1, 1.64)):
            of = {"algorithm": algorithm, "seed": seed}
            results.append(KL.model_copy(update=of | {"tau": tau - 0.1, "alpha_per_head": [0.5]}))
            results.append(KL.model_copy(update=of | held_out | {"tau_expected": tau}))
            difference = {"difference": tau - 1.5, "ci": [0.1, 0.2]}
            paired.append(PAIRED.model_copy(update=of | difference))
    lk = [r.model_copy(update={"loss": "lk_lambda"}) for r in results]
    written = write_all(Report(results=results + lk, paired=paired), tmp_path / "study.json")
    assert [path.name for path in written] == ["study.json", "study.md", "study.png"]
    summary = written[1].read_text().split("## Every measurement")[0]
    tau, alpha, sampled = "1.620 [1.600, 1.640]", "0.400 / 0.200", "1.520 [1.500, 1.540]"
    for algorithm in ("eagle3", "dflash"):
        assert f"| 1 | {algorithm} kl | 2 | {tau} | {alpha} | – | {sampled} |" in summary
        difference = "+0.1200 [+0.1000, +0.1400]"
        row = f"| 1 | {algorithm} lk_lambda | 2 | {tau} | {alpha} | {difference} | {sampled} |"
        assert row in summary


def test_gains_stand_beside_the_paper_s(tmp_path):
    held_out = KL.model_copy(update={"benchmark": "held_out", "tau": None, "tau_expected": 1.5})
    results = []
    for seed, gain in ((0, 1.1), (1, 1.2)):
        for result in (KL, held_out):
            value = {"seed": seed, "heads": 2, "alpha_per_head": [0.4, 0.2]}
            results.append(result.model_copy(update=value))
            name = "tau" if result is KL else "tau_expected"
            raised = {name: getattr(result, name) * gain, "loss": "lk_lambda"}
            results.append(result.model_copy(update=value | raised))
    report = Report(results=results, gains={"eagle3": "Llama-3.1-8B-Instruct"})
    markdown = write_all(report, tmp_path / "study.json")[1].read_text()
    # 4.02 over 3.86 = (3.48 + 4.52 + 4.02) / (3.39 + 4.31 + 3.88), in the paper.
    ours = "+15.0 [+10.0, +20.0] | +45.0 [+30.0, +60.0] | +15.0 [+10.0, +20.0]"
    assert f"| 1 | eagle3 lk_lambda | +3.8 | +5.1 | {ours} |" in markdown


def test_a_report_holds_one_result_per_measurement():
    report = Report()
    report.put(KL)
    report.put(KL.model_copy(update={"loss": "tv"}))
    report.put(KL.model_copy(update={"tau": 1.7, "fingerprint": "b"}))
    assert [(r.loss, r.tau) for r in report.results] == [("tv", 1.5), ("kl", 1.7)]
    assert report.find(KL.key, "a") is None
    assert report.find(KL.key, "b").tau == 1.7


def test_an_exact_result_takes_the_place_of_an_older_estimate():
    other = KL.model_copy(update={"temperature": 0.0})
    report = Report(
        results=[KL, other], paired=[PAIRED.model_copy(update={"benchmark": "mt_bench"})]
    )
    report.put(KL.model_copy(update={"serving": "temperature=1", "method": "exact"}))
    assert [(r.temperature, r.method) for r in report.results] == [(0, None), (1, "exact")]
    assert not report.paired
    assert "Where `measured` is empty" in render_markdown(report)


def test_another_file_is_not_taken_for_a_report(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"results": [{"algorithm": "eagle3"}]}))
    with pytest.raises(ValueError, match=r"report.json is not a report of this version.*Field"):
        read_report(path)
