"""Rows of conversations, and a streamed run whose `capture` shows what becomes of them."""

from __future__ import annotations

import json
from pathlib import Path

from chat_families import VOCAB_SIZE, family_tokenizer
from tiny_target import draft_config, family_config
from typer.testing import CliRunner

from specforge_lk.cli import app

HI, YES = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
GOOD = {"id": "ok", "conversations": [HI, YES]}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
AS_TEXT = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def chat(*messages: object, **more: object) -> dict:
    return {"id": "x", "conversations": list(messages), **more}


def says(content: object, **more: object) -> dict:
    return {"role": "assistant", "content": content, **more}


def asks(content: object) -> dict:
    return {"role": "user", "content": content}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def invoke(*arguments: object) -> tuple[int, str]:
    """Run a command, and return its exit status with what it printed, on one line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    # Whatever the width of the terminal.
    return result.exit_code, " ".join(result.output.split())


class Streamed:
    """A streamed run: `capture` writes its tokens, and needs no weights of the target."""

    def __init__(self, folder: Path, template: str, ends: tuple[str, ...]) -> None:
        self.folder = folder
        target = folder / "target"
        self.tokenizer = family_tokenizer(template)
        self.tokenizer.save_pretrained(target)
        config = family_config("llama", 6) | {"vocab_size": VOCAB_SIZE, "eos_token_id": 0}
        (target / "config.json").write_text(json.dumps(config))
        eos = {"eos_token_id": [0, *map(self.tokenizer.convert_tokens_to_ids, ends)]}
        (target / "generation_config.json").write_text(json.dumps(eos))
        draft = draft_config(96) | {"vocab_size": VOCAB_SIZE}
        (folder / "draft.json").write_text(json.dumps(draft))
        servers = {
            "control_dir": str(folder / "control"),
            "backend": "mooncake",
            "server_urls": ["http://127.0.0.1:30000"],
            "mooncake_metadata_server": "http://127.0.0.1:35880/metadata",
            "mooncake_master_server_addr": "127.0.0.1:35551",
        }
        run = {
            "model": {
                "target_model_path": str(target),
                "draft_model_config": str(folder / "draft.json"),
                "vocab_mapping_path": str(folder / "mapping.pt"),
            },
            "data": {"prompts_path": str(folder / "tokens.jsonl"), "max_length": 256},
            "training": {"strategy": "eagle3"},
            "deployment": {"mode": "disaggregated", "disaggregated": servers},
        }
        (folder / "run.json").write_text(json.dumps(run))

    def capture(self, rows: list[dict], *more: str) -> tuple[int, str]:
        """Capture rows, and return the exit status with what was printed."""
        (self.folder / "tokens.jsonl").unlink(missing_ok=True)
        path = write(self.folder / "rows.jsonl", rows)
        return invoke("capture", "--config", self.folder / "run.json", "--responses", path, *more)

    def samples(self) -> list[tuple[str, list[str]]]:
        """The text of every sample, and what is supervised of it."""
        found = []
        for line in (self.folder / "tokens.jsonl").read_text().splitlines():
            ids, mask = (json.loads(line)[name] for name in ("input_ids", "loss_mask"))
            spans, before = [], 0
            for token, here in zip(ids, mask, strict=True):
                if here and not before:
                    spans.append([])
                if here:
                    spans[-1].append(token)
                before = here
            found.append((self.tokenizer.decode(ids), list(map(self.tokenizer.decode, spans))))
        return found
