"""Multimodal targets are trained for on text, from capture to evaluation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from tiny_target import HIDDEN_SIZE, VOCAB_SIZE, build_tokenizer
from training_run import EPOCH, HEADS, HELD_OUT, Setup, capture_arguments, prepare, run
from typer.testing import CliRunner

from specforge_lk.cli import app
from specforge_lk.evaluate.report import read_report

pytestmark = pytest.mark.slow

_TEXT = {
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
}
_VISION = {"hidden_size": HIDDEN_SIZE, "intermediate_size": 48}


def gemma3():
    """Its embedding is its head, under a name of its own."""
    vision = {**_VISION, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.Gemma3Config(
        text_config=_TEXT,
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    key = "language_model.model.embed_tokens.weight"
    return transformers.Gemma3ForConditionalGeneration(config), key


def qwen2_5_vl():
    """Positions of three axes; no causal language model to transformers."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {**_VISION, "depth": 1, "num_heads": 4, "out_hidden_size": HIDDEN_SIZE}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_TEXT, "rope_parameters": rope},
        vision_config={**vision, "fullatt_block_indexes": [0]},
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config), "model.embed_tokens.weight"


@pytest.fixture(params=[gemma3, qwen2_5_vl], ids=lambda build: build.__name__)
def multimodal(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Setup, str]:
    """A run for a multimodal target, and the name of the target's embedding."""
    setup = prepare(tmp_path)
    shutil.rmtree(setup.target)
    torch.manual_seed(0)
    model, key = request.param()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(setup.target)
    build_tokenizer().save_pretrained(setup.target)
    draft = json.loads(setup.draft_config.read_text())
    draft["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = [0, 1, 2]
    setup.draft_config.write_text(json.dumps(draft))
    config = json.loads(setup.config.read_text())
    config["model"]["embedding_key"] = key
    setup.config.write_text(json.dumps(config))
    return setup, key


def invoke(*arguments: object) -> None:
    """A command of this package, in this process."""
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert not done.exit_code, done.output


def test_text_from_capture_to_evaluation(multimodal: tuple[Setup, str], tmp_path: Path):
    """Capture has compared what training makes of the features with the target's own logits."""
    setup, key = multimodal
    invoke(*capture_arguments(setup))
    assert setup.train("lk", "training.loss=lk_lambda", "training.num_epochs=1").steps
    draft, report = tmp_path / "export", tmp_path / "report.json"
    paths = ["--checkpoint", setup.checkpoint("lk", EPOCH), "--output-dir", draft]
    paths += ["--draft-config", setup.draft_config, "--vocab-mapping", setup.mapping]
    embedding = ["--embedding-source", setup.target, "--embedding-key", key]
    run("specforge", "export", "--to", "hf", *paths, *embedding)
    data = ["--held-out", setup.held_out, "--benchmark", f"q={setup.questions}", "--limit", 2]
    settings = ["--heads", HEADS, "--sampled-by", "temperature=1", "--sampled"]
    settings += ["--max-new-tokens", 8, "--out", report]
    invoke("eval", "--target", setup.target, "--draft", f"lk={draft}", *data, *settings)
    exact, answered, sampled = read_report(report).results
    assert exact.conversations == HELD_OUT and exact.tau_rounds > 1
    assert answered.prompts == sampled.prompts == 2
    assert sampled.drafted
