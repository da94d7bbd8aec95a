"""`specforge-lk eval` end to end, acceptance against the definition, paired intervals."""

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
from specforge_lk.evaluate.acceptance import RULES
from specforge_lk.evaluate.asked import Asked
from specforge_lk.evaluate.intervals import bootstrap_ratio
from specforge_lk.evaluate.report import read_report
from specforge_lk.evaluate.runner import LoadedDraft, run
from specforge_lk.evaluate.sampled import Decoded, decode_benchmark, paired_decoded_difference
from specforge_lk.evaluate.settings import Settings
from specforge_lk.evaluate.teacher_forced import measure_responses
from specforge_lk.serving import Drafting, Sampling, Serving, Verification, parse

HEADS = 3


@pytest.fixture(scope="module")
def target():
    return Target(build_model(), build_tokenizer())


def test_decoding_counts_rounds_and_drafted_tokens(target, tmp_path):
    draft = load_draft(save_draft(tmp_path), target)
    fields, counts = decode_benchmark(
        target,
        draft,
        [["a short one"], ["another prompt, with a second turn", "go on"]],
        Serving(1.0),
        Settings(heads=HEADS, max_new_tokens=24, turns=2),
    )
    assert fields["tau"] == HEADS * fields["accepted"] / fields["drafted"] + 1
    assert fields["tau_rounds"] == counts.tokens.sum() / fields["rounds"]
    assert fields["prompts"] == 2
    assert counts.prompt.tolist() == [0, 1]
    assert counts.tokens.sum() == fields["generated_tokens"] - 3 <= 3 * 23
    assert all(a is None or a <= 1 for a in fields["alpha_per_head"])


def test_every_rule_can_be_measured():
    combinations = [
        (drafting, verification) for drafting in Drafting for verification in Verification
    ]
    rules = [Serving(drafting=d, verification=v) for d, v in combinations]
    assert {(rule.drafting, rule.verification) for rule in rules} == RULES.keys()


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


