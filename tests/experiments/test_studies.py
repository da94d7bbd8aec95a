"""What a study trains; one that is under way publishes comparisons of all its drafts only."""

from pathlib import Path

import pytest

from experiments.study import STUDIES, publish
from specforge_lk.evaluate.report import Report, Result, read_report


@pytest.mark.parametrize("name", STUDIES)
def test_between_drafts_of_one_seed_the_loss_alone_differs(name: str, tmp_path: Path) -> None:
    for algorithm, plan in STUDIES[name].plans.items():
        runs = plan.trainings(algorithm, 0, tmp_path)
        tuned = [run for run in runs if run.loss != "untuned"]
        assert [run.loss for run in tuned] == list(plan.losses)
        assert len({(run.budget.get("max_steps"), run.start, run.batch) for run in tuned}) == 1
        for run in tuned:
            own = ("training.loss", "run_id=", "output_dir=")
            assert [word for word in run.command if not word.startswith(own)] == [
                word for word in tuned[0].command if not word.startswith(own)
            ]


def result(loss: str, seed: int, benchmark: str) -> Result:
    return Result(
        algorithm="eagle3",
        loss=loss,
        seed=seed,
        temperature=1.0,
        benchmark=benchmark,
        draft_sampling="probabilistic",
        heads=1,
        tau=1.5,
        tau_ci=[1.4, 1.6],
        alpha_per_head=[0.5],
        coverage=1.0,
    )


def test_what_only_some_drafts_were_measured_on_is_left_out(tmp_path):
    drafts = [(loss, seed) for loss in ("kl", "lk_lambda") for seed in (0, 1)]
    whole = [result(loss, seed, "mt_bench") for loss, seed in drafts]
    partial = [result(loss, seed, "gsm8k") for loss, seed in drafts[:-1]]
    Report(results=whole + partial).write(tmp_path / "report.json")
    targets = {"eagle3": "Llama-3.1-8B-Instruct", "mtp": "DeepSeek-V3-0324"}
    publish(tmp_path / "report.json", tmp_path / "study.json", ["make", "paper"], targets)
    published = read_report(tmp_path / "study.json")
    assert published.results == whole
    assert list(published.gains) == ["eagle3"]
