"""`specforge-lk eval` end to end, pooled τ, exact expected τ, paired intervals."""

import gzip
import json

import numpy as np
import pytest
import torch
from tiny_target import build_model, build_tokenizer, save_draft, save_target
from typer.testing import CliRunner

from specforge_lk.cli import app
from specforge_lk.cli.progress import ProgressBar
from specforge_lk.data.conversations import Tokens
from specforge_lk.data.prompts import (
    DataError,
    read_rows,
    user_turns,
)
from specforge_lk.decode.draft import load_draft
from specforge_lk.decode.target import Target
from specforge_lk.evaluate.acceptance import ACCEPTANCE, Rule, of_sampled_token
from specforge_lk.evaluate.benchmarks import (
    Drafted,
    measure_benchmark,
    paired_benchmark_difference,
    pooled_tau,
)
from specforge_lk.evaluate.held_out import (
    ChainStarts,
    chain_starts,
    measure_held_out,
    paired_difference,
)
from specforge_lk.evaluate.intervals import bootstrap_ratio
from specforge_lk.evaluate.report import read_report
from specforge_lk.evaluate.runner import LoadedDraft, run
from specforge_lk.evaluate.settings import DraftSampling, Settings

HEADS = 3


@pytest.fixture(scope="module")
def target():
    return Target(build_model(), build_tokenizer())


def starts_of(alpha, conversation):
    alpha = np.asarray(alpha, dtype=np.float32)
    position = np.arange(len(alpha))
    return ChainStarts(np.asarray(conversation), position, alpha, np.ones_like(alpha))


def test_tau_is_pooled_over_drafted_tokens(target, tmp_path):
    assert pooled_tau(accepted=6, drafted=24, heads=4) == 2.0
    draft = load_draft(save_draft(tmp_path), target)
    fields, counts = measure_benchmark(
        target,
        draft,
        [["a short one"], ["another prompt, with a second turn", "go on"]],
        1.0,
        Settings(heads=HEADS, max_new_tokens=24, turns=2),
    )
    assert fields["tau"] == HEADS * fields["accepted"] / fields["drafted"] + 1
    assert fields["prompts"] == 2
    assert counts.prompt.tolist() == [0, 1]
    assert (counts.drafted.sum(), counts.accepted.sum()) == (fields["drafted"], fields["accepted"])
    assert fields["generated_tokens"] <= 3 * 24
    assert all(a is None or a <= 1 for a in fields["alpha_per_head"])


def test_benchmarks_are_not_decoded_by_a_rule_that_decoding_does_not_know(
    target, tmp_path, monkeypatch
):
    held_out_only = Rule(of_sampled_token, greedy_draft=None)
    rules = {**ACCEPTANCE, DraftSampling.GREEDY: held_out_only}
    monkeypatch.setattr("specforge_lk.evaluate.benchmarks.ACCEPTANCE", rules)
    draft = load_draft(save_draft(tmp_path), target)
    settings = Settings(heads=HEADS, draft_sampling=DraftSampling.GREEDY)
    with pytest.raises(ValueError, match="--draft-sampling greedy cannot be decoded"):
        measure_benchmark(target, draft, [["a short one"]], 1.0, settings)


def test_every_way_of_drafting_has_a_rule():
    assert ACCEPTANCE.keys() == set(DraftSampling)


def test_bootstrap_interval_covers_at_its_level():
    """A ratio of sums over clusters of unequal size; 95 % of the intervals hold the truth."""
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        size = rng.integers(5, 60, 80)
        rate = rng.beta(4, 6, 80)
        low, high = bootstrap_ratio(rng.binomial(size, rate).astype(float), size, seed)
        hits += low <= 0.4 <= high
    assert 0.90 <= hits / 200 <= 0.99


def test_paired_difference():
    rng = np.random.default_rng(0)
    conversation = np.repeat(np.arange(40), 25)
    base = rng.uniform(0.1, 0.8, (1000, 2))
    a = starts_of(base + 0.02, conversation)
    b = starts_of(base, conversation)
    difference, (low, high) = paired_difference(a, b)
    assert difference == pytest.approx(a.tau.mean() - b.tau.mean())
    assert low <= difference <= high
    # Pairing removes the variation that both drafts share: far narrower than either τ's interval.
    alone = bootstrap_ratio(np.bincount(conversation, a.tau), np.bincount(conversation), 0)
    assert low > 0 and high - low < 0.1 * (alone[1] - alone[0])
    # Dependent chain starts: had they been resampled singly, this interval would be narrower.
    shared = np.repeat(rng.normal(0, 0.02, 40), 25)[:, None]
    clustered = paired_difference(starts_of(base + shared, conversation), b)[1]
    single = paired_difference(
        starts_of(base + shared, np.arange(1000)), starts_of(base, np.arange(1000))
    )[1]
    assert clustered[1] - clustered[0] > 2 * (single[1] - single[0])


