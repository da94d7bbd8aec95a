"""Time and memory of the operation beside its peers, of the target and of `linear_overlap`.

Every time stands beside the least that the card needs to move what must be moved, at the bandwidth
that a copy reaches on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from specforge.core.target_distribution import TargetDistribution

from benchmarks.gpu_check.peers import Peer, checked, peers
from benchmarks.gpu_check.record import Record, described
from benchmarks.gpu_check.timing import (
    REPEATED_MS,
    Step,
    gigabytes_per_second,
    milliseconds,
    peak_mib,
    tidy,
)
from benchmarks.inputs import Inputs
from specforge_lk.overlap import (
    OverlapTerms,
    Projection,
    linear_overlap,
    overlap_terms,
    projected_target_terms,
    target_terms,
)

F32, BF16 = torch.float32, torch.bfloat16
#: The names of a row, what is timed, and for how long.
Wanted = tuple[dict[str, str], Step, float]


@dataclass(frozen=True)
class Cell:
    """N positions, V_d tokens, dtypes of draft and target logits; ``all_peers``, or ours alone."""

    tokens: int
    vocabulary: int
    draft: torch.dtype
    target: torch.dtype
    all_peers: bool = False

    def __str__(self) -> str:
        return f"{self.tokens} x {self.vocabulary}, {self.dtypes}"

    @property
    def dtypes(self) -> str:
        """Names of both dtypes."""
        return " / ".join(str(d).removeprefix("torch.") for d in (self.draft, self.target))


#: The sizes of the audit; the last is a draft position of an EAGLE-3 step of 8 x 2048 tokens.
CELLS: Final = (
    Cell(8192, 32_000, BF16, BF16, all_peers=True),
    Cell(4096, 128_256, BF16, BF16, all_peers=True),
    Cell(8192, 32_000, BF16, F32),
    Cell(16_384, 32_000, BF16, F32),
    Cell(8192, 32_000, F32, F32),
    Cell(65_536, 4096, BF16, BF16),
)
#: [N, H, V] of `linear_overlap`.
LINEAR: Final = ((8192, 4096, 128_256), (8192, 4096, 32_000), (16_384, 2048, 151_936))
#: [N, H, V, V_d] of the target's construction: an EAGLE-3 step of Llama-3.1-8B, and a whole
#: vocabulary.
TARGETS: Final = ((16_384, 4096, 128_256, 32_000), (8192, 4096, 128_256, 128_256))


def run(record: Record) -> None:
    """Measure bandwidth, then everything that depends on it."""
    device, dry = record.device, record.dry
    record.row(section="check", device=device, **_bandwidth(device, dry))
    copied = record.rows[-1]["copy_gb_per_s"]
    known = peers(device)
    errors, failures = checked(known, device, tokens=3 if dry else 24)
    for name, failure in failures.items():
        # Another's that does not run here, or is another function, is left out; ours is wrong.
        wrong = {} if _foreign(name) else {"ok": False}
        record.row(section="left out", name=name, failure=failure, **wrong)
    known = {name: peer for name, peer in known.items() if name in errors}
    cells = (Cell(2, 64, F32, F32, all_peers=True),) if dry else CELLS
    measured = partial(_measure_cell, record, known, copied)
    parts: list[tuple[str, Callable[[], None]]] = [(str(cells[0]), partial(measured, cells[0]))]
    parts.append(("target", lambda: _measure_all(record, _targets(device, dry))))
    parts.append(("linear_overlap", lambda: _measure_all(record, _linear(device, dry))))
    parts += [(str(cell), partial(measured, cell)) for cell in cells[1:]]
    for name, part in parts:
        for _ in record.each([name]):
            with record.guarded(section="part", part=name):
                part()
            tidy(device)


def _foreign(name: str) -> bool:
    return name.startswith(("specforge", "speculators", "liger"))


def _bandwidth(device: str, dry: bool) -> dict[str, float]:
    size = 2**16 if dry else 2**30
    source = torch.ones(size // 4, device=device)
    into = torch.empty_like(source)
    copied = milliseconds(lambda: into.copy_(source), device)[1]
    read = milliseconds(source.sum, device)[1]
    width = 64 if dry else 8192
    a, b = torch.randn(2, width, width, device=device).to(BF16)
    product = milliseconds(lambda: a @ b, device)[1]
    return {
        "copy_gb_per_s": gigabytes_per_second(2 * size, copied),
        "read_gb_per_s": gigabytes_per_second(size, read),
        "product_tflops": 2 * width**3 / product / 1e9,
    }


# ------------------------------------------------------------------------------ on logits


def _measure_cell(record: Record, known: dict[str, Peer], copied: float, cell: Cell) -> None:
    x = Inputs(cell.tokens, cell.vocabulary, cell.draft, 1.0, cell.target, record.device)
    elements = cell.tokens * cell.vocabulary
    draft, target = cell.draft.itemsize, cell.target.itemsize
    # Forward reads both, backward reads both and writes the gradient.
    forward, both = elements * (draft + target), elements * (3 * draft + 2 * target)
    for name in record.each(known):
        peer = known[name]
        if _foreign(name) and not cell.all_peers:
            continue
        x.hold(peer.implementation.reads, only=True)
        row: dict[str, Any] = {"section": "operation", "name": name, "cell": str(cell)}
        try:
            row |= _times(peer, x, record)
        except Exception as error:
            ours = not _foreign(name) and not isinstance(error, torch.OutOfMemoryError)
            record.row(**row, failure=described(error), **({"ok": False} if ours else {}))
            continue
        finally:
            x.release()
            tidy(record.device)
        least = {"forward_ms": forward / copied / 1e6, "both_ms": both / copied / 1e6}
        over = {part: row[part][1] / ms for part, ms in least.items() if part in row}
        record.row(**row, over_copy=over)


def _times(peer: Peer, x: Inputs, record: Record) -> dict[str, Any]:
    def step() -> None:
        x.release()
        peer.implementation.step(x)

    found: dict[str, Any] = {"both_ms": milliseconds(step, record.device)}
    if (loss := peer.loss) is not None:
        found["forward_ms"] = milliseconds(lambda: loss(x), record.device)
    found["peak_mib"] = peak_mib(step, record.device)
    return {**found, "gradient_mib": x.z.nbytes / 2**20}


# --------------------------------------------------------------------- target, linear_overlap


def _measure_all(record: Record, wanted: Iterable[Wanted]) -> None:
    for row, step, repeated in wanted:
        for _ in record.each([", ".join(row.values())]):
            try:
                ms = milliseconds(step, record.device, repeated)
                record.row(**row, ms=ms, peak_mib=peak_mib(step, record.device))
            except torch.OutOfMemoryError as error:
                record.row(**row, failure=described(error))
            except Exception as error:
                record.row(**row, failure=described(error), ok=False)
            tidy(record.device)


def _targets(device: str, dry: bool) -> Iterable[Wanted]:
    for rows, width, vocabulary, kept in ((8, 8, 60, 20),) if dry else TARGETS:
        hidden = torch.randn(rows, width, device=device).to(BF16)
        head = torch.randn(vocabulary, width, device=device).mul_(width**-0.5).to(BF16)
        t2d = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        t2d[torch.randperm(vocabulary, device=device)[:kept]] = True
        logits = F.linear(hidden, head)
        whole = kept == vocabulary
        size = f"{rows} x {vocabulary}, V_d {kept}, bfloat16"
        from_logits = partial(TargetDistribution.from_logits, logits, None if whole else t2d)
        tokens = None if whole else t2d.nonzero().squeeze(1).int()
        ways: dict[str, Step] = {
            "target_terms": partial(target_terms, logits, tokens),
            "from_logits": from_logits,
            "argmax alone": partial(logits.argmax, -1),
        }
        for name, way in ways.items():
            yield {"section": "target", "way": name, "size": size}, way, REPEATED_MS
        del logits, from_logits, ways, way
        project = partial(F.linear, weight=head)
        ways = {
            "projected_target_terms": partial(
                projected_target_terms, hidden, project, tokens, rows=1024
            )
        }
        if not whole:
            ways["from_hidden_states"] = partial(
                TargetDistribution.from_hidden_states, hidden, head, t2d
            )
        for name, way in ways.items():
            yield {"section": "target", "way": name, "size": size}, way, REPEATED_MS


def _linear(device: str, dry: bool) -> Iterable[Wanted]:
    for rows, width, vocabulary in ((8, 16, 64),) if dry else LINEAR:
        hidden = torch.randn(rows, width, device=device).to(BF16).requires_grad_()
        weight = torch.randn(vocabulary, width, device=device).mul_(width**-0.5).to(BF16)
        target = F.linear(hidden.detach(), weight)
        log_z = torch.cat([part.float().logsumexp(-1) for part in target.split(256)])
        for frozen in (False, True):
            head = weight.clone().requires_grad_(not frozen)
            for name, way in _ways(hidden, head, target, weight, log_z).items():
                yield (
                    {
                        "section": "linear_overlap",
                        "way": name,
                        "head": "frozen" if frozen else "trained",
                        "size": f"{rows} x {width} x {vocabulary}",
                    },
                    partial(_kl_and_alpha, way, hidden, head),
                    3 * REPEATED_MS,
                )
            hidden.grad = None


def _ways(
    hidden: torch.Tensor,
    head: torch.Tensor,
    target: torch.Tensor,
    target_head: torch.Tensor,
    log_z: torch.Tensor,
) -> dict[str, Callable[[], OverlapTerms]]:
    projection = Projection(hidden.detach(), target_head)
    return {
        "unfused": lambda: overlap_terms(F.linear(hidden, head), target, log_z),
        "linear_overlap": partial(linear_overlap, hidden, head, target, log_z),
        "linear_overlap, projection": partial(linear_overlap, hidden, head, projection, log_z),
    }


def _kl_and_alpha(
    way: Callable[[], OverlapTerms], hidden: torch.Tensor, head: torch.Tensor
) -> None:
    hidden.grad = head.grad = None
    terms = way()
    (terms.kl.mean() - terms.log_alpha.mean()).backward()
