"""Captured features are those of a plain forward pass, under the names SpecForge reads."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import rounding
from specforge.application import resolve_run
from specforge.config import load_config
from specforge.data.prompt_builder import prepare_prompt_tasks
from tiny_target import HIDDEN_SIZE, VOCAB_SIZE, draft_config, forward_sums, save_target
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from specforge_lk.cli import app
from specforge_lk.data.conversations import Chat
from specforge_lk.data.vocabulary import coverage, vocabulary_mapping

#: Algorithm -> feature of the auxiliary layers, feature of the last hidden state.
FEATURES = {
    "peagle": ("aux_hidden_state", "hidden_state"),
    "eagle3": ("aux_hidden_state", "hidden_state"),
    "dflash": ("hidden_states", None),
    "domino": ("hidden_states", None),
    "dspark": ("hidden_states", "target_last_hidden_states"),
}
DRAFTS = {"dflash": "DFlashDraftModel", "domino": "DominoDraftModel", "dspark": "DSparkDraftModel"}
LAYERS = [1, 2, 4]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def responses(tmp_path: Path) -> Path:
    """Sampled ids of different lengths, one that did not finish; plain text; old rows and new."""

    def chat(user: str, assistant: str) -> list[dict]:
        return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]

    sampled = {"sampling": {"temperature": 1.0}}
    rows = [
        {
            "conversations": chat("a", "bc"),
            "finished": True,
            "response_ids": [30, 31, 2],
            **sampled,
        },
        {"conversations": chat("a" * 40, "b"), "finished": False, "response_ids": [40] * 20},
        {"conversations": chat("hello", "world") + chat("more", "text")},
        {"conversations": chat("a" * 9, "cut"), "finished": False},
    ]
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps({"id": i, **row}) + "\n" for i, row in enumerate(rows)))
    return path


def run_config(target: Path, directory: Path, algorithm: str = "eagle3") -> Path:
    if algorithm in ("eagle3", "peagle"):
        draft = draft_config(96, eagle_config={"eagle_aux_hidden_state_layer_ids": LAYERS})
        if algorithm == "peagle":
            draft["architectures"] = ["PEagleDraftModel"]
    else:
        draft = draft_config(0, architectures=[DRAFTS[algorithm]], model_type="qwen3")
        del draft["draft_vocab_size"]
        draft |= {"block_size": 4, "num_target_layers": 6}
        draft["dflash_config"] = {"target_layer_ids": LAYERS, "mask_token_id": 0}
    (directory / "draft.json").write_text(json.dumps(draft))
    config = {
        "model": {
            "target_model_path": str(target),
            "draft_model_config": str(directory / "draft.json"),
            "torch_dtype": "float32",
        },
        "data": {"hidden_states_path": str(directory / "features"), "max_length": 256},
        "training": {"strategy": algorithm, "attention_backend": "sdpa"},
    }
    (directory / "run.json").write_text(json.dumps(config))
    return directory / "run.json"


def invoke(config: Path, responses: Path, *more: str):
    paths = ["--config", str(config), "--responses", str(responses), "--device", "cpu"]
    return CliRunner().invoke(app, ["capture", *paths, *more])


def run(*args):
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    return result.output


def records(directory: Path) -> list[dict]:
    files = sorted((directory / "features").glob("*.ckpt"))
    return [torch.load(file, weights_only=True) for file in files]


@pytest.mark.parametrize("algorithm", [*FEATURES, "dflash with a loss"])
def test_features_equal_a_plain_forward(
    algorithm: str, target: Path, responses: Path, tmp_path: Path
):
    algorithm, _, with_loss = algorithm.partition(" with ")
    loss = ["training.loss=lk_lambda"] if with_loss else []
    run(run_config(target, tmp_path, algorithm), responses, *loss)
    model = AutoModelForCausalLM.from_pretrained(target).eval()
    tokenizer = AutoTokenizer.from_pretrained(target)
    # With a loss, what DFlash needs is what DSpark always needs.
    aux_name, last_name = FEATURES["dspark" if with_loss else algorithm]
    rows = [json.loads(line) for line in responses.read_text().splitlines()]
    for row, record in zip(rows, records(tmp_path), strict=True):
        (tokens,) = Chat(tokenizer, ()).tokenize(row)
        assert record["input_ids"].tolist() == tokens.input_ids
        assert record["loss_mask"].tolist() == tokens.loss_mask
        with torch.inference_mode():
            states = model(record["input_ids"][None], output_hidden_states=True)
        expected = torch.cat([states.hidden_states[k + 1] for k in LAYERS], dim=-1)
        # Rows are captured together, padded to one length: other sums than those of one row.
        sums = forward_sums(len(tokens.input_ids))
        close = rounding(expected, torch.float32, *sums)
        captured = record.pop(aux_name)
        torch.testing.assert_close(captured, expected, **close)
        other_position = (captured - expected.roll(1, dims=1)).abs().amax(-1)
        assert other_position.min() > 100 * close["atol"]
        if last_name:
            logits = model.lm_head(record.pop(last_name))
            close = rounding(states.logits, torch.float32, *sums, HIDDEN_SIZE)
            torch.testing.assert_close(logits, states.logits, **close)
        assert set(record) == {"input_ids", "loss_mask"}


def test_layers_of_which_sglang_takes_the_inputs(
    target: Path, responses: Path, tmp_path: Path
) -> None:
    """Of a DeepSeek the states would be others than those that an engine gives the draft."""
    other = Path(shutil.copytree(target, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps(config | {"architectures": ["Glm4MoeLiteForCausalLM"]})
    )
    for algorithm, layers in (("eagle3", [2, 3, 4]), ("peagle", [0, 1, 2])):
        path = run_config(other, tmp_path, algorithm)
        config = json.loads(path.read_text())
        config["model"]["aux_hidden_state_layer_ids"] = layers
        path.write_text(json.dumps(config))
        refused = invoke(path, responses)
        assert refused.exit_code == 1 and str(layers) in refused.output, refused.output
        assert "first is 1" in " ".join(refused.output.split())
    # Outputs in SGLang as well: first layer 1, and whatever the DFlash family names.
    run(run_config(other, tmp_path), responses)
    shutil.rmtree(tmp_path / "features")
    run(run_config(other, tmp_path, "dflash"), responses)


def test_rows_that_train_nothing_are_skipped_and_counted(target: Path, tmp_path: Path):
    """A response of one token, or cut to one: nothing is drafted there. SpecForge agrees."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    question, longer = [{"role": "user", "content": "a"}], [{"role": "user", "content": "a" * 20}]
    answer = {"role": "assistant", "content": "b"}
    rows = [
        {"conversations": [*question, answer], "response_ids": [2]},
        {"conversations": [*longer, answer], "response_ids": [30, 31, 2]},
        {"conversations": [*question, answer], "response_ids": [30, 2]},
    ]
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps({"id": i, **row}) + "\n" for i, row in enumerate(rows)))
    cut = len(Chat(tokenizer, ()).prompt_ids(longer)) + 1
    config = run_config(target, tmp_path)
    refused = invoke(config, path, f"data.max_length={cut}")
    assert refused.exit_code == 1 and "2 of 3 rows would be left out" in refused.output
    output = run(config, path, f"data.max_length={cut}", "--max-left-out", "0.7")
    assert f"1 samples (1 new, 1 cut to {cut} tokens, 2 skipped), 2 supervised tokens" in output

    model = resolve_run(load_config(str(config), ["training.loss=kl"])).algorithm.providers.model
    chat = Chat(tokenizer, ())
    masks = [tokens.loss_mask[:cut] for row in rows for tokens in chat.tokenize(row)]
    assert [model.loss_mask_filter(mask) for mask in masks] == [False, False, True]

    path.write_text(json.dumps(rows[0]) + "\n")
    refused = invoke(config, path, "--out", str(tmp_path / "none"), "--max-left-out", "1")
    assert refused.exit_code == 1 and "has nothing to train on" in refused.output