def test_benchmarks_are_paired_by_prompt(tmp_path):
    """Prompts differ far more than the drafts, in length and in acceptance."""
    rng = np.random.default_rng(0)
    drafted = rng.integers(40, 200, 60)
    rate = rng.beta(2, 5, 60)
    a = Drafted(np.arange(60), drafted, np.round(drafted * (rate + 0.02)))
    b = Drafted(np.arange(60), drafted, np.round(drafted * rate))
    difference, (low, high) = paired_benchmark_difference(a, b, heads=4)
    taus = [pooled_tau(d.accepted.sum(), d.drafted.sum(), 4) for d in (a, b)]
    assert difference == pytest.approx(taus[0] - taus[1])
    assert 0 < low < difference < high
    alone = bootstrap_ratio(a.accepted, a.drafted, 0)
    assert high - low < 0.1 * 4 * (alone[1] - alone[0])
    a.save(tmp_path / "a.npz")
    again = paired_benchmark_difference(Drafted.load(tmp_path / "a.npz"), b, heads=4)
    assert again == (difference, [low, high])
    with pytest.raises(ValueError, match="different prompts"):
        paired_benchmark_difference(a, Drafted(b.prompt + 1, b.drafted, b.accepted), heads=4)


def test_paired_difference_wants_the_same_chain_starts():
    a = starts_of([[0.5], [0.5]], [0, 1])
    with pytest.raises(ValueError, match="different chain starts"):
        paired_difference(a, starts_of([[0.5], [0.5]], [0, 2]))


def test_held_out_figures_do_not_depend_on_batching(target, tmp_path, monkeypatch):
    draft = load_draft(save_draft(tmp_path), target)
    generator = torch.Generator().manual_seed(3)
    conversations = [
        Tokens(torch.randint(264, (n,), generator=generator).tolist(), [0] * 3 + [1] * (n - 3))
        for n in (9, 12, 12, 20)
    ]
    results = []
    # All at once; and 12 * 12 * 2 attention scores, so that only the two of 12 tokens fit together.
    for scores in (1 << 22, 300):
        monkeypatch.setattr("specforge_lk.evaluate.held_out.SCORES", scores)
        settings = Settings(heads=HEADS)
        results.append(measure_held_out(target, [(draft, [1.0])], conversations, settings)[0][1.0])
    np.testing.assert_array_equal(results[0].position, results[1].position)
    np.testing.assert_allclose(results[0].alpha, results[1].alpha, atol=1e-5)


def test_chain_starts_need_every_position_supervised():
    response = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0, 1, 1]]).bool()
    # Tokens 2..6 are a response: with K = 3, t + 1 … t + 4 fit for t = 1 and t = 2 only.
    assert chain_starts(response, 3).nonzero()[:, 1].tolist() == [1, 2]


def test_expected_tau_is_the_definition(target, tmp_path, monkeypatch):
    """Against a loop over chain starts, with the cached draft and full-vocabulary vectors."""
    drafts = [load_draft(save_draft(tmp_path / str(s), seed=s), target) for s in range(2)]
    generator = torch.Generator().manual_seed(5)
    # Responses of tokens that both drafts can propose, so that they can draft them.
    both = drafts[0].draft_ids[torch.isin(drafts[0].draft_ids, drafts[1].draft_ids)]
    conversations = []
    for length in (11, 19):
        prompt = torch.randint(264, (5,), generator=generator)
        response = both[torch.randint(len(both), (length - 5,), generator=generator)]
        tokens = torch.cat([prompt, response]).tolist()
        conversations.append(Tokens(tokens, [int(i > 4) for i in range(length)]))
    for sampling in DraftSampling:
        settings = Settings(heads=HEADS, draft_sampling=sampling, batch_size=2)
        wanted = [(draft, [0.0, 0.7]) for draft in drafts]
        for draft, measured in zip(
            drafts, measure_held_out(target, wanted, conversations, settings), strict=True
        ):
            index = 0
            for number, conversation in enumerate(conversations):
                tokens = torch.tensor(conversation.input_ids)
                for t in range(4, len(conversation.input_ids) - HEADS - 1):
                    logits = chain_logits(target, draft, tokens, t, monkeypatch)
                    for temperature, starts in measured.items():
                        assert (starts.conversation[index], starts.position[index]) == (number, t)
                        alpha, coverage = by_hand(*logits, temperature, sampling)
                        np.testing.assert_allclose(starts.alpha[index], alpha, atol=1e-5)
                        np.testing.assert_allclose(starts.coverage[index], coverage, atol=1e-5)
                    index += 1
            for starts in measured.values():
                assert index == len(starts.position)
                product = np.cumprod(starts.alpha, 1)
                np.testing.assert_allclose(starts.tau, 1 + product.sum(1), rtol=1e-5)


