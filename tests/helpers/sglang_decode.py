"""Decode with SGLang's draft workers and verification around Markov models; save what they give.

Runs under sglang_stubs.py with a patched SGLang and the series' own test, whose harness it uses, on
the path, and with TRITON_INTERPRET=1: ``sglang_decode.py HARNESS CASES OUT``. CASES is JSON: the
rules [temperature, top-k, top-p] that requests of one batch take turns in, and the cases to decode.
OUT (.npz) receives the models' logits and, of each case, tokens [R, TOKENS] behind token 0 and the
verification steps that gave them [R].
"""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import numpy as np
import sglang_kernels
import torch
from sglang.kernels.ops.sampling import murmur_hash
from sglang.srt.sampling.sampling_params import TOP_K_ALL
from sglang.srt.speculative import eagle_worker_v2, spec_utils

harness: Any = importlib.import_module(sys.argv[1])

REQUESTS = 30_000
TOKENS = 6
#: What Triton's interpreter compares the kernels of `sglang_kernels` with.
COMPARED = 40


class Models:
    """Logits by the last token; a hot vocabulary that covers most of p, where q resembles p."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        vocab, hot = harness.VOCAB, harness.HOT
        self.target = torch.randn(vocab, vocab, generator=generator)
        self.target[:, hot] += 1
        noise = torch.randn(vocab, vocab, generator=generator)
        #: Of a draft with the target's vocabulary.
        self.full = self.target + 0.7 * noise
        self.hot = self.full[:, hot]


class Decoder:
    """Independent requests that all begin with token 0; their rules take turns.

    ``case`` may have ``server`` (fields of SGLang's arguments), ``seeded``, ``multi_layer``, and
    ``taken_back``: which part of the series is undone (see `taken_back`).
    """

    def __init__(self, case: dict[str, Any], rules: list[list[float]], requests: int) -> None:
        self.models, self.requests = Models(), requests
        temperature, top_k, top_p = torch.tensor(
            [rules[row % len(rules)] for row in range(requests)], dtype=torch.float64
        ).unbind(1)
        given = {
            "top_ks": torch.where(top_k > 0, top_k, TOP_K_ALL).to(torch.int32),
            "top_ps": top_p.float(),
        }
        if case.get("seeded"):
            given["sampling_seed"] = torch.arange(requests)
        self.sampling = harness.sampling(temperature.float()[:, None], **given)
        self.multi_layer = case.get("multi_layer", False)
        if self.multi_layer:
            self.worker = harness.make_multi_layer_worker(self.models.full)
        else:
            self.worker = harness.make_worker(self.models.hot, harness.HOT)

    def step(self, last: torch.Tensor, lengths: torch.Tensor, kernel: Any) -> tuple[Any, Any]:
        """Draft and verify once: tokens [R, steps + 1] and how many of them are output."""
        if self.multi_layer:
            first = harness.multi_layer_proposal(self.worker, last, self.sampling)
        else:
            first = harness.first_proposal(self.worker, last, self.sampling, lengths)
        verify_input = harness.draft(self.worker, first, self.sampling, lengths.clone())
        logits = self.models.target[verify_input.draft_token]
        tokens, counts, _ = harness.verify(verify_input, logits, self.sampling, kernel, lengths)
        return tokens.view(len(last), -1).long(), counts.long()

    def decode(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the first tokens behind token 0 [R, TOKENS], and verification steps [R]."""
        last = torch.zeros(self.requests, dtype=torch.int64)
        output = torch.zeros(self.requests, TOKENS, dtype=torch.int64)
        lengths, filled, steps = (
            torch.ones_like(last),
            torch.zeros_like(last),
            torch.zeros_like(last),
        )
        while (filled < TOKENS).any():
            tokens, counts = self.step(last, lengths, sglang_kernels.verification)
            steps += filled < TOKENS
            for column in range(tokens.shape[1]):
                rows = ((column < counts) & (filled < TOKENS)).nonzero().squeeze(1)
                output[rows, filled[rows]] = tokens[rows, column]
                filled[rows] += 1
            last = tokens.gather(1, counts.unsqueeze(1) - 1).squeeze(1)
            lengths = lengths + counts
        return output.numpy(), steps.numpy()


def to_the_first_ids(
    draft_probs: torch.Tensor, hot_token_id: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    return torch.nn.functional.pad(draft_probs, (0, vocab_size - len(hot_token_id)))


def unfiltered(logits: torch.Tensor, temperatures: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """sample_draft_proposal, but for the q that it returns."""
    _, topk_p, topk_index = spec_utils.sample_draft_proposal(logits, temperatures, *args, **kwargs)
    return torch.softmax(logits / temperatures, dim=-1), topk_p, topk_index


#: By name, what is undone: q at other tokens, or another q than X was drawn from.
TAKEN_BACK = {
    "scatter": (spec_utils, "scatter_draft_probs", to_the_first_ids),
    "filtered q": (eagle_worker_v2, "sample_draft_proposal", unfiltered),
}


def environment(case: dict[str, Any]) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(harness.published(max_running_requests=REQUESTS, **case.get("server", {})))
    stack.enter_context(patch.object(murmur_hash, "murmur_hash32", sglang_kernels.murmur_hash32))
    if undone := case.get("taken_back"):
        stack.enter_context(patch.object(*TAKEN_BACK[undone]))
    return stack


def kernels_are_transcribed(rules: list[list[float]]) -> bool:
    """Whether Triton's interpreter gives what `sglang_kernels` does, from equal random numbers."""
    results = ("predicts", "accept_index", "accept_token_num")
    equal: list[bool] = []

    def both(**arguments: Any) -> None:
        copies = {name: arguments[name].clone() for name in results}
        sglang_kernels.verification(**arguments | copies)
        harness.reject_sampling.chain_speculative_sampling_triton(**arguments)
        equal.extend(torch.equal(copies[name], arguments[name]) for name in results)

    last, lengths = torch.zeros(2, COMPARED, dtype=torch.int64).unbind()
    for block in (False, True):
        with environment({"server": {"speculative_use_block_verification": block}}):
            Decoder({}, rules, COMPARED).step(last, lengths, both)
    seeds = torch.tensor([0, 1, 42, 2**40 + 3])
    arguments = seeds.to(torch.uint64), (seeds + 7).to(torch.uint64), torch.arange(50)
    hashed = torch.empty(len(seeds), 50, dtype=torch.uint32)
    murmur_hash.murmur_hash32_kernel[(len(seeds), 1)](*arguments, hashed, 4, 50, BLOCK_SIZE=64)
    equal.append(torch.equal(hashed.long(), sglang_kernels.murmur_hash32(*arguments)))
    return equal == [True] * (2 * len(results) + 1)


if __name__ == "__main__":
    torch.manual_seed(0)
    asked = json.loads(sys.argv[2])
    models = Models()
    saved: dict[str, Any] = {
        "target": models.target,
        "hot": models.hot,
        "full": models.full,
        "ids": harness.HOT,
        "kernels": kernels_are_transcribed(asked["rules"]),
    }
    for case in asked["cases"]:
        with environment(case):
            saved[f"{case['name']}/tokens"], saved[f"{case['name']}/steps"] = Decoder(
                case, asked["rules"], REQUESTS
            ).decode()
    np.savez(sys.argv[3], **saved)
