"""Defects planted one at a time in a draft that knows its target exactly; and none in it."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from exact_draft import LAYERS, build_chain, sampled_rows, save_exact_draft
from safetensors.torch import load_file, save_file
from tiny_target import build_tokenizer
from typer.testing import CliRunner

from specforge_lk.cli import app
from specforge_lk.data.conversations import Chat
from specforge_lk.decode.target import Target
from specforge_lk.doctor.checks import CHECKS

PROBABILISTIC = "vllm-probabilistic"


@dataclass(frozen=True)
class World:
    """A target, its responses, and a folder to put drafts in."""

    target: Target
    folder: Path
    held_out: Path
    tmp: Path

    def draft(self, **settings) -> Path:
        return save_exact_draft(self.tmp / "draft", self.target, **settings)

    def examine(self, draft: Path, *options: object, serving: str = PROBABILISTIC):
        """The exit code, the report, and the findings by check."""
        out = self.tmp / "report.json"
        arguments = ["--target", self.folder, "--draft", draft, "--serving", serving]
        arguments += ["--held-out", self.held_out, "--heads", 3, "--device", "cpu", "--out", out]
        result = CliRunner().invoke(app, ["doctor", *map(str, [*arguments, *options])])
        assert isinstance(result.exception, SystemExit | None), result.exception
        assert out.exists(), result.output
        report = json.loads(out.read_text())
        found = {o["check"]: o["findings"] for o in report["outcomes"] if o["findings"]}
        return result.exit_code, report, found

    def held_out_of(self, rows) -> Path:
        path = self.tmp / "responses.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def file(self, name: str, content: object) -> Path:
        path = self.tmp / name
        path.write_text(json.dumps(content))
        return path


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    root = tmp_path_factory.mktemp("doctor")
    target = build_chain(root / "target")
    rows = sampled_rows(target, 8)
    (root / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target, root


@pytest.fixture
def world(shared, tmp_path):
    target, root = shared
    return World(target, root / "target", root / "held_out.jsonl", tmp_path)


def features(world: World, cut: int = 0, system: str = "", shift: int = 0, **manifest) -> Path:
    """Feature files as capture writes them; the loss masks may be moved, the beginnings other."""
    folder = world.tmp / "features"
    folder.mkdir()
    tokenizer = build_tokenizer()
    for index, line in enumerate(world.held_out.read_text().splitlines()):
        row = json.loads(line)
        messages = row["conversations"][:1]
        if system:
            messages = [{"role": "system", "content": system}, *messages]
        prompt = Chat(tokenizer, ()).prompt_ids(messages)
        ids = prompt + row["response_ids"] + [2]
        mask = [0] * (len(prompt) + shift) + [1] * (len(row["response_ids"]) + 1 - shift)
        if cut:
            mask[-cut:] = [0] * cut
        record = {"input_ids": torch.tensor(ids), "loss_mask": torch.tensor(mask)}
        torch.save(record, folder / f"sample_{index:08d}.ckpt")
    (folder / "capture.json").write_text(json.dumps({"layers": list(LAYERS), **manifest}))
    return folder


def mapping(world: World, ids: torch.Tensor) -> Path:
    path = world.tmp / "vocab_mapping.pt"
    t2d = torch.zeros(world.target.vocab_size, dtype=torch.bool)
    t2d[ids] = True
    torch.save({"d2t": ids - torch.arange(len(ids)), "t2d": t2d}, path)
    return path


def config(world: World, data: dict | None = None, **model) -> Path:
    model = {"target_head_dtype": "float32", "torch_dtype": "float32", **model}
    return world.file("run.json", {"model": model, "data": data or {}})


def ids_of(draft: Path) -> torch.Tensor:
    offsets = load_file(draft / "model.safetensors")["d2t"]
    return offsets + torch.arange(len(offsets))


def change(draft: Path, **tensors) -> None:
    held = load_file(draft / "model.safetensors")
    for name, tensor in tensors.items():
        held[name.replace("__", ".")] = tensor
    save_file(held, draft / "model.safetensors")


def test_a_sound_draft_has_no_finding(world):
    """With everything that can be given, its engine's counts among them."""
    draft = world.draft()
    written = json.loads((draft / "config.json").read_text())
    run = config(
        world,
        vocab_mapping_path=str(mapping(world, ids_of(draft))),
        target_head_dtype=None,
        draft_model_config=str(world.file("draft.json", written)),
    )
    trained = features(world, stored_dtype="bfloat16", max_length=512)
    given = ["--config", run, "--features", trained]
    code, report, found = world.examine(draft, *given)
    assert (code, found, report["wrong"]) == (0, {}, False)
    states = {o["check"]: o["state"] for o in report["outcomes"]}
    unchecked = [name for name, state in states.items() if state == "not checked"]
    assert unchecked == ["the engine's counts"]
    # Every step goes on until the chain leaves its usual way: below 1 + K, well above 1.
    tau = report["expected"]["tau"]
    assert 2.5 < tau < 4 and report["expected"]["responses"] == 8
    counts = {"drafts": 10**6, "accepted_tokens": round((tau - 1) * 10**6)}
    code, report, found = world.examine(
        draft, *given, "--accepted", world.file("counts.json", counts)
    )
    assert (code, found, report["observed"]["within"]) == (0, {}, True)


