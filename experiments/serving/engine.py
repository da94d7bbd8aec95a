"""What runs in vLLM's own environment: ``python -m experiments.serving.engine JOB.json``.

A job is one engine. Its result is put beside it as ``JOB.result.json``. Nothing here is imported
from elsewhere in this project, whose dependencies that environment does not have.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: Of the process: what starts fast and does not contend on a small machine.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    # A thread that spins for work takes the core of one that has some.
    "KMP_BLOCKTIME": "0",
}


def environment(python: Path) -> dict[str, str]:
    """Return the environment variables of a process with this Python of vLLM's environment."""
    preload = python.parent.parent / "lib" / "libiomp5.so"
    return {**os.environ, **ENVIRONMENT, "LD_PRELOAD": str(preload)}


@dataclass(frozen=True)
class Job:
    """One engine and what it generates.

    Attributes:
        target: Hugging Face folder.
        prompts: token ids.
        max_tokens: longest response.
        temperature: of the target, and of the draft where it samples.
        speculative_config: vLLM's; None to generate without a draft.
        hf_overrides: vLLM's, of the target's config.
        options: further arguments of vLLM's ``LLM``.
        logprobs: log-probabilities per token to return, the sampled token's among them.
    """

    target: str
    prompts: list[list[int]]
    max_tokens: int
    temperature: float
    speculative_config: dict[str, Any] | None = None
    hf_overrides: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    logprobs: int | None = None


@dataclass
class Response:
    """What vLLM returned for one prompt.

    Attributes:
        tokens: the response, an end-of-sequence token included.
        stopped: whether an end-of-sequence token ended it.
        accepted: drafted tokens accepted, per verification step.
        logprobs: per token, id and log-probability of the most probable tokens, best first.
    """

    tokens: list[int]
    stopped: bool
    accepted: list[int]
    logprobs: list[list[tuple[int, float]]] | None = None


@dataclass
class Served:
    """One engine's responses and its own counters.

    Attributes:
        responses: one per prompt.
        counters: vLLM's ``vllm:spec_decode_*`` metrics; per position as a list.
        seconds: wall clock of the generation.
    """

    responses: list[Response]
    counters: dict[str, Any]
    seconds: float


def run(job: Job) -> Served:
    """Load an engine and generate."""
    import time

    from vllm import LLM, SamplingParams

    mend_expansion()
    llm = LLM(
        job.target,
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=16,
        enforce_eager=True,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        speculative_config=job.speculative_config,
        hf_overrides=job.hf_overrides,
        disable_log_stats=False,
        per_request_spec_decode_metrics="detailed" if job.speculative_config else "none",
        seed=0,
        **job.options,
    )
    check_expansion()
    sampling = SamplingParams(
        temperature=job.temperature, max_tokens=job.max_tokens, logprobs=job.logprobs
    )
    began = time.monotonic()
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in job.prompts], sampling, use_tqdm=False
    )
    seconds = time.monotonic() - began
    counters = {
        metric.name.removeprefix("vllm:spec_decode_"): getattr(metric, "values", None)
        or getattr(metric, "value", None)
        for metric in llm.get_metrics()
        if metric.name.startswith("vllm:spec_decode_")
    }
    return Served([_response(output.outputs[0]) for output in outputs], counters, round(seconds, 1))


def _response(completion: Any) -> Response:
    metrics = completion.spec_decode_metrics
    logprobs = completion.logprobs and [
        sorted(((t, p.logprob) for t, p in best.items()), key=lambda pair: -pair[1])
        for best in completion.logprobs
    ]
    return Response(
        tokens=list(completion.token_ids),
        stopped=completion.finish_reason == "stop",
        accepted=list(metrics.per_step_accepted) if metrics else [],
        logprobs=logprobs,
    )


# vLLM 0.32.0 on CPUs above temperature 0


def mend_expansion() -> None:
    """Replace the CPU kernel behind vLLM's ``expand_batch_to_tokens``; before an engine is made.

    In 0.32.0 ``vllm/utils/cpu_triton_utils.py::_expand_kernel_impl`` converts the output to int64
    and fills that copy: the temperatures of all tokens stay what the memory held before.
    """
    from vllm.utils import cpu_triton_utils

    def expand(
        output: Any,
        values: Any,
        ends: Any,
        replace_from: float,
        replace_to: float,
        MAX_NUM_TOKENS: int | None = None,
    ) -> None:
        counts = ends.diff(prepend=ends.new_zeros(1))
        output.copy_(values.where(values != replace_from, replace_to).repeat_interleave(counts))

    cpu_triton_utils._expand_kernel_impl = expand


def check_expansion() -> None:
    """Raise RuntimeError unless per-request values are expanded to tokens as documented."""
    import torch
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    values, ends = torch.tensor([0.5, 0.0, 2.0]), torch.tensor([2, 3, 5])
    expanded = expand_batch_to_tokens(values, ends, 5, 0, 1).tolist()
    if expanded != [0.5, 0.5, 1.0, 2.0, 2.0]:
        raise RuntimeError(f"vLLM expands temperatures wrongly, to {expanded}; see mend_expansion")


def main(path: Path) -> None:
    """Run the job at ``path`` and write its result beside it."""
    job = Job(**json.loads(path.read_text()))
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(run(job))))
    temporary.rename(path.with_suffix(".result.json"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
