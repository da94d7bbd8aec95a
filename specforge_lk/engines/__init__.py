"""What runs inside serving engines, to serve drafts that they have no code for."""

from typing import Final

#: vLLM's method that takes a proposer of drafts by the path of its class, and the path of ours.
VLLM_METHOD: Final = "custom_class"
VLLM_PROPOSER: Final = "specforge_lk.engines.vllm_proposer.LastStateProposer"
#: Drafts that it proposes with, by their names in `specforge_lk.drafts.table`.
VLLM_PROPOSED: Final = ("medusa", "mlp_speculator")

__all__ = ["VLLM_METHOD", "VLLM_PROPOSED", "VLLM_PROPOSER"]