@torch.inference_mode()
def chain_logits(target, draft, tokens, t, monkeypatch):
    """[K, V] each of one chain, target's and draft's, the latter -inf outside its vocabulary."""
    output = target.forward(tokens[None], layers=draft.capture_layers)
    p_logits = target.model(tokens[None]).logits[0, t + 1 : t + 1 + HEADS]
    draft.start(1, len(tokens))
    span = torch.arange(t + 1)[None]
    known = torch.ones_like(span).bool()
    draft.observe(tokens[1 : t + 2][None], output.features[:, : t + 1], span, known)
    chain = tokens[t + 2 : t + 2 + HEADS]
    # The draft takes the response's tokens, whatever its logits.
    choices = iter((draft.draft_ids == token).nonzero() for token in chain)
    monkeypatch.setattr("specforge_lk.decode.eagle3.choose", lambda *arguments: next(choices))
    proposal = draft.propose(HEADS, 1.0, False, None)
    assert proposal.tokens[0].tolist() == chain.tolist()
    q_logits = torch.full((HEADS, 264), float("-inf"))
    q_logits[:, draft.draft_ids] = proposal.logits[0]
    return p_logits, q_logits, draft.draft_ids


def by_hand(p_logits, q_logits, draft_ids, temperature, sampling):
    """α and coverage of every draft position of one chain, from full-vocabulary vectors."""
    hot = temperature or 1e-6
    p = torch.softmax(p_logits.double() / hot, -1)
    q = torch.softmax(q_logits.double() / hot, -1)
    if sampling == "greedy":
        q = torch.nn.functional.one_hot(q.argmax(-1), 264)
    return torch.minimum(p, q).sum(-1), p[:, draft_ids].sum(-1)


# Reading data


def test_prompts_come_from_the_usual_fields(tmp_path):
    assert user_turns({"question": "1 + 1?", "answer": "2"}, "f") == ["1 + 1?"]
    assert user_turns({"turns": ["a", "b"]}, "f") == ["a", "b"]
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        file.write('{"task_id": "0", "prompt": "def f():"}\n')
    (row,) = read_rows(str(tmp_path / "HumanEval.jsonl.gz"))
    assert user_turns(row, "f") == ["def f():"]
    with pytest.raises(DataError, match=r"\['text'\] has none of turns, prompt, question"):
        user_turns({"text": "x"}, "f")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\nnot json\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:2 is not JSON"):
        read_rows(str(tmp_path / "bad.jsonl"))