def test_what_is_not_given_is_not_checked(world):
    result = CliRunner().invoke(
        app,
        ["doctor", "--target", str(world.folder), "--draft", str(world.draft()), "--device", "cpu"],
    )
    assert result.exit_code == 0
    assert "give --held-out" in result.output and "give --features" in result.output
    assert "τ to expect: not measured" in result.output


LOWER = [layer - 1 for layer in LAYERS]
HIGHER = [layer + 1 for layer in LAYERS]


@pytest.mark.parametrize("named", [LOWER, HIGHER])
def test_layers_counted_from_another_number(named, world):
    settings = {
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": named},
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in named],
    }
    code, report, found = world.examine(world.draft(**settings))
    (finding,) = found["captured layers, off by one"]
    assert code == 1 and list(found) == ["captured layers, off by one"]
    assert finding["trained"] == "layers 1, 2, 4, counted from 0"
    assert finding["cost"]["tau"] > 0.5 and finding["weight"] == "costs"
    assert finding["cost"]["served"] == pytest.approx(report["expected"]["tau"])
    # With features, the training's layers are known.
    code, report, found = world.examine(world.draft(**settings), "--features", features(world))
    assert code == 1 and list(found) == ["captured layers"]
    assert found["captured layers"][0]["cost"] == finding["cost"]


def test_a_stock_export_is_served_one_layer_too_low_by_vllm(world):
    draft = world.draft(eagle_aux_hidden_state_layer_ids=None)
    code, _, found = world.examine(draft)
    (finding,) = found["captured layers"]
    assert code == 1 and finding["served"] == "layers 0, 1, 3" and finding["cost"]["tau"] > 0.5
    assert world.examine(draft, serving="sglang-rejection-sampling")[0] == 0
    # No engine is named: both are looked at, and the draft is measured as it loads here.
    code, report, found = world.examine(draft, serving="temperature=1")
    assert (code, list(found)) == (1, ["captured layers"])
    assert report["expected"]["tau"] == pytest.approx(finding["cost"]["remedied"])


def test_layers_named_twice_and_differently(world):
    draft = world.draft(eagle_aux_hidden_state_layer_ids=list(LAYERS))
    code, _, found = world.examine(draft, "--features", features(world))
    assert code == 1 and list(found) == ["captured layers"]
    assert found["captured layers"][0]["cost"]["tau"] > 0.5


