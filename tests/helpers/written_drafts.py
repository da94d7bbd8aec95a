"""Drafts that are written down and a target that they predict well."""

from __future__ import annotations

import torch
from tiny_target import build_model, build_tokenizer

from specforge_lk.decode.draft import Proposal
from specforge_lk.decode.sampling import choose
from specforge_lk.decode.target import Target


class Endless(Target):
    """A target whose responses never end, so that every cycle counts in full."""

    eos_ids = frozenset()


class Oracle:
    """A draft that knows the target's greedy continuation and errs at every fifth position."""

    algorithm = "oracle"
    capture_layers = (0,)
    draft_ids = None
    max_heads = None

    def __init__(self, sequences):
        self.sequences = sequences

    def start(self, batch, capacity):
        self.rows = torch.arange(batch)

    def observe(self, tokens, features, positions, valid):
        assert features.shape[:2] == tokens.shape
        self.position = (positions * valid).amax(1)

    def propose(self, heads, sampling, generator):
        index = torch.zeros(len(self.rows), heads, dtype=torch.long)
        for i, (row, start) in enumerate(
            zip(self.rows.tolist(), self.position.tolist(), strict=True)
        ):
            for head in range(heads):
                at = start + 2 + head
                known = self.sequences[row]
                right = known[at] if at < len(known) else 0
                index[i, head] = right + 1 if at % 5 == 0 else right
        logits = torch.nn.functional.one_hot(index, 264).double()
        return Proposal(index, index, logits)

    def keep_rows(self, rows):
        self.rows, self.position = self.rows[rows], self.position[rows]


class Bigram(Oracle):
    """Drafts from the target's logits after the last token alone, on the even half of the ids."""

    draft_ids = torch.arange(0, 264, 2)

    def __init__(self, target):
        with torch.inference_mode():
            self.table = target.model(torch.arange(264)[:, None]).logits[:, 0, self.draft_ids]

    def observe(self, tokens, features, positions, valid):
        last = torch.where(valid, torch.arange(valid.shape[1]), -1).amax(1, keepdim=True)
        self.position = tokens.gather(1, last)  # the last token is all it looks at

    def propose(self, heads, sampling, generator):
        token, index, logits = self.position, [], []
        for _ in range(heads):
            logits.append(self.table[token])
            index.append(choose(logits[-1], sampling, generator))
            token = self.draft_ids[index[-1]]
        index = torch.cat(index, 1)
        return Proposal(index, self.draft_ids[index], torch.cat(logits, 1))

    def teacher_forced(self, tokens, features, starts, heads):
        row, position = starts.nonzero(as_tuple=True)
        for head in range(heads):
            yield self.table[tokens[row, position + 1 + head]]


def nearly_bigram(kind: type[Target]) -> Target:
    """Return a target whose last token matters most, as `Bigram` assumes."""
    model = build_model(layers=1).double()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.1
        layer.mlp.down_proj.weight.data *= 0.1
    return kind(model, build_tokenizer())