def test_benchmarks_are_paired_by_prompt(tmp_path):
    """Prompts differ far more than the drafts, in length and in acceptance."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(40, 200, 60)
    tau = 1 + 4 * rng.beta(2, 5, 60)
    a = Decoded(np.arange(60), tokens, np.round(tokens / (tau + 0.05)))
    b = Decoded(np.arange(60), tokens, np.round(tokens / tau))
    difference, (low, high) = paired_decoded_difference(a, b)
    assert difference == pytest.approx(
        tokens.sum() / a.rounds.sum() - tokens.sum() / b.rounds.sum()
    )
    assert 0 < low < difference < high
    alone = bootstrap_ratio(a.tokens, a.rounds, 0)
    assert high - low < 0.2 * (alone[1] - alone[0])
    a.save(tmp_path / "a.npz")
    again = paired_decoded_difference(Decoded.load(tmp_path / "a.npz"), b)
    assert again == (difference, [low, high])
    with pytest.raises(ValueError, match="different prompts"):
        paired_decoded_difference(a, Decoded(b.prompt + 1, b.tokens, b.rounds))


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
        monkeypatch.setattr("specforge_lk.evaluate.teacher_forced.SCORES", scores)
        settings = Settings(heads=HEADS)
        rule = Serving(1.0)
        results.append(
            measure_responses(target, [(draft, [rule])], conversations, settings)[0][rule]
        )
    np.testing.assert_array_equal(results[0].length, results[1].length)
    np.testing.assert_array_equal(results[0].length, [6, 9, 9, 17])
    np.testing.assert_allclose(results[0].alpha, results[1].alpha, atol=1e-5)
    np.testing.assert_allclose(results[0].past, results[1].past, atol=1e-5)


def test_acceptance_is_the_definition(target, tmp_path, monkeypatch):
    """Against a loop over chain starts, with the cached draft and full-vocabulary vectors."""
    drafts = [load_draft(save_draft(tmp_path / str(s), seed=s), target) for s in range(2)]
    generator = torch.Generator().manual_seed(5)
    # Responses of tokens that both drafts can propose, so that they can draft them.
    both = drafts[0].draft_ids[torch.isin(drafts[0].draft_ids, drafts[1].draft_ids)]
    conversations = []
    for length in (11, 15):
        prompt = torch.randint(264, (5,), generator=generator)
        response = both[torch.randint(len(both), (length - 5,), generator=generator)]
        tokens = torch.cat([prompt, response]).tolist()
        conversations.append(Tokens(tokens, [int(i > 4) for i in range(length)]))
    rules = [
        parse(text)
        for text in (
            "temperature=0",
            "temperature=0.7",
            "temperature=0.7,drafting=greedy",
            "temperature=0.9,top_k=100,draft_temperature=0.5",
            "temperature=0.7,verification=block",
        )
    ]
    wanted = [(draft, rules) for draft in drafts]
    settings = Settings(heads=HEADS, batch_size=2)
    for draft, measured in zip(
        drafts, measure_responses(target, wanted, conversations, settings), strict=True
    ):
        index = 0
        for conversation in conversations:
            tokens = torch.tensor(conversation.input_ids)
            for t in range(4, len(tokens) - 2):
                left = min(HEADS, len(tokens) - t - 2)
                logits = chain_logits(target, draft, tokens, t, left, monkeypatch)
                for rule, rounds in measured.items():
                    by = by_hand(*logits, tokens[t + 2 : t + 2 + left], draft.draft_ids, rule)
                    alpha, past, coverage = by
                    np.testing.assert_allclose(rounds.alpha[index, :left], alpha, atol=1e-5)
                    np.testing.assert_allclose(rounds.past[index, :left], past, atol=1e-5)
                    np.testing.assert_allclose(rounds.coverage[index], coverage, atol=1e-5)
                    assert not rounds.alpha[index, left:].any()
                    assert not rounds.past[index, left:].any()
                index += 1
        assert all(index == len(rounds.alpha) for rounds in measured.values())


@torch.inference_mode()
def chain_logits(target, draft, tokens, t, count, monkeypatch):
    """[K, V] each of one chain, target's and draft's, the latter -inf outside its vocabulary."""
    output = target.forward(tokens[None], layers=draft.capture_layers)
    p_logits = target.model(tokens[None]).logits[0, t + 1 : t + 1 + count]
    draft.start(1, len(tokens) + HEADS)
    span = torch.arange(t + 1)[None]
    known = torch.ones_like(span).bool()
    draft.observe(tokens[1 : t + 2][None], output.features[:, : t + 1], span, known)
    chain = tokens[t + 2 : t + 2 + count]
    # The draft takes the response's tokens, whatever its logits.
    choices = iter((draft.draft_ids == token).nonzero() for token in chain)
    monkeypatch.setattr("specforge_lk.decode.eagle3.choose", lambda *arguments: next(choices))
    proposal = draft.propose(count, Sampling(1), None)
    assert proposal.tokens[0].tolist() == chain.tolist()
    q_logits = torch.full((count, 264), float("-inf"))
    q_logits[:, draft.draft_ids] = proposal.logits[0]
    return p_logits, q_logits


def by_hand(p_logits, q_logits, tokens, draft_ids, rule):
    """alpha and past of every draft position of one chain, and coverage of the first."""
    p = torch.softmax(p_logits.double() / (rule.temperature or 1e-6), -1)
    if rule.top_k:
        p = torch.where(p >= p.topk(rule.top_k).values[:, -1:], p, 0.0)
        p /= p.sum(-1, keepdim=True)
    q = torch.softmax(q_logits.double() / (rule.draft.temperature or 1e-6), -1)
    if rule.greedy_draft:
        q = torch.nn.functional.one_hot(q.argmax(-1), 264).double()
    alphas, pasts, weight = [], [], 1.0
    for p_row, q_row, token in zip(p, q, tokens, strict=True):
        scale = weight if rule.verification is Verification.BLOCK else 1.0
        alphas.append(torch.minimum(scale * p_row, q_row).sum() / scale)
        if rule.temperature == 0:  # the response's token stands for the target's
            pasts.append(q_row[token])
        else:
            pasts.append((q_row[token] / (scale * p_row[token])).clamp(max=1).nan_to_num())
        weight = min(1.0, weight * float(p_row[token] / q_row[token]))
    return torch.stack(alphas), torch.stack(pasts), p[0, draft_ids].sum()


# Reading data


def test_prompts_come_from_the_usual_fields(tmp_path):
    assert user_turns({"question": "1 + 1?", "answer": "2"}, "f") == ["1 + 1?"]
    assert user_turns({"turns": ["a", "b"]}, "f") == ["a", "b"]
    # MT-bench's rows have the first turn twice.
    assert user_turns({"turns": ["a", "b"], "prompt": "a"}, "f") == ["a", "b"]
    with pytest.raises(DataError, match="f: its fields 'turns' and 'prompt' differ; remove one"):
        user_turns({"turns": ["a", "b"], "prompt": "b"}, "f")
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
            "sampling": {"temperature": t},
        }
        for t in (0, 1)
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


@pytest.mark.slow
def test_command_writes_a_report_and_continues_it(files, tmp_path):
    out = tmp_path / "report.json"
    result = CliRunner().invoke(app, arguments(files, out, "--sampled"))
    assert result.exit_code == 0, result.output
    # The target did not sample these held-out responses, and that shows at temperature 0.
    assert "held_out: 100.0 % of the tokens have no probability" in " ".join(result.output.split())
    report = read_report(out)
    assert len(report.results) == 2 * 2 * 3
    keys = {"algorithm", "loss", "seed", "temperature", "benchmark", "serving", "method"}
    keys |= {"tau_rounds", "tau_rounds_ci", "alpha_per_head", "survival_per_head", "coverage"}
    for entry in json.loads(out.read_text())["results"]:
        assert keys <= set(entry)
        assert entry["algorithm"] == "eagle3" and len(entry["alpha_per_head"]) == 3
        assert (entry["tau"] is None) == (entry["method"] == "exact")
    hot = {(p.benchmark, p.method): p for p in report.paired if p.temperature == 1}
    assert len(report.paired) == 6
    assert hot.keys() == {("held_out", "exact"), ("bench", "exact"), ("bench", "sampled")}
    for (name, method), pair in hot.items():
        assert (pair.loss, pair.baseline) == ("lk_lambda", "kl")
        tau = {
            r.loss: r.tau_rounds
            for r in report.results
            if (r.benchmark, r.method, r.temperature) == (name, method, 1)
        }
        assert pair.difference == pytest.approx(tau["lk_lambda"] - tau["kl"])
        assert pair.ci[0] <= pair.difference <= pair.ci[1]
    assert hot["bench", "sampled"].prompts == 3 and hot["held_out", "exact"].conversations == 3
    assert (tmp_path / "acceptance.png").stat().st_size > 10_000
    assert "| held-out | 1 | eagle3 kl | exact |" in (tmp_path / "report.md").read_text()
    assert report.settings["heads"] == 3 and report.versions["torch"] == torch.__version__

    # Same settings: nothing is measured again. A changed draft: that one is.
    again = CliRunner().invoke(app, arguments(files, out, "--sampled"))
    assert again.exit_code == 0
    assert read_report(out).results == report.results
    save_draft(files / "lk_lambda", seed=7)
    assert CliRunner().invoke(app, arguments(files, out, "--sampled")).exit_code == 0
    for new in read_report(out).results:
        assert (new in report.results) == (new.loss == "kl")
    # A run with one draft leaves the pairs of both, unless the draft has changed.
    pairs = read_report(out).paired
    alone = arguments(files, out)
    other = alone.index(f"lk_lambda@0={files / 'lk_lambda'}")
    del alone[other - 1 : other + 1]
    assert CliRunner().invoke(app, alone).exit_code == 0
    assert read_report(out).paired == pairs and len(pairs) == 6
    save_draft(files / "kl", seed=8)
    assert CliRunner().invoke(app, alone).exit_code == 0
    # What the draft of before decoded is no partner of what this one would.
    assert not read_report(out).paired
    assert {r.loss for r in read_report(out).results if r.method == "sampled"} == {"lk_lambda"}


def test_a_target_changed_in_place_answers_anew(files, tmp_path):
    save_target(tmp_path / "target")
    some = ["--target", str(tmp_path / "target"), "--temperature", "0"]
    out = tmp_path / "report.json"
    assert CliRunner().invoke(app, arguments(files, out, *some)).exit_code == 0
    save_target(tmp_path / "target", seed=1)
    assert CliRunner().invoke(app, arguments(files, out, *some)).exit_code == 0
    results = [r for r in read_report(out).results if r.benchmark == "bench"]
    assert {r.off_rule_tokens for r in results} == {0}


@pytest.mark.slow
@pytest.mark.parametrize("length", ["140", "2048"])
def test_turns_are_answered_alike_by_both_methods(length, files, tmp_path):
    """With 140 tokens, second turns are too long."""
    out = tmp_path / "report.json"
    more = ("--sampled", "--turns", "2", "--max-new-tokens", "40", "--temperature", "0")
    more += ("--max-length", length)
    assert CliRunner().invoke(app, arguments(files, out, *more)).exit_code == 0
    counts = {
        (r.loss, r.method): (r.rounds, r.tau_rounds, r.generated_tokens, r.prompts, r.skipped)
        for r in read_report(out).results
        if r.temperature == 0 and r.benchmark == "bench"
    }
    assert len(counts) == 4
    for loss in ("kl", "lk_lambda"):
        assert counts[loss, "exact"] == counts[loss, "sampled"]
        assert (counts[loss, "exact"][-1] > 0) == (length == "140")


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
            Asked({}, [str(files / "held_out.jsonl")], [Serving(1.0)]),
            settings=Settings(heads=HEADS),
            out=tmp_path / "report.json",
            track=lambda what, total: ProgressBar(what, total, "tok/s"),
        )
        fingerprints += [result.fingerprint for result in report.results]
    assert len(fingerprints) == 2 == len(set(fingerprints))


def test_rules_are_measured_along_samples_of_them(files, tmp_path):
    def measure(*options):
        out = tmp_path / "rules.json"
        some = [
            *("eval", "--target", str(files / "target"), "--draft", f"kl={files / 'kl'}"),
            *("--out", str(out), "--heads", "3", "--held-out", str(files / "held_out.jsonl")),
        ]
        result = CliRunner().invoke(app, [*some, *options], env={"COLUMNS": "200"})
        return result, read_report(out) if out.exists() else None

    # Without a rule, those that the responses are samples of.
    _, report = measure()
    assert {r.serving: r.responses for r in report.results} == {
        "temperature=0": 3,
        "temperature=1": 3,
    }
    _, report = measure("--serving", "vllm", "--serving", "verification=block")
    assert {r.serving for r in report.results} > {"temperature=1,drafting=greedy"}
    assert (tmp_path / "rules.png").exists() and (tmp_path / "rules.md").exists()
    _, report = measure("--serving", "vllm-probabilistic,top_p=0.9", "--temperature", "0")
    assert report.settings["serving"] == "temperature=0"
    refused, _ = measure("--serving", "vllm,temperature=0", "--temperature", "1")
    assert refused.exit_code == 2 and "has temperature twice" in refused.stderr
    refused, _ = measure("--serving", "temperature=0.7,top_p=0.9")
    assert refused.exit_code == 1
    assert "generate" in refused.stderr and "--temperature 0.7 --top-p 0.9" in refused.stderr
    _, report = measure("--serving", "temperature=0.7,top_p=0.9", "--off-policy")
    (result,) = [r for r in report.results if r.off_policy]
    assert result.off_policy == "temperature=0; temperature=1" and result.responses == 6
    markdown = (tmp_path / "rules.md").read_text()
    assert "| held-out, of responses at temperature=0; temperature=1 |" in markdown
    assert "**Off policy**: held-out figures under `temperature=0.7,top_p=0.9`" in markdown

    old = tmp_path / "old.jsonl"
    rows = [json.loads(line) for line in (files / "held_out.jsonl").read_text().splitlines()]
    old.write_text("\n".join(json.dumps({**row, "sampling": None}) for row in rows))
    refused, _ = measure("--held-out", str(old), "--serving", "temperature=0.5")
    assert "--sampled-by temperature=0.5" in refused.stderr
    _, report = measure(
        "--held-out", str(old), "--serving", "temperature=0.5", "--sampled-by", "temperature=0.5"
    )
    assert report.results[-1].responses == 6


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--draft", "nodir"], 2, "is not of the form LOSS=DIR"),
        (["--draft", "kl=elsewhere"], 2, "the same name"),
        (["--draft", "x=elsewhere"], 1, "draft elsewhere is no folder"),
        (["--benchmark", "b=missing.jsonl"], 1, "missing.jsonl does not exist"),
        (["--target", "no/such/dir"], 1, "target 'no/such/dir' is no model folder"),
        (["--aux-layers", "1,2"], 1, "captured layers [1, 2] are not 3"),
        (["--heads", "600"], 1, "lower --heads"),
        (["--serving", "fast"], 2, "is no serving rule"),
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