def test_vocabulary_mapping(world):
    draft = world.draft()
    ids = ids_of(draft)
    shuffled = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    change(draft, d2t=shuffled - torch.arange(len(ids)))
    code, _, found = world.examine(draft)
    assert code == 1 and {"order of the vocabulary"} <= set(found)
    (finding,) = found["order of the vocabulary"]
    assert finding["cost"]["tau"] > 1 and "ascending" in finding["trained"]
    run = config(world, vocab_mapping_path=str(mapping(world, ids)))
    _, _, found = world.examine(draft, "--config", run)
    assert found["vocabulary mapping"][0]["cost"] == finding["cost"]


def test_a_stale_vocabulary_mapping(world):
    """Another vocabulary in ascending order: only the run config tells which."""
    draft = world.draft()
    ids = ids_of(draft)
    stale = ids + 1
    t2d = torch.zeros(world.target.vocab_size, dtype=torch.bool)
    t2d[stale] = True
    change(draft, d2t=stale - torch.arange(len(ids)), t2d=t2d)
    code, _, found = world.examine(draft)
    assert code == 1 and list(found) == ["better than frequencies"]
    run = config(world, vocab_mapping_path=str(mapping(world, ids)))
    _, _, found = world.examine(draft, "--config", run)
    (finding,) = found["vocabulary mapping"]
    assert finding["cost"]["tau"] > 1 and "vocab_mapping.pt" in finding["trained"]


def test_coverage_of_the_vocabulary(world):
    code, _, found = world.examine(world.draft(skipped=6))
    (finding,) = found["coverage of the vocabulary"]
    assert code == 1 and list(found) == ["coverage of the vocabulary"]
    assert finding["cost"] is None and "no draft with more tokens was measured" in finding["caveat"]


def test_a_draft_of_nothing(world):
    draft = world.draft()
    change(draft, fc__weight=torch.zeros_like(load_file(draft / "model.safetensors")["fc.weight"]))
    code, _, found = world.examine(draft)
    assert code == 1 and list(found) == ["better than frequencies"]
    assert found["better than frequencies"][0]["cost"] is None


@pytest.mark.parametrize(
    ("setting", "check"),
    [
        ({"norm_before_residual": True}, "norm before the residual"),
        ({"norm_output": True}, "output norm"),
    ],
)
def test_order_of_norms(setting, check, world):
    code, _, found = world.examine(world.draft(**setting))
    assert code == 1 and list(found) == [check]
    assert found[check][0]["cost"]["tau"] > 0.3


def test_rotary_of_the_training(world):
    """This draft's attention adds nothing: the difference is named, and costs nothing."""
    draft = world.draft()
    written = json.loads((draft / "config.json").read_text()) | {"rope_theta": 5e5}
    run = config(world, draft_model_config=str(world.file("draft.json", written)))
    code, _, found = world.examine(draft, "--config", run)
    (finding,) = found["rotary base and scaling"]
    assert code == 0 and finding["weight"] == "harmless" and "500000" in finding["trained"]
    assert finding["cost"]["tau"] == 0


def test_chat_template(world):
    """This target and its draft read one token back, so that the system prompt costs nothing."""
    trained = features(world, system="Be brief.")
    code, _, found = world.examine(world.draft(), "--features", trained)
    (finding,) = found["chat template"]
    assert code == 0 and "Be brief." in finding["trained"] and "system" not in finding["served"]
    assert finding["cost"]["tau"] == pytest.approx(0, abs=1e-4)


def test_system_prompt_of_specforge(world):
    run = config(world, data={"train_data_path": "train.jsonl", "chat_template": "qwen"})
    code, _, found = world.examine(world.draft(), "--config", run)
    (finding,) = found["system prompt"]
    assert code == 0 and finding["trained"] == "'You are a helpful assistant.'"