# The command


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    save_target(root / "target")
    for index, loss in enumerate(("kl", "lk_lambda")):
        save_draft(root / loss, seed=index)
    rows = [{"turns": [f"Tell me about {topic}.", "More."]} for topic in ("stars", "ants", "rain")]
    (root / "bench.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [
        {
            "id": str(i),
            "conversations": [
                {"role": "user", "content": f"Count to {i}."},
                {"role": "assistant", "content": " ".join(map(str, range(i)))},
            ],
        }
        for i in (8, 12, 15)
    ]
    (root / "held_out.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def arguments(root, out, *more):
    return [
        *("eval", "--target", str(root / "target"), "--out", str(out)),
        *("--draft", f"kl={root / 'kl'}", "--draft", f"lk_lambda@0={root / 'lk_lambda'}"),
        *("--benchmark", f"bench={root / 'bench.jsonl'}"),
        *("--held-out", str(root / "held_out.jsonl")),
        *("--temperature", "0", "--temperature", "1", "--heads", "3"),
        *("--max-new-tokens", "12", "--batch-size", "2", *more),
    ]


def test_command_writes_a_report_and_continues_it(files, tmp_path):
    out = tmp_path / "report.json"
    result = CliRunner().invoke(app, arguments(files, out))
    assert result.exit_code == 0, result.output
    report = read_report(out)
    assert len(report.results) == 2 * 2 * 2
    keys = {"algorithm", "loss", "seed", "temperature", "benchmark", "tau", "tau_ci"}
    keys |= {"tau_expected", "alpha_per_head", "coverage"}
    for entry in json.loads(out.read_text())["results"]:
        assert keys <= set(entry)
        assert entry["algorithm"] == "eagle3" and len(entry["alpha_per_head"]) == 3
        assert (entry["tau"] is None) == (entry["benchmark"] == "held_out")
    hot = {p.benchmark: p for p in report.paired if p.temperature == 1}
    assert len(report.paired) == 4 and hot.keys() == {"held_out", "bench"}
    for name, pair in hot.items():
        assert (pair.loss, pair.baseline) == ("lk_lambda", "kl")
        tau = {
            r.loss: r.tau_expected or r.tau
            for r in report.results
            if (r.benchmark, r.temperature) == (name, 1)
        }
        assert pair.difference == pytest.approx(tau["lk_lambda"] - tau["kl"])
        assert pair.ci[0] <= pair.difference <= pair.ci[1]
    assert hot["bench"].prompts == 3 and hot["held_out"].conversations == 3
    assert (tmp_path / "acceptance.png").stat().st_size > 10_000
    assert "| held-out (exact) | 1 | eagle3 kl |" in (tmp_path / "report.md").read_text()
    assert report.settings["heads"] == 3 and report.versions["torch"] == torch.__version__

    # Same settings: nothing is measured again. A changed draft: that one is.
    again = CliRunner().invoke(app, arguments(files, out))
    assert again.exit_code == 0
    assert read_report(out).results == report.results
    save_draft(files / "lk_lambda", seed=7)
    assert CliRunner().invoke(app, arguments(files, out)).exit_code == 0
    for new in read_report(out).results:
        assert (new in report.results) == (new.loss == "kl")


def test_held_out_figures_belong_to_the_tokens_that_end_a_response(files, tmp_path):
    path = str(files / "target")
    target = Target.load(path, torch.float32, "cpu")
    draft = LoadedDraft("kl", 0, str(files / "kl"), load_draft(files / "kl", target))
    fingerprints = []
    for ends in (target.tokenizer.eos_token_id, [target.tokenizer.eos_token_id, 7]):
        target.model.generation_config.eos_token_id = ends
        report = run(
            target,
            path,
            [draft],
            benchmarks={},
            held_out=str(files / "held_out.jsonl"),
            temperatures=[1.0],
            settings=Settings(heads=HEADS),
            out=tmp_path / "report.json",
            track=lambda what, total: ProgressBar(what, total, "tok/s"),
        )
        fingerprints += [result.fingerprint for result in report.results]
    assert len(fingerprints) == 2 == len(set(fingerprints))


def test_command_drafts_greedily_when_asked(files, tmp_path):
    out = tmp_path / "greedy.json"
    arguments_ = arguments(files, out, "--draft-sampling", "greedy", "--limit", "1")
    assert CliRunner().invoke(app, arguments_).exit_code == 0
    report = read_report(out)
    assert {r.draft_sampling for r in report.results} == {"greedy"}
    assert (tmp_path / "greedy.png").exists() and (tmp_path / "greedy.md").exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--draft", "nodir"], 2, "is not of the form LOSS=DIR"),
        (["--draft", "kl=elsewhere"], 2, "the same name"),
        (["--draft", "x=elsewhere"], 1, "draft elsewhere: no config.json"),
        (["--benchmark", "b=missing.jsonl"], 1, "missing.jsonl does not exist"),
        (["--target", "no/such/dir"], 1, "target 'no/such/dir' is no model folder"),
        (["--aux-layers", "1,2"], 1, "captured layers [1, 2] do not fit"),
        (["--heads", "200"], 1, "lower --heads"),
        (["--device", "nowhere"], 1, "--device nowhere cannot be used here"),
    ],
)
def test_command_errors_are_one_line(options, code, message, files, tmp_path):
    result = CliRunner().invoke(
        app, [*arguments(files, tmp_path / "report.json"), *options], env={"COLUMNS": "200"}
    )
    assert result.exit_code == code
    assert message in result.stderr
    assert isinstance(result.exception, SystemExit)  # nothing escaped as a traceback
