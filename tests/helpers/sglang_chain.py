"""Decode with SGLang's draft worker and verification around Markov models; print JSON counts.

Runs under sglang_stubs.py with a patched SGLang and the patch's own test, whose harness it uses,
on the path, and with TRITON_INTERPRET=1, so that SGLang's verify kernel runs on the CPU. The
interpreter takes some 20 ms per request, so a transcript of the kernel in torch (`sglang_kernels`),
which is compared with it here, decodes the many requests that a test of the distribution needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from unittest.mock import patch

import sglang_kernels
import test_rejection_sampling_hot_vocab as harness
import torch
from sglang.srt.speculative import reject_sampling, spec_utils

REQUESTS = 100_000
KERNEL_REQUESTS = 150
TOKENS = 3
TEMPERATURE = 0.7


class Decoder:
    """Independent requests that all start after token 0."""

    def __init__(self, requests: int) -> None:
        generator = torch.Generator().manual_seed(0)
        vocab, hot = harness.VOCAB, harness.HOT
        # A draft worth serving: its vocabulary covers most of p, and q resembles p there.
        self.target_logits = torch.randn(vocab, vocab, generator=generator)
        self.target_logits[:, hot] += 1
        noise = torch.randn(vocab, len(hot), generator=generator)
        self.draft_logits = self.target_logits[:, hot] + 0.7 * noise
        self.worker = harness.make_worker(self.draft_logits, hot)
        self.worker.server_args.max_running_requests = requests
        self.worker._rebuild_topk1_chain_buffers()
        self.temperatures = torch.full((requests, 1), TEMPERATURE)

    def cycle(self, last: torch.Tensor, kernel: Callable[..., None]) -> tuple[torch.Tensor, ...]:
        """Draft and verify once: tokens [requests, steps + 1] and how many of them are output."""
        first = harness.first_proposal(self.worker, last, self.temperatures)
        verify_input = harness.draft(self.worker, first, self.temperatures)
        target_logits = self.target_logits[verify_input.draft_token]
        sampling = harness.sampling(self.temperatures)
        tokens, counts, _ = harness.verify(verify_input, target_logits, sampling, kernel)
        return tokens.view(len(last), -1).long(), counts.long()

    def decode(self) -> dict[str, object]:
        """Counts of the first three output tokens, and of the first draft tokens accepted."""
        last = torch.zeros(len(self.temperatures), dtype=torch.int64)
        output = torch.zeros(len(last), TOKENS, dtype=torch.int64)
        filled, accepted = torch.zeros_like(last), None
        while (filled < TOKENS).any():
            tokens, counts = self.cycle(last, sglang_kernels.verification)
            accepted = int((counts > 1).sum()) if accepted is None else accepted
            for column in range(tokens.shape[1]):
                rows = ((column < counts) & (filled < TOKENS)).nonzero().squeeze(1)
                output[rows, filled[rows]] = tokens[rows, column]
                filled[rows] += 1
            last = tokens.gather(1, counts.unsqueeze(1) - 1).squeeze(1)
        weights = harness.VOCAB ** torch.arange(TOKENS - 1, -1, -1)
        cells = torch.bincount(output @ weights, minlength=harness.VOCAB**TOKENS)
        return {"cells": cells.tolist(), "accepted": accepted}


def kernel_equals_transcript() -> bool:
    """Both get the same probabilities and random numbers."""
    kernel = reject_sampling.chain_speculative_sampling_triton
    results = ("predicts", "accept_index", "accept_token_num")
    equal: list[bool] = []

    def both(**arguments) -> None:
        copies = {name: arguments[name].clone() for name in results}
        sglang_kernels.verification(**arguments | copies)
        kernel(**arguments)
        equal.extend(torch.equal(copies[name], arguments[name]) for name in results)

    last = torch.zeros(KERNEL_REQUESTS, dtype=torch.int64)
    Decoder(KERNEL_REQUESTS).cycle(last, both)
    return equal == [True] * len(results)


def scatter_to_the_first_ids(
    draft_probs: torch.Tensor, hot_token_id: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    return torch.nn.functional.pad(draft_probs, (0, vocab_size - len(hot_token_id)))


if __name__ == "__main__":
    torch.manual_seed(0)
    decoder = Decoder(REQUESTS)
    report = {
        "target": torch.softmax(decoder.target_logits / TEMPERATURE, -1).double().tolist(),
        "draft": spec_utils.scatter_draft_probs(
            torch.softmax(decoder.draft_logits / TEMPERATURE, -1), harness.HOT, harness.VOCAB
        ).tolist(),
        "decoded": decoder.decode(),
        "kernel_equals_transcript": kernel_equals_transcript(),
    }
    with patch.object(spec_utils, "scatter_draft_probs", scatter_to_the_first_ids):
        report["misplaced"] = decoder.decode()
    print(json.dumps(report))
