"""The study of gains: what it trains, the rows that it keeps, what it pairs and what it reports."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from pydantic import BaseModel, ConfigDict
from specforge.losses import LossRegistration, LossRegistry, installed_loss_registry
from typer.testing import CliRunner

from experiments.gains import __main__ as command
from experiments.gains.measure import FILES, Measurement
from experiments.gains.plan import (
    OBJECTIVES,
    PARTS,
    RULES,
    Run,
    check_objectives,
    runs_of,
    tuning_of,
)
from experiments.gains.report import Setting, crossed, lines_of, markdown, missing, render, summary
from experiments.gains.results import Measured, Results, Row
from experiments.runner import ROOT, Training
from specforge_lk.evaluate.intervals import resamples
from specforge_lk.evaluate.rounds import Rounds, paired_differences

KL = Run("eagle3", "kl", 0, samples=768, steps=96, start_steps=384)
TV = replace(KL, objective="tv")
RESPONSES = {rule: f"of {rule}" for rule in RULES.values()}
HOT, COLD = RULES["T1"], RULES["T0"]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


# ------------------------------------------------------------------------------------ plan


@pytest.mark.parametrize("part", PARTS)
def test_between_drafts_that_are_compared_the_objective_alone_differs(part: str) -> None:
    runs = runs_of(part, ["eagle3"], seeds=[0])
    assert len({run.training.directory for run in runs}) == len(runs)
    for place, run in enumerate(runs):
        assert {run.start, run.baseline} - {None, run} <= set(runs[:place])
        own = ("training.loss", "run_id=", "output_dir=")
        if tuning_of(run.objective) != tuning_of(run.baseline.objective):
            own += ("training.learning_rate=",)  # greedy drafting's
        command, kl = (
            [word for word in of.training.command if not word.startswith(own)]
            for of in (run, run.baseline)
        )
        assert command == kl
        assert set(OBJECTIVES[run.objective]) <= set(run.training.command)
        if run.start:
            start = f"model.draft_checkpoint_path={run.start.training.draft}"
            assert start in run.training.command


def test_of_one_run_and_of_two_the_steps_are_equal() -> None:
    runs = runs_of("scratch", ["eagle3"], seeds=[0])
    compared = [run for run in runs if run.objective in ("lk_lambda-10", "tau", "tv")]
    assert {run.start_steps + run.steps for run in compared} == {480, 1920}
    assert {run.steps for run in compared if not run.start_steps} == {480, 1920}


def test_what_is_chosen_always_has_a_baseline_and_a_start() -> None:
    runs = runs_of("fine-tune", ["mtp"], ["tv"], [3], steps=[4], start_steps=[8], samples=16)
    assert runs == [
        Run("mtp", "kl", 3, 16, 8),
        Run("mtp", "kl", 3, 16, 4, 8),
        Run("mtp", "tv", 3, 16, 4, 8),
    ]


def test_features_of_other_samples_are_elsewhere() -> None:
    demo = Training("eagle3", "kl", 0, Path("runs/demo"))
    assert not any("features" in word for word in demo.command)
    words = TV.training.command
    assert f"data.hidden_states_path={TV.training.features}" in words
    assert f"model.vocab_mapping_path={TV.training.vocab_mapping}" in words
    other = replace(TV, samples=8).training
    assert {demo.features, TV.training.features, other.features} == {
        Path("runs/features/train"),
        Path("runs/gains/features-768/train"),
        Path("runs/gains/features-8/train"),
    }


def test_the_installed_losses_have_every_objective() -> None:
    check_objectives(OBJECTIVES, installed_loss_registry())


def test_an_interrupted_fine_tuning_continues_from_its_checkpoint_alone(tmp_path: Path) -> None:
    run = replace(TV.training, parent=tmp_path)
    assert run.resumable_command() == run.command
    (run.directory / "tv-latest").mkdir(parents=True)
    resumed = ["model.draft_checkpoint_path=", f"training.resume_from={run.directory}"]
    assert run.resumable_command() == [*run.command, *resumed]


def test_an_objective_that_the_losses_lack_is_refused() -> None:
    class Options(BaseModel):
        model_config = ConfigDict(extra="forbid")
        eta: float = 3.0

    registry = LossRegistry([LossRegistration("lk_lambda", Options, lambda options: options)])
    check_objectives(["lk_lambda-3", "lk_lambda-10"], registry)
    with pytest.raises(ValueError, match=r"objective tau: unknown training\.loss='tau'"):
        check_objectives(["lk_lambda-3", "tau"], registry)
    with pytest.raises(ValueError, match=r"objective survival: .*\n *chain_weight"):
        check_objectives(["survival"], registry)


# ------------------------------------------------------------------------------------ rows


def measured(rounds: list[float], rule: str, tokens: list[int]) -> Measured:
    tau = sum(tokens) / sum(rounds)
    return Measured(
        responses=RESPONSES[rule],
        tau=tau,
        tau_ci=[tau - 0.1, tau + 0.1],
        alpha=[0.3, None],
        coverage=0.8,
        off_rule=0,
        rounds=rounds,
    )


TOKENS = [40, 30, 20, 50]


def row(run: Run, faster: float = 0.0, rules: dict[str, float] | None = None) -> Row:
    """Return a row whose rounds are fewer by a share, which a rule may have of its own."""
    shares = dict.fromkeys(RULES.values(), faster) | (rules or {})
    rounds = [30.0, 25.0, 15.0, 30.0]
    return Row(
        part=run.part,
        architecture=run.architecture,
        objective=run.objective,
        seed=run.seed,
        samples=run.samples,
        steps=run.steps,
        start_steps=run.start_steps,
        inputs=run.inputs,
        code=run.code,
        command="",
        device="cpu",
        seconds=None,
        measured={
            rule: measured([r * (1 - share) for r in rounds], rule, TOKENS)
            for rule, share in shares.items()
        },
    )


def results(*rows: Row) -> Results:
    return Results(responses=dict.fromkeys(RESPONSES.values(), TOKENS), rows=list(rows))


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = results(row(TV, 0.1), row(KL))
    written.write(tmp_path / "gains.json")
    read = Results.read(tmp_path / "gains.json")
    assert read == written
    assert [r.objective for r in read.rows] == ["kl", "tv"]
    assert read.rows[0].measured[HOT].gain is None
    gain = read.rows[1].measured[HOT].gain
    assert gain is not None and gain.difference == pytest.approx(1.4 / 0.9 - 1.4)
    assert sum('"objective"' in line for line in (tmp_path / "gains.json").open()) == 2
    read.put(row(TV, 0.2))
    assert len(read.rows) == 2
    assert Results.read(tmp_path / "none.json") == Results()


def test_a_row_stands_while_its_inputs_are_the_same() -> None:
    found = results(row(TV))
    assert found.has(TV, RESPONSES) and found.has(TV, RESPONSES, same_code=True)
    for other in (KL, replace(TV, seed=1), replace(TV, samples=8), replace(TV, start_steps=1536)):
        assert not found.has(other, RESPONSES)
    assert not found.has(TV, {**RESPONSES, HOT: "others"})
    found.rows[0].code = "another"
    assert found.has(TV, RESPONSES) and not found.has(TV, RESPONSES, same_code=True)
    found.rows[0].inputs = "others"
    assert not found.has(TV, RESPONSES)


def test_the_inputs_of_a_draft_are_those_of_its_start_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = TV.inputs
    assert replace(TV, objective="kl").inputs != before != replace(TV, seed=1).inputs
    assert TV.inputs == before
    monkeypatch.setitem(OBJECTIVES, "kl", ("training.loss=lk_alpha",))
    assert TV.inputs != before


# --------------------------------------------------------------------------------- pairing


def rounds_of(seed: int, lengths: np.ndarray) -> Rounds:
    rng = np.random.default_rng(seed)
    starts = int((lengths - 1).sum())
    past = rng.uniform(0, 0.9, (starts, 3))
    for start, left in enumerate(np.concatenate([np.arange(n - 1, 0, -1) for n in lengths])):
        past[start, left:] = 0
    ones = np.ones(starts)
    return Rounds(np.arange(len(lengths)), lengths, past, past, ones, ones < 0)


def test_kept_arrays_pair_as_the_evaluation_does() -> None:
    lengths = np.random.default_rng(0).integers(5, 30, 12)
    a, b = rounds_of(1, lengths), rounds_of(2, lengths)
    found = results(row(TV), row(KL))
    found.responses = {"these": a.tokens.tolist()}
    found.rows[0].measured = {HOT: Measured.of(a, "these")}
    found.rows[1].measured = {HOT: Measured.of(b, "these")}
    gain = found.gain([(TV, KL)], HOT)
    wanted = paired_differences(a, b)["tau_rounds"]
    assert gain is not None
    assert gain.difference == pytest.approx(wanted.value[0], abs=1e-5)
    assert gain.ci == pytest.approx(wanted.ci[0], abs=1e-5)
    assert found.rows[0].measured[HOT].tau == pytest.approx(a.tau)


def test_over_seeds_a_gain_is_the_mean_of_the_seeds_along_the_same_draws() -> None:
    rng = np.random.default_rng(0)
    runs = [(replace(TV, seed=seed), replace(KL, seed=seed)) for seed in (0, 1)]
    found = results(*(row(run) for pair in runs for run in pair))
    drawn: list[list[np.ndarray]] = []
    for pair in runs:
        drawn.append([])
        for run in pair:
            rounds = rng.uniform(10, 19, 4)
            of = found.find(run)
            assert of is not None
            of.measured[HOT].rounds = rounds.tolist()
            drawn[-1].append(rounds)
    tokens = np.array(TOKENS)
    shares, differences = [], []
    for weights in resamples(4, 0):
        taus = [[weights @ tokens / (weights @ rounds) for rounds in pair] for pair in drawn]
        differences.append(np.mean([a - b for a, b in taus]))
        shares.append(np.mean([(a - b) / (b - 1) for a, b in taus]))
    gain = found.gain(runs, HOT)
    assert gain is not None
    assert gain.ci == pytest.approx(np.percentile(differences, [2.5, 97.5]))
    assert gain.share_ci == pytest.approx(np.percentile(shares, [2.5, 97.5]))


def test_only_what_was_measured_along_the_same_responses_is_paired() -> None:
    found = results(row(TV), row(KL))
    assert found.gain([(TV, KL)], HOT) is not None
    assert found.gain([(TV, replace(KL, seed=1))], HOT) is None
    found.responses["others"] = TOKENS
    found.rows[1].measured[HOT].responses = "others"
    assert found.gain([(TV, KL)], HOT) is None
    assert found.gain([(TV, KL)], COLD) is not None


# --------------------------------------------------------------------------------- measure


def test_every_rule_is_measured_along_its_own_responses() -> None:
    measurement = Measurement(Path("runs/target"), 109)
    assert list(measurement.responses) == list(RULES.values())
    assert all(len(chosen.rows) == 109 for chosen in measurement.chosen.values())
    assert len(set(measurement.responses.values())) == len(FILES)
    assert measurement.responses[HOT] == measurement.responses[RULES["T1-greedy"]]
    prompts = [
        [(r["id"], r["conversations"][0]) for r in chosen.rows]
        for chosen in measurement.chosen.values()
    ]
    assert all(of == prompts[0] for of in prompts)
    assert Measurement(Path("runs/target"), 8).responses[HOT] != measurement.responses[HOT]


def test_the_command_goes_on_where_the_rows_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    path = tmp_path / "gains.json"

    class Fake(Measurement):
        def add(self, found: Results, runs: list[Run]) -> None:
            found.responses |= dict.fromkeys(self.responses.values(), TOKENS)
            for run in runs:
                new = row(run)
                for rule, of in new.measured.items():
                    of.responses = self.responses[rule]
                found.put(new)

    monkeypatch.setattr(command, "Measurement", Fake)
    monkeypatch.setattr(command, "prepare", lambda root: type("A", (), {"target": root}))
    monkeypatch.setattr(command, "capture", lambda *of, **options: None)
    monkeypatch.setattr(
        command, "train", lambda runs, *_: trained.extend(str(run.directory) for run in runs)
    )
    words = ["fine-tune", "--architectures", "eagle3", "--seeds", "0", "--results", str(path)]
    words += ["--steps", "4", "--start-steps", "4", "--objectives"]

    def call(objectives: str) -> list[str]:
        trained.clear()
        done = CliRunner().invoke(app, [*words, objectives])
        assert done.exit_code == 0, done.output
        return ["/".join(directory.split("/")[-2:]) for directory in trained]

    app = typer.Typer()
    app.command()(command.main)
    start, kl, tv = "0-4/eagle3-kl-seed0", "4-4/eagle3-kl-seed0", "4-4/eagle3-tv-seed0"
    elsewhere = row(replace(TV, seed=7))
    results(elsewhere).write(path)
    assert call("tv") == [start, start, kl, tv]
    assert (tmp_path / "gains.md").exists() and (tmp_path / "gains.png").exists()
    assert call("tv") == []
    # The start's draft is needed again, though its row is there.
    assert call("tv lk_alpha") == [start, "4-4/eagle3-lk_alpha-seed0"]
    rows = Results.read(path).rows
    assert len(rows) == 5 and elsewhere in rows


# ---------------------------------------------------------------------------------- report


def test_a_line_of_every_objective_after_start_and_baseline() -> None:
    start = row(Run("eagle3", "kl", 0, 768, 384), -0.1)
    second = replace(TV, seed=1)
    found = results(row(second, 0.2), row(replace(KL, seed=1)), row(TV, 0.1), row(KL), start)
    setting = Setting.of(found.rows[0])
    lines = lines_of(found, setting)
    assert [line.title for line in lines] == ["(start)", "`kl`", "`tv`"]
    text = markdown(found, "gains.png")
    first, other = 1.4 / 0.9 - 1.4, 1.4 / 0.8 - 1.4
    assert "### eagle3: 96 steps after 384 of KL, 768 responses" in text
    assert f"({other:+.4f}, {first:+.4f}) *" in text
    share = 100 * (first + other) / 2 / 0.4
    assert f"{share:+.1f} %" in text
    assert "(start) | 0 | 1.273 |" in text
    short = summary(found)
    assert short is not None and "`tv`" in short and f"{share:+.1f} %" in short
    assert summary(results(row(KL))) is None


def test_one_run_stands_beside_two_of_equal_steps() -> None:
    kl = Run("eagle3", "kl", 0, 768, 480)
    then = Run("eagle3", "tv", 0, 768, 96, 384)
    found = results(row(kl), row(replace(kl, objective="lk_lambda-3"), 0.05), row(then, 0.1))
    lines = lines_of(found, Setting.of(found.rows[0]))
    titles = ["`kl`", "`lk_lambda-3`", "384 steps of `kl`, then `tv`"]
    assert [line.title for line in lines] == titles
    assert lines[-1].pairs == ((then, kl),)


def test_crossed_rules_say_what_the_diagonal_beats() -> None:
    runs = {name: replace(KL, objective=f"for-{name}") for name in ("T0", "T1")}
    found = results(
        row(KL),
        row(runs["T0"], rules={COLD: 0.1, HOT: -0.1}),
        row(runs["T1"], rules={COLD: 0.0, HOT: 0.1}),
    )
    text = crossed(found, Setting.of(found.rows[1]))
    gain = 1.4 / 0.9 - 1.4
    assert f"| `temperature=0` | {gain:+.4f}" in text
    assert f"Served by `temperature=0`, the draft that is trained for it has τ {gain:+.4f}" in text
    assert text.count(" * over that for") == 2


def test_what_is_missing_is_said() -> None:
    # On 768 responses, as the study is planned.
    found = results(row(TV), row(KL))
    fine = f"| fine-tune | {TV.steps} after {TV.start_steps}, {TV.samples} responses | 2 of 42 |"
    assert fine in missing(found) and "| 1920, 768 responses | 0 of 36 |" in missing(found)
    every = results(*(row(run) for run in runs_of("rules")))
    assert f"| rules | 96 after 384, 768 responses |{' 18 of 18 |' * 5}" in missing(every)
    # A size of its own is a row of its own.
    small = (replace(run, steps=36, start_steps=144) for run in (TV, KL))
    assert "| 36 after 144, 768 responses | 2 of 42 |" in missing(results(*map(row, small)))


def test_other_code_weights_and_devices_are_noted() -> None:
    found = results(row(TV), row(KL))
    assert "other weights" not in markdown(found, "x.png")
    found.rows[0] = found.rows[0].model_copy(
        update={"code": "another", "start_weights": "others", "device": "cuda"}
    )
    text = markdown(found, "x.png")
    for said in ("more than one state of the code", "1 rows are compared", "cpu and cuda"):
        assert said in text


def test_the_figure_is_drawn_of_all_parts(tmp_path: Path) -> None:
    kl = Run("eagle3", "kl", 0, 768, 480)
    found = results(row(TV, 0.1), row(KL), row(kl), row(replace(kl, objective="lk_alpha"), 0.1))
    render(found, tmp_path / "gains.png")
    render(Results(), tmp_path / "none.png")
    assert (tmp_path / "gains.png").stat().st_size > (tmp_path / "none.png").stat().st_size > 0
