"""The overlap operation: acceptance rate and divergences of a draft from its target, per position.

``overlap_terms`` takes logits, ``linear_overlap`` hidden states and LM heads; both have one
contract, and implementations side by side (``impl=``). What they take of a target is computed by
``target_terms`` from its logits on the full vocabulary.

- ``reference``: the definition in plain torch, differentiated by autograd. Every other
  implementation is tested against it in float64.
- ``closed_form``: closed-form gradients in torch operations, rows in cache-sized chunks; runs on
  every device.
- ``cpu``: fused in C++ for CPUs, compiled on first use (two seconds, once per machine).
- ``triton``: fused for CUDA GPUs.

``auto`` takes ``triton`` for CUDA tensors where Triton is installed, ``cpu`` for CPU tensors where
there is a C++ compiler, and ``closed_form`` elsewhere.
"""

from specforge_lk.overlap.contract import OverlapTerms
from specforge_lk.overlap.linear import Projection
from specforge_lk.overlap.operation import IMPLEMENTATIONS, linear_overlap, overlap_terms
from specforge_lk.overlap.target_terms import TargetTerms, projected_target_terms, target_terms

__all__ = [
    "IMPLEMENTATIONS",
    "OverlapTerms",
    "Projection",
    "TargetTerms",
    "linear_overlap",
    "overlap_terms",
    "projected_target_terms",
    "target_terms",
]