def test_specforge_reads_the_features(target: Path, responses: Path, tmp_path: Path):
    from specforge.algorithms.eagle3.data import build_offline_normalizer, build_offline_reader
    from specforge.runtime.data_plane.feature_store import load_feature_file

    run(run_config(target, tmp_path), responses, "model.torch_dtype=bfloat16")
    directory = tmp_path / "features"
    refs = list(build_offline_reader(str(directory), run_id="r", ttt_length=2, max_len=256))
    assert len(refs) == 4
    for ref in refs:
        raw = load_feature_file(ref.feature_store_uri.removeprefix("file://"))
        sample = build_offline_normalizer(256)(raw)
        length = sample["input_ids"].shape[1]
        assert sample["hidden_state"].shape == (1, length, 3 * 32)
        assert sample["target"].shape == (1, length, 32)
        assert sample["target"].dtype is torch.bfloat16
    # A batch's storage saved with every slice of it would multiply the files' size.
    sizes = [file.stat().st_size for file in directory.glob("*.ckpt")]
    assert min(sizes) < max(sizes) < 60_000


def test_loss_mask_is_the_assistant_with_its_end_of_turn(target: Path, responses: Path):
    tokenizer = AutoTokenizer.from_pretrained(target)
    end = tokenizer.eos_token_id
    supervised = []
    for row in map(json.loads, responses.read_text().splitlines()):
        (tokens,) = Chat(tokenizer, {end}).tokenize(row)
        pairs = zip(tokens.input_ids, tokens.loss_mask, strict=True)
        supervised.append([token for token, mask in pairs if mask])
    text = tokenizer.encode
    assert supervised[0] == [30, 31, end]
    assert supervised[1] == [40] * 20
    assert supervised[2] == [*text("world"), end, *text("text"), end]
    assert supervised[3] == text("cut")
    prompt = Chat(tokenizer, ()).prompt_ids([{"role": "user", "content": "a"}])
    rows = [json.loads(line) for line in responses.read_text().splitlines()]
    chat = Chat(tokenizer, {end})
    assert chat.tokenize(rows[0])[0].input_ids == [*prompt, 30, 31, end]
    # A generation config that does not name the tokenizer's end leaves it one.
    assert all(Chat(tokenizer, ()).tokenize(row) == chat.tokenize(row) for row in rows)