@pytest.mark.parametrize(
    ("moved", "what"),
    [
        ({"shift": 1}, "8 of 8 responses begin +1 tokens from there in the loss mask"),
        ({"shift": -1}, "8 of 8 responses begin -1 tokens from there in the loss mask"),
        ({"cut": 1}, "8 of 8 loss masks end before the end-of-turn token"),
    ],
)
def test_supervised_positions(moved, what, world):
    trained = features(world, **moved)
    code, _, found = world.examine(world.draft(), "--features", trained)
    (finding,) = found["supervised positions"]
    assert (code, finding["what"]) == (1, what)
    assert finding["cost"] is None and finding["weight"] == "cost unknown"


def test_transform_of_the_logits(tmp_path):
    """A target that divides its logits by 2, beside a draft of the logits themselves."""
    target = build_chain(tmp_path / "target", "granite", logits_scaling=2.0)
    rows = sampled_rows(target, 8)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    world = World(target, tmp_path / "target", held_out, tmp_path)
    code, _, found = world.examine(world.draft())
    (finding,) = found["transform of the logits"]
    assert code == 1 and finding["cost"]["tau"] > 0.1


def test_rule(world):
    code, _, found = world.examine(world.draft(), serving="vllm")
    (finding,) = found["greedy or probabilistic drafting"]
    assert code == 1 and finding["cost"]["tau"] > 0.5
    assert "draft_sample_method" in finding["remedy"]


def test_drafting_that_ignores_top_p(world):
    """Top-p leaves the target the successor alone, and the draft samples others too."""
    rule = {"temperature": 1.0, "top_p": 0.5}
    rows = [row | {"sampling": rule} for row in sampled_rows(world.target, 8, temperature=0)]
    options = ["--held-out", world.held_out_of(rows)]
    code, _, found = world.examine(world.draft(), *options, serving=f"{PROBABILISTIC},top_p=0.5")
    (finding,) = found["top-k and top-p of the draft"]
    assert code == 1 and finding["cost"]["tau"] > 0.3
    assert finding["cost"]["remedied"] == pytest.approx(39 / 10)  # the draft is never wrong


def test_responses_of_another_rule(world):
    _, report, _ = world.examine(world.draft(), "--off-policy", serving="temperature=0")
    assert "samples of another rule: temperature=1" in report["expected"]["caveat"]


def test_length(world):
    code, _, found = world.examine(world.draft(max_position_embeddings=32))
    assert code == 1 and list(found) == ["length"]
    assert found["length"][0]["trained"] == "max_position_embeddings 32"


def test_an_engine_that_accepts_less(world):
    counts = world.file("counts.json", {"drafts": 4000, "accepted_per_position": [2000, 900, 400]})
    code, report, found = world.examine(world.draft(), "--accepted", counts)
    (finding,) = found["the engine's counts"]
    assert code == 1 and finding["weight"] == "costs"
    assert report["observed"]["tau"] == pytest.approx(1 + 3300 / 4000)
    assert not report["observed"]["within"]


def test_a_draft_that_does_not_load(world):
    draft = world.draft()
    held = load_file(draft / "model.safetensors")
    del held["d2t"]
    save_file(held, draft / "model.safetensors")
    code, report, found = world.examine(draft)
    assert code == 1 and "d2t is missing" in found["loads"][0]["served"]
    assert len(report["outcomes"]) == 1 + len(CHECKS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--serving", "nonsense"], "'nonsense' is no serving rule"),
        (["--serving", "temperature=0"], "no held-out response is a sample of temperature=0"),
        (["--features", "nowhere"], "--features nowhere is no folder"),
        (["--draft", "nowhere"], "draft nowhere is no folder"),
        (["--metrics", "localhost"], "give the address of a server"),
    ],
)
def test_what_cannot_be_examined_is_another_exit_code(options, message, world):
    arguments = ["--target", world.folder, "--draft", world.draft(), "--held-out", world.held_out]
    result = CliRunner().invoke(app, ["doctor", *map(str, [*arguments, *options])])
    assert result.exit_code == 2 and message in result.output
    assert isinstance(result.exception, SystemExit)
