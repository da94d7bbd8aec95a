"""vLLM's MLP speculator, in vLLM's own environment.

Run as ``python -m experiments.serving.speculator JOB.json``.

vLLM 0.32.0 cannot serve one: the architecture is commented out in its registry
(``model_executor/models/registry.py``), and its model runner has no proposer for the method
(``v1/worker/gpu_model_runner.py``). The model class with its loader is still there, so that is what
an exported draft is loaded into. The class has lost its forward; the recurrence below is built from
its modules and constants.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace


@dataclass(frozen=True)
class SpeculatorJob:
    """A draft to load and to run.

    Attributes:
        target: Hugging Face folder.
        draft: exported MLP speculator.
        states: safetensors with ``hidden`` [N, H], the target's last hidden states, and
            ``tokens`` [N, K], the token before each head's prediction.
        logits: where to write ``logits`` [K, N, V], as safetensors.
    """

    target: str
    draft: str
    states: str
    logits: str


@dataclass
class Loaded:
    """How the draft was loaded.

    Attributes:
        refusal: what vLLM says when it is asked to serve the draft; None if it accepts.
        exported: tensors of the checkpoint.
        missing: parameters of vLLM's class that no tensor filled.
        unknown: tensors that name no parameter, tied or not.
    """

    refusal: str | None
    exported: int
    missing: list[str]
    unknown: list[str]


def run(job: SpeculatorJob) -> Loaded:
    """Ask vLLM to serve the draft, load it into vLLM's class, and write its logits."""
    import torch
    from safetensors.torch import load_file, save_file
    from torch.nn import functional
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.model_executor.models.mlp_speculator import MLPSpeculator
    from vllm.transformers_utils.configs.mlp_speculator import MLPSpeculatorConfig

    config = MLPSpeculatorConfig.from_pretrained(job.draft)
    weights = {
        name: tensor.float()
        for file in sorted(Path(job.draft).glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    with set_current_vllm_config(VllmConfig()), tempfile.TemporaryDirectory() as directory:
        init_distributed_environment(1, 0, f"file://{directory}/store", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        holder = SimpleNamespace(model_config=SimpleNamespace(hf_config=config))
        model = MLPSpeculator(vllm_config=holder)
        filled = model.load_weights(weights.items())
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    states = load_file(job.states)
    logits = []
    with torch.inference_mode():
        state = states["hidden"]
        if model.scale_input:
            state = model.ln0(state) / 2**0.5
        for head in range(config.n_predict):
            embedded = model.emb[head](states["tokens"][:, head])
            mixed = model.proj[head](state) + embedded * (model.emb_weight / model.state_weight)
            state = model.activation(model.ln[head](mixed))
            logits.append(functional.linear(state, model.head[head].weight))
    save_file({"logits": torch.stack(logits)}, job.logits)
    return Loaded(
        refusal=_refusal(job, config.n_predict),
        exported=len(weights),
        missing=sorted({name for name, _ in model.named_parameters()} - filled),
        unknown=sorted(n for n in weights if n.removeprefix("speculator.") not in known),
    )


def _refusal(job: SpeculatorJob, heads: int) -> str | None:
    from vllm.engine.arg_utils import EngineArgs

    speculative = {"method": "mlp_speculator", "model": job.draft, "num_speculative_tokens": heads}
    try:
        EngineArgs(job.target, speculative_config=speculative).create_engine_config()
    except ValueError as error:
        # The rest of the message lists every architecture that vLLM knows.
        return str(error).partition("Supported architectures")[0].partition("Value error, ")[2]
    return None


def main(path: Path) -> None:
    """Run the job at ``path`` and write its result beside it."""
    job = SpeculatorJob(**json.loads(path.read_text()))
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(run(job))))
    temporary.rename(path.with_suffix(".result.json"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
