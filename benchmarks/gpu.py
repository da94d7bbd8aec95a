"""The overlap operation on a GPU: agreement with float64, the target's side, `linear_overlap`.

Run as ``python -m benchmarks.gpu``, which needs torch and Triton alone. Every result is a line of
JSON, printed and appended to ``--out`` at once, so that a cut leaves what was measured.
``--rehearse`` runs it on a CPU at a small size: its times mean nothing.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from specforge_lk.overlap import OverlapTerms, linear_overlap, overlap_terms, target_terms

#: [N, V] of the agreement: vocabularies in use, one of odd size, one below a tile.
PARITY = ((64, 4096), (64, 32_000), (64, 128_256), (64, 50_257), (128, 37), (16, 151_936))
#: [N, H, V] of `linear_overlap`.
LINEAR = ((8192, 4096, 128_256), (8192, 4096, 32_000), (16_384, 2048, 151_936))
REPEATS = 3
TERMS = ("kl", "alpha", "log_alpha", "reverse_kl")


class Recorder:
    """Prints results and keeps them."""

    def __init__(self, out: Path | None) -> None:
        self.out = out

    def __call__(self, **result: Any) -> None:
        """Write one result."""
        line = json.dumps(result)
        print(line, flush=True)
        if self.out is not None:
            with self.out.open("a") as stream:
                stream.write(line + "\n")


def parity(record: Recorder, device: str, shapes: Sequence[tuple[int, int]]) -> None:
    """Compare ``impl="auto"`` with ``impl="reference"`` in float64: terms and gradient.

    The error of a term is relative, or absolute below 1e-3; that of the gradient is of its norm.
    """
    for rows, vocabulary in shapes:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for case, scale in (("random", 3.0), ("peaked", 30.0)):
                generator = torch.Generator(device).manual_seed(vocabulary)
                full = scale * torch.randn(rows, vocabulary + 7, device=device, generator=generator)
                target = full[:, :vocabulary].to(dtype)
                noise = torch.randn(rows, vocabulary, device=device, generator=generator)
                draft = (target.float() + noise).to(dtype)
                normalizer = full.logsumexp(-1)
                mask = torch.arange(rows, device=device) % 5 != 0
                found = _terms_and_gradient(draft, target, normalizer, mask, "auto")
                expected = _terms_and_gradient(
                    draft.double(), target.double(), normalizer.double(), mask, "reference"
                )
                errors = [
                    float(((a - b).abs() / b.abs().clamp_min(1e-3)).max())
                    for a, b in zip(found[0], expected[0], strict=True)
                ]
                difference = (found[1] - expected[1]).norm() / expected[1].norm()
                record(
                    section="parity",
                    shape=[rows, vocabulary],
                    dtype=str(dtype).removeprefix("torch."),
                    case=case,
                    terms=dict(zip(TERMS, errors, strict=True)),
                    gradient=float(difference),
                    masked_rows_are_zero=not bool(found[1][~mask].any()),
                    draft_argmax_equal=torch.equal(found[2], expected[2]),
                )


def _terms_and_gradient(
    draft: torch.Tensor,
    target: torch.Tensor,
    normalizer: torch.Tensor,
    mask: torch.Tensor,
    impl: str,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    draft = draft.detach().clone().requires_grad_()
    terms = overlap_terms(draft, target, normalizer, mask=mask, impl=impl, reverse_kl=True)
    values = [getattr(terms, name) for name in TERMS]
    sum(c * value.sum() for c, value in zip((0.3, 0.7, -0.5, 0.2), values, strict=True)).backward()
    assert draft.grad is not None
    exact = [value.detach().double() for value in values]
    return exact, draft.grad.double(), terms.draft_argmax


def target(record: Recorder, device: str, shapes: Sequence[tuple[int, int]]) -> None:
    """Compare ``impl="auto"`` of `target_terms` with float64, and time it beside "reference".

    The draft vocabulary has a quarter of the tokens.
    """
    for rows, vocabulary in shapes:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            generator = torch.Generator(device).manual_seed(vocabulary)
            logits = 3 * torch.randn(rows, vocabulary, device=device, generator=generator)
            logits = logits.to(dtype)
            order = torch.randperm(vocabulary, device=device, generator=generator)
            kept = order[: max(1, vocabulary // 4)].sort().values.int()
            found = target_terms(logits, kept)
            exact = target_terms(logits.double(), kept, impl="reference")
            record(
                section="target",
                shape=[rows, vocabulary],
                dtype=str(dtype).removeprefix("torch."),
                log_normalizer=float((found.log_normalizer - exact.log_normalizer).abs().max()),
                log_coverage=float((found.log_coverage - exact.log_coverage).abs().max()),
                logits_equal=torch.equal(found.logits.double(), exact.logits),
                token_ids_equal=torch.equal(found.token_ids, exact.token_ids),
                ms={
                    impl: _milliseconds(partial(target_terms, logits, kept, impl=impl))
                    for impl in ("auto", "reference")
                },
            )


def linear(record: Recorder, device: str, shapes: Sequence[tuple[int, int, int]]) -> None:
    """Time `linear_overlap` beside a projection and `overlap_terms`, forward and backward."""
    for rows, width, vocabulary in shapes:
        hidden = torch.randn(rows, width, device=device, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(vocabulary, width, device=device, dtype=torch.bfloat16)
        weight *= width**-0.5
        target = F.linear(hidden.detach(), weight)
        normalizer = torch.cat([part.float().logsumexp(-1) for part in target.split(256)])
        for frozen in (False, True):
            head = weight.clone().requires_grad_(not frozen)
            times, peaks = _side_by_side(hidden, head, target, normalizer)
            record(
                section="linear",
                shape=[rows, width, vocabulary],
                head="frozen" if frozen else "trained",
                ms=times,
                peak_mib=peaks,
            )


def _side_by_side(
    hidden: torch.Tensor, head: torch.Tensor, target: torch.Tensor, normalizer: torch.Tensor
) -> tuple[dict[str, float], dict[str, float | None]]:
    """Return median milliseconds and peak MiB of a step, by name."""

    def unfused() -> None:
        step(overlap_terms(F.linear(hidden, head), target, normalizer))

    def fused() -> None:
        step(linear_overlap(hidden, head, target, normalizer))

    def step(terms: OverlapTerms) -> None:
        hidden.grad = head.grad = None
        (terms.kl.mean() - terms.log_alpha.mean()).backward()

    ways = {"unfused": unfused, "linear_overlap": fused}
    times: dict[str, list[float]] = {name: [] for name in ways}
    peaks = {}
    for _ in range(REPEATS):
        for name, way in ways.items():
            way()
            times[name].append(_milliseconds(way))
            peaks[name] = _peak(way)
    return {name: statistics.median(found) for name, found in times.items()}, peaks


def _milliseconds(step: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return float(do_bench(step, warmup=15, rep=200, return_mode="median"))
    began = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - began)


def _peak(step: Callable[[], None]) -> float | None:
    """Return the MiB allocated at most during a step, beyond what was before it."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> None:
    """Measure all sections."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="append the lines of JSON to this file")
    parser.add_argument("--rehearse", action="store_true", help="small, on a CPU")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --rehearse runs on a CPU")
    record = Recorder(options.out)
    device = "cpu" if options.rehearse else "cuda"
    name = "CPU, rehearsal" if options.rehearse else torch.cuda.get_device_name()
    record(section="device", name=name, torch=torch.__version__)
    parity(record, device, ((6, 300),) if options.rehearse else PARITY)
    target(record, device, ((6, 300),) if options.rehearse else PARITY)
    linear(record, device, ((8, 16, 64),) if options.rehearse else LINEAR)


if __name__ == "__main__":
    main()