def test_a_turn_ends_where_the_target_stops(target: Path, responses: Path, tmp_path: Path):
    """Also where the tokenizer's end of sequence is another token, as in Gemma and Phi-4."""
    other = tmp_path / "other"
    shutil.copytree(target, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    end = tokenizer.eos_token_id
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(other)
    generation = {"eos_token_id": [tokenizer.eos_token_id, end]}
    (other / "generation_config.json").write_text(json.dumps(generation))
    found = []
    for path in (target, other):
        directory = tmp_path / f"of {path.name}"
        directory.mkdir()
        run(run_config(path, directory), responses)
        found.append(records(directory))
    for expected, record in zip(*found, strict=True):
        for name in ("input_ids", "loss_mask"):
            assert record[name].tolist() == expected[name].tolist()


def test_interrupted_capture_continues(target: Path, responses: Path, tmp_path: Path):
    config = run_config(target, tmp_path)
    assert "2 samples (2 new" in run(config, responses, "--limit", "2")
    files = [tmp_path / "features" / f"sample_{i:08d}.ckpt" for i in range(4)]
    kept = files[0].stat().st_mtime_ns
    files[1].write_bytes(files[1].read_bytes()[:500])
    assert "4 samples (3 new" in run(config, responses)
    assert files[0].stat().st_mtime_ns == kept
    assert all(file.exists() for file in files)
    assert "4 samples (0 new" in run(config, responses)
    result = invoke(config, responses, "data.max_length=200")
    assert result.exit_code == 1
    assert "max_length=256, not 200" in result.output


def test_features_say_what_their_responses_are_samples_of(
    target: Path, responses: Path, tmp_path: Path
):
    config, manifest = run_config(target, tmp_path), tmp_path / "features" / "capture.json"
    run(config, responses)
    before = json.loads(manifest.read_text())
    assert before["sampling"] == [{"temperature": 1.0}, None]  # one row says it, three do not
    # Those of an earlier version did not; captured again, they do.
    manifest.write_text(json.dumps({k: v for k, v in before.items() if k != "sampling"}))
    assert "(0 new" in run(config, responses)
    assert json.loads(manifest.read_text()) == before

    rows = responses.read_text().replace('"temperature": 1.0', '"temperature": "hot"')
    responses.write_text(rows)
    refused = invoke(config, responses)
    assert refused.exit_code == 1 and "row 0: the field 'sampling'" in refused.output


@pytest.mark.slow
def test_features_serve_every_run_that_reads_no_more(target: Path, responses: Path, tmp_path: Path):
    """P-EAGLE reads EAGLE-3's; DFlash's with a registered loss are its stock ones and more, and
    DSpark's.
    """
    run(run_config(target, tmp_path, "eagle3"), responses)
    assert "(0 new" in run(run_config(target, tmp_path, "peagle"), responses)

    block = tmp_path / "block"
    block.mkdir()
    config = run_config(target, block, "dflash")
    run(config, responses)
    with_loss = run(config, responses, "training.loss=lk_lambda")
    assert "(0 new" not in with_loss
    assert all("target_last_hidden_states" in record for record in records(block))
    assert "(0 new" in run(config, responses)
    assert all("target_last_hidden_states" in record for record in records(block))

    assert "(0 new" in run(run_config(target, block, "dspark"), responses)

    before = records(tmp_path)
    refused = invoke(config, responses, "--out", str(tmp_path / "features"))
    assert refused.exit_code == 1 and "holds other features" in refused.output
    assert [set(record) for record in records(tmp_path)] == [set(record) for record in before]


def test_long_rows_are_cut_and_unsupervised_ones_skipped(
    target: Path, responses: Path, tmp_path: Path
):
    # Only row 0 has two tokens of a response within 22.
    some = ("--max-left-out", "1")
    output = run(run_config(target, tmp_path), responses, "data.max_length=22", *some)
    assert "1 samples (1 new, 4 cut to 22 tokens, 3 skipped), 2 supervised tokens" in output
    (record,) = records(tmp_path)
    assert len(record["input_ids"]) == record["aux_hidden_state"].shape[1] == 22
    result = invoke(run_config(target, tmp_path), responses, "data.max_length=21", *some)
    assert result.exit_code == 1 and "data.max_length=21" in result.output


def test_mapping_is_written_and_specforge_can_load_it(
    target: Path, responses: Path, tmp_path: Path
):
    path = tmp_path / "maps" / "vocabulary.pt"
    output = run(run_config(target, tmp_path), responses, "--vocab-mapping", str(path))
    assert "draft vocabulary of 96 covers 100.0%" in output
    mapping = torch.load(path, weights_only=True)
    assert mapping["t2d"].shape == (VOCAB_SIZE,) and mapping["t2d"].dtype is torch.bool
    ids = torch.arange(96) + mapping["d2t"]
    assert mapping["t2d"].nonzero().flatten().tolist() == ids.tolist()

    # Drafts may have been trained with it: it is never replaced by another one.
    mapping["t2d"] = mapping["t2d"].roll(1)
    torch.save(mapping, path)
    before = path.read_bytes()
    result = invoke(run_config(target, tmp_path), responses, "--vocab-mapping", str(path))
    assert result.exit_code == 1 and "another draft vocabulary" in result.output
    assert path.read_bytes() == before

    result = invoke(
        run_config(target, tmp_path, "dflash"),
        responses,
        "--vocab-mapping",
        str(path),
        "--out",
        str(tmp_path / "other"),
    )
    assert result.exit_code == 1 and "leave out --vocab-mapping" in result.output


def test_streamed_runs_ask_for_the_tokens_that_features_have(
    target: Path, responses: Path, tmp_path: Path
):
    """Without the target's weights; of the conversations SpecForge would make other tokens."""
    config = run_config(target, tmp_path)
    run(config, responses)
    lean = tmp_path / "lean"
    shutil.copytree(target, lean, ignore=shutil.ignore_patterns("*.safetensors*"))
    run_settings = json.loads(config.read_text())
    run_settings["model"] |= {
        "target_model_path": str(lean),
        "vocab_mapping_path": str(tmp_path / "mapping.pt"),
    }
    run_settings["data"] = {"prompts_path": str(tmp_path / "tokens.jsonl"), "max_length": 256}
    run_settings["deployment"] = {
        "mode": "disaggregated",
        "disaggregated": {
            "control_dir": str(tmp_path / "control"),
            "backend": "mooncake",
            "server_urls": ["http://127.0.0.1:30000"],
            "mooncake_metadata_server": "http://127.0.0.1:35880/metadata",
            "mooncake_master_server_addr": "127.0.0.1:35551",
        },
    }
    config.write_text(json.dumps(run_settings))
    output = run(config, responses, "--vocab-mapping", str(tmp_path / "mapping.pt"))
    assert "4 samples (0 cut to 256 tokens, 0 skipped)" in output
    assert torch.load(tmp_path / "mapping.pt", weights_only=True)["d2t"].shape == (96,)
    tasks = prepare_prompt_tasks(
        run_settings["data"]["prompts_path"],
        tokenizer=None,
        # The one that cannot read an assistant's message.
        chat_template="gpt-oss",
        max_length=256,
        is_preformatted=False,
        train_only_last_turn=False,
        cache_dir=None,
        cache_key=None,
        num_proc=None,
    )
    for task, record in zip(tasks, records(tmp_path), strict=True):
        assert task["payload"]["input_ids"] == record["input_ids"].tolist()
        assert task["payload"]["loss_mask"] == record["loss_mask"].tolist()

    rows = [json.loads(line) for line in (tmp_path / "tokens.jsonl").read_text().splitlines()]
    assert [row.pop("sampling", None) for row in rows] == [{"temperature": 1.0}, None, None, None]
    # Earlier versions wrote the tokens alone.
    (tmp_path / "tokens.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(config, responses)
    assert "sampling" in (tmp_path / "tokens.jsonl").read_text()

    # SpecForge reads conversations from there, too: they must not be lost.
    run(config, responses)
    (tmp_path / "tokens.jsonl").write_text("{}")
    result = invoke(config, responses)
    assert result.exit_code == 1 and "tokens.jsonl holds something else" in result.output
    assert (tmp_path / "tokens.jsonl").read_text() == "{}"
    assert not list(tmp_path.glob(".tokens*"))

    del run_settings["data"]["prompts_path"]
    run_settings["data"]["train_data_path"] = str(responses)
    config.write_text(json.dumps(run_settings))
    result = invoke(config, responses)
    assert result.exit_code == 1 and "set data.prompts_path" in result.output


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.integers(0, 49), st.integers(1, 9), max_size=50), st.integers(1, 49))
def test_mapping_keeps_the_most_frequent_tokens(frequencies: dict[int, int], size: int):
    counts = Counter(frequencies)
    mapping = vocabulary_mapping(counts, size, 50)
    kept = (torch.arange(size) + mapping["d2t"]).tolist()
    assert kept == mapping["t2d"].nonzero().flatten().tolist()
    assert len(set(kept)) == size
    left_out = set(range(50)) - set(kept)
    assert min(counts[token] for token in kept) >= max(counts[token] for token in left_out)
    best = sum(sorted(counts.values(), reverse=True)[:size])
    assert coverage(mapping, counts) == (best / counts.total() if counts else 0.0)


