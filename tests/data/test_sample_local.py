"""Generation samples the target's own distribution and survives being killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_target import build_model, build_tokenizer, save_target
from typer.testing import CliRunner

from specforge_lk.cli import app
from specforge_lk.data.conversations import Chat
from specforge_lk.data.jsonl import open_lines
from specforge_lk.data.responses import Request, prompt_ids_of, sampling_of
from specforge_lk.data.sample_local import _draw, sample_responses
from specforge_lk.decode.sampling import distribution
from specforge_lk.serving import Sampling

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"), layers=2)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"id": f"p{i}", "prompt": "word " * (1 + i % 5)} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(target: Path, prompts: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--max-new-tokens", "24", "--batch-size", "2", "--device", "cpu"]
    paths = ["--target", str(target), "--prompts", str(prompts), "--out", str(out)]
    return ["generate", *paths, *fixed, *more]


def run(*args: object) -> str:
    result = CliRunner().invoke(app, arguments(*args))
    assert result.exit_code == 0, result.output
    return result.output


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_first_tokens_follow_the_full_softmax():
    from scipy.stats import chisquare

    model, tokenizer = build_model(layers=2), build_tokenizer()
    prompts = [{"id": str(i), "prompt": "hi"} for i in range(4000)]
    request = Request(Sampling(0.7), max_new_tokens=1)
    drawn = torch.tensor(
        [row["response_ids"][0] for row in sample_responses(model, tokenizer, prompts, request)]
    )
    ids = Chat(tokenizer, ()).prompt_ids([{"role": "user", "content": "hi"}])
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1].double()
    expected = (logits / 0.7).softmax(-1) * len(prompts)
    common = expected >= 5
    observed = drawn.bincount(minlength=len(expected)).double()
    # Rare tokens are one class: chi-square needs a handful of expected counts in each.
    observed = torch.cat([observed[common], observed[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    assert common.sum() > 20
    assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3


def test_a_response_does_not_depend_on_its_batch():
    # In float64: a draw between two tokens is not to fall on the rounding of a batch's sums.
    model, tokenizer = build_model(layers=2).double(), build_tokenizer()
    # Likely end-of-turn tokens, so that rows leave the batch at different steps.
    model.generation_config.eos_token_id = list(range(2, 20))
    prompts = [{"id": f"p{i}", "prompt": "ab" * (1 + 3 * i)} for i in range(16)]
    request = Request(max_new_tokens=20)
    together = sample_responses(model, tokenizer, prompts, request)
    alone = [sample_responses(model, tokenizer, [prompt], request)[0] for prompt in prompts]
    assert together == alone
    assert len({len(row["response_ids"]) for row in together}) > 3
    for row in together:
        ends = [token in range(2, 20) for token in row["response_ids"]]
        assert not any(ends[:-1])
        assert ends[-1] == row["finished"]
        assert len(ends) == 20 or row["finished"]


def test_greedy_equals_transformers():
    model, tokenizer = build_model(layers=2).double(), build_tokenizer()
    (row,) = sample_responses(
        model, tokenizer, [{"id": "0", "prompt": "hello"}], Request(Sampling(0), max_new_tokens=12)
    )
    ids = Chat(tokenizer, ()).prompt_ids(row["conversations"][:1])
    expected = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)[0]
    (tokens,) = Chat(tokenizer, ()).tokenize(row)
    assert tokens.input_ids == expected.tolist()


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(0.5, top_k=3), Sampling(1.5, top_p=0.6), Sampling(1, top_k=5, top_p=0.8)],
    ids=str,
)
def test_the_uniforms_are_spread_over_the_tokens_as_the_distribution_says(sampling: Sampling):
    """Inverting the cumulative distribution on a grid of uniforms gives every token its share."""
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    cells = 20_000
    uniforms = torch.arange(cells, dtype=torch.float64) / cells
    drawn = _draw(logits.expand(cells, -1), sampling, uniforms)
    share = drawn.bincount(minlength=12) / cells
    expected = distribution(logits, sampling)[0]
    # A token's interval has two ends, each of which may fall on either side of a point.
    assert (share - expected).abs().max() <= 1.5 / cells
    assert ((share == 0) == (expected == 0)).all()
    # The largest uniform: rounding does not lead beyond the last token that has a probability.
    last = _draw(logits, sampling, torch.tensor([1 - 2**-53], dtype=torch.float64))
    assert last.item() == expected.nonzero().max().item()


def test_a_response_to_a_chat_is_sampled_from_its_last_turn():
    model, tokenizer = build_model(layers=2).double(), build_tokenizer()
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "why?"},
    ]
    greedy = Request(Sampling(0, top_k=5), max_new_tokens=12)
    (row,) = sample_responses(model, tokenizer, [{"id": "0", "messages": messages}], greedy)
    assert row["conversations"][:3] == messages and len(row["conversations"]) == 4
    ids = Chat(tokenizer, ()).prompt_ids(messages)
    assert len(prompt_ids_of(Chat(tokenizer, ()), {"id": "0", "messages": messages})) == len(ids)
    expected = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)[0]
    assert ids + row["response_ids"] == expected.tolist()
    assert row["sampling"] == {"temperature": 0} and sampling_of(row) == Sampling(0)


@pytest.mark.slow
def test_killed_run_continues_with_nothing_lost_or_doubled(
    target: Path, prompts: Path, tmp_path: Path
):
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    # The whole run would batch other rows together, and its sums would round otherwise.
    alone = ("--batch-size", "1")
    program = "from specforge_lk.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments(target, prompts, out, *alone)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not out.exists() or out.read_bytes().count(b"\n") < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = rows(out)
    assert 4 <= len(before) < 24
    with out.open("a") as stream:  # what a crash in the middle of a write leaves
        stream.write('{"id": "p23", "conversations": [{"role"')

    assert f"24 responses ({24 - len(before)} new" in run(target, prompts, out, *alone)
    run(target, prompts, whole, *alone)
    assert rows(out)[: len(before)] == before
    assert rows(out) == rows(whole)
    assert "(0 new" in run(target, prompts, out, *alone)


def test_responses_of_other_settings_or_prompts_are_refused(
    target: Path, prompts: Path, tmp_path: Path
):
    out = tmp_path / "out.jsonl"
    run(target, prompts, out, "--limit", "2")
    assert [row["sampling"] for row in rows(out)] == [{"temperature": 1.0}] * 2
    result = CliRunner().invoke(app, arguments(target, prompts, out, "--temperature", "0.5"))
    assert result.exit_code == 1 and "temperature=1.0, not 0.5" in result.output
    result = CliRunner().invoke(app, arguments(target, prompts, out, "--serving", "vllm,top_k=5"))
    assert result.exit_code == 1 and "top_k=None, not 5" in result.output
    prompts.write_text(json.dumps({"id": "p0", "prompt": "another question"}))
    result = CliRunner().invoke(app, arguments(target, prompts, out))
    assert result.exit_code == 1 and "'p0' belongs to another prompt" in result.output
    assert len(rows(out)) == 2
    (tmp_path / "out.jsonl.settings.json").unlink()
    result = CliRunner().invoke(app, arguments(target, prompts, out))
    assert result.exit_code == 1 and "settings.json is missing" in result.output


def test_two_processes_cannot_write_one_file(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    other = pytest.raises(ValueError, match="another process")
    with open_lines(path, {}), other, open_lines(path, {}):
        pass


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a"}', "no text in its field 'prompt'"),
        ('{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}', "occurs twice"),
        ("{", "prompts.jsonl:1 is not JSON"),
    ],
)
def test_bad_prompts(target: Path, prompts: Path, tmp_path: Path, line: str, message: str):
    prompts.write_text(line)
    result = CliRunner().invoke(app, arguments(target, prompts, tmp_path / "out.jsonl"))
    assert result.exit_code == 1 and message in result.output


def test_demo_prompts_are_distinct_and_split():
    from experiments.prompts import split

    train, held_out = split("train"), split("held_out")
    texts = [row["prompt"] for row in train + held_out]
    assert len(set(texts)) == len(texts) == len({row["id"] for row in train + held_out})
    assert (len(train), len(held_out)) == (987, 109)
