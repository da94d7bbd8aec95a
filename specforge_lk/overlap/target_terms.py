"""What the overlap operation takes of a target, from its logits on the full vocabulary.

`target_terms` is called with logits, `projected_target_terms` with hidden states, whose logits
exist for a chunk of positions at a time and are multiplied once: those on the draft vocabulary are
taken from them. "reference" is the definition in plain torch; "cpu" and "triton" read every logit
once.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from types import MappingProxyType
from typing import Final, NamedTuple, Protocol

import torch

from specforge_lk.overlap import fused_cpu
from specforge_lk.overlap.rows import matrices, rows_at_a_time

#: Makes logits [n, V] of states [n, H]: an LM head with all that belongs to it.
Project = Callable[[torch.Tensor], torch.Tensor]


class TargetTerms(NamedTuple):
    """A target on the draft vocabulary D, as `overlap_terms` takes it; no gradient flows to it.

    A position whose logits are all -inf has no target: its log normalizer is inf, its log coverage
    -inf, as those of padding are.

    Attributes:
        logits: y, the target logits on D, [..., V_d], in the dtype that they were given in.
        log_normalizer: log Z in nats over the full vocabulary, [...], in float32, or in float64 of
            float64 logits.
        log_coverage: log of the mass of D, [...], at most 0, and 0 where D is the full vocabulary.
        token_ids: int64, the most likely token of the full vocabulary, the first of several, [...].
    """

    logits: torch.Tensor
    log_normalizer: torch.Tensor
    log_coverage: torch.Tensor
    token_ids: torch.Tensor


class TargetKernel(Protocol):
    """One implementation."""

    def fill(self, logits: torch.Tensor, kept: torch.Tensor | None, out: TargetTerms) -> None:
        """Write the terms of logits [..., V], of any strides, to ``out``, contiguous vectors [N].

        ``out.logits`` is [N, V_d] and contiguous; it is not written to where ``kept`` is None.
        """
        ...


class _Reference:
    """The definition."""

    def fill(self, logits: torch.Tensor, kept: torch.Tensor | None, out: TargetTerms) -> None:
        dtype = out.log_normalizer.dtype
        size = rows_at_a_time(logits.device, logits.shape[-1], dtype)
        for start, (matrix,) in matrices(0, logits):
            for first, part in enumerate(matrix.split(size)):
                at = start + first * size
                self._fill(part, kept, TargetTerms(*(t[at : at + len(part)] for t in out)))

    def _fill(self, logits: torch.Tensor, kept: torch.Tensor | None, out: TargetTerms) -> None:
        wide = logits.to(out.log_normalizer.dtype)
        top, token_ids = wide.max(dim=-1)
        out.token_ids.copy_(token_ids)
        # Less the highest logit, sums are of the size of 1, and so is what they are rounded to.
        shifted = wide - top[:, None]
        log_sum = shifted.exp().sum(dim=-1).log()
        nothing = top == -torch.inf
        out.log_normalizer.copy_(torch.where(nothing, torch.inf, top + log_sum))
        if kept is None:
            out.log_coverage.copy_(torch.where(nothing, -torch.inf, 0.0 * log_sum))
        else:
            out.logits.copy_(logits[:, kept])
            log_coverage = (shifted[:, kept].logsumexp(dim=-1) - log_sum).clamp_max(0.0)
            out.log_coverage.copy_(torch.where(nothing, -torch.inf, log_coverage))


class _Cpu:
    """In C++; dtypes that it does not know are left to the definition."""

    def fill(self, logits: torch.Tensor, kept: torch.Tensor | None, out: TargetTerms) -> None:
        if fused_cpu.knows_target(logits):
            fused_cpu.target(logits, kept, *out)
        else:
            _Reference().fill(logits, kept, out)


def _triton() -> TargetKernel:
    from specforge_lk.overlap import triton_target

    return triton_target


_KERNELS: Final[Mapping[str, Callable[[], TargetKernel]]] = MappingProxyType(
    {"reference": _Reference, "cpu": _Cpu, "triton": _triton}
)


@torch.no_grad()
def target_terms(
    logits: torch.Tensor, kept: torch.Tensor | None = None, *, impl: str = "auto"
) -> TargetTerms:
    """Return what the overlap operation takes of a target.

    Args:
        logits: the target's on its full vocabulary, [..., V], any floating dtype and strides.
        kept: the tokens of the draft vocabulary in its order, integers [V_d] below V; None where
            that is the full vocabulary. int32 takes half of the reading that int64 does.
        impl: "reference", "cpu", "triton", or "auto" for the fastest that can run.

    Returns:
        ``TargetTerms``; its logits are ``logits`` themselves where ``kept`` is None.

    Raises:
        ValueError: unknown ``impl``, or ``kept`` that is no list of tokens.
    """
    kernel = _KERNELS[_chosen(impl, logits.device)]()
    _check(logits, kept)
    positions = logits.shape[:-1]
    out = _empty(positions.numel(), 0 if kept is None else len(kept), logits)
    kernel.fill(logits, kept, out)
    y = logits if kept is None else out.logits.view(*positions, len(kept))
    return TargetTerms(y, *(vector.view(positions) for vector in out[1:]))


@torch.no_grad()
def projected_target_terms(
    states: torch.Tensor,
    project: Project,
    kept: torch.Tensor | None = None,
    *,
    rows: int,
    impl: str = "auto",
) -> TargetTerms:
    """Compute `target_terms` of ``project(states)``, which is never held as a whole.

    Args:
        states: [..., H].
        project: makes logits [n, V] of states [n, H].
        kept, impl: as for `target_terms`.
        rows: how many positions have logits at a time.

    Raises:
        ValueError: as for `target_terms`, or less than one row.
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, not {rows}")
    kernel = _KERNELS[_chosen(impl, states.device)]()
    positions = states.shape[:-1]
    states = states.reshape(-1, states.shape[-1])
    out: TargetTerms | None = None
    # No states at all still have a vocabulary.
    for start in range(0, max(1, len(states)), rows):
        logits = project(states[start : start + rows])
        if out is None:
            _check(logits, kept)
            out = _empty(len(states), logits.shape[-1] if kept is None else len(kept), logits)
        part = TargetTerms(*(t[start : start + rows] for t in out))
        kernel.fill(logits, kept, part)
        if kept is None:
            part.logits.copy_(logits)
        del logits  # before the next ones are computed
    assert out is not None
    return TargetTerms(*(t.view(*positions, *t.shape[1:]) for t in out))


def _chosen(impl: str, device: torch.device) -> str:
    if impl == "auto":
        if device.type == "cuda" and find_spec("triton"):
            return "triton"
        return "cpu" if device.type == "cpu" and fused_cpu.available() else "reference"
    if impl not in _KERNELS:
        raise ValueError(f"impl {impl!r} is unknown; choose one of auto, {', '.join(_KERNELS)}")
    return impl


def _check(logits: torch.Tensor, kept: torch.Tensor | None) -> None:
    if not logits.shape[-1]:
        raise ValueError(f"the target's logits {list(logits.shape)} are of an empty vocabulary")
    if kept is not None and (kept.dim() != 1 or kept.dtype not in (torch.int32, torch.int64)):
        raise ValueError(
            f"kept must be tokens of the target, int32 or int64 of shape [V_d], not {kept.dtype} "
            f"of shape {list(kept.shape)}: of a mask t2d take t2d.nonzero().squeeze(1)"
        )


def _empty(count: int, width: int, logits: torch.Tensor) -> TargetTerms:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return TargetTerms(
        logits.new_empty(count, width),
        logits.new_empty(count, dtype=dtype),
        logits.new_empty(count, dtype=dtype),
        logits.new_empty(count, dtype=torch.int64),
    )