def test_mapping_equals_that_of_specforge():
    from specforge.data.preprocessing import process_token_dict_to_mappings

    counts = Counter({token: 100 - token for token in range(0, 60, 3)})
    mapping = vocabulary_mapping(counts, 12, 64)
    d2t, t2d = process_token_dict_to_mappings(Counter(counts), 12, 64)
    assert torch.equal(mapping["d2t"], d2t) and torch.equal(mapping["t2d"], t2d)


def test_bad_input(target: Path, responses: Path, tmp_path: Path):
    config = run_config(target, tmp_path)
    row = {
        "conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]
    }
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({**row, "id": "x", "response_ids": [5, VOCAB_SIZE]}))
    for arguments, message in [
        ((config, tmp_path / "none.jsonl"), "none.jsonl does not exist"),
        ((tmp_path / "none.yaml", responses), "none.yaml does not exist"),
        ((config, other), f"token id {VOCAB_SIZE}, outside the target's vocabulary"),
        ((config, responses, "data.hidden_states_path="), "data.hidden_states_path (offline"),
        ((config, responses, f"model.target_model_path={tmp_path}/gone"), "is no model folder"),
        ((config, responses, "training.strategy=medusa3"), "medusa3"),
        ((config, responses, "model.nonsense=1"), "model.nonsense"),
    ]:
        result = invoke(*arguments)
        assert result.exit_code == 1 and message in result.output, result.output
        assert "Traceback" not in result.output
    assert not (tmp_path / "features").exists()
