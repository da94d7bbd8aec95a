"""A study that is under way publishes comparisons of all its drafts only."""

from experiments.study import publish
from specforge_lk.evaluate.report import Report, Result, read_report


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
    publish(tmp_path / "report.json", tmp_path / "study.json", ["make", "article"], targets)
    published = read_report(tmp_path / "study.json")
    assert published.results == whole
    assert list(published.gains) == ["eagle3"]
