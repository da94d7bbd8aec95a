"""One pass of target and draft along recorded responses: acceptance wherever a round may begin."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from specforge_lk.data.conversations import Tokens
from specforge_lk.data.prompts import DataError
from specforge_lk.decode.draft import Draft
from specforge_lk.decode.sampling import Shape, probabilities, shape
from specforge_lk.decode.target import Target
from specforge_lk.evaluate.acceptance import TargetRows, rule_of
from specforge_lk.evaluate.rounds import Rounds
from specforge_lk.evaluate.settings import Advance, Settings, silent
from specforge_lk.serving import Sampling, Serving

#: Rows of [rows, V] float32 that exist at once: 200 MB at V = 49152, 600 MB at 152k.
ROWS = 1024
#: Attention scores per attention head that exist at once: 0.5 GB in float32 with 32 heads.
SCORES = 1 << 22


@torch.inference_mode()
def measure_responses(
    target: Target,
    wanted: Sequence[tuple[Draft, Sequence[Serving]]],
    conversations: Sequence[Tokens],
    settings: Settings,
    advance: Advance = silent,
) -> list[dict[Serving, Rounds]]:
    """Measure the exact acceptance along the responses of tokenized conversations.

    The target runs once per batch, whatever the number of drafts and rules. What the loss mask
    marks without a gap is one response.

    Args:
        target: the target model.
        wanted: drafts, each with the rules to measure it under.
        conversations: tokenized responses.
        settings: see `Settings`.
        advance: see `Advance`; the total is that of the conversations' tokens.

    Returns:
        For every entry of ``wanted``, the measurement under each of its rules.

    Raises:
        DataError: no response has two tokens, so that decoding none needs a round; or one begins a
            text, where no prompt is that a target could have answered.
    """
    for conversation in conversations:
        if conversation.loss_mask[0]:
            raise DataError(
                "a conversation begins with a response: the chat template puts nothing before it; "
                "give conversations that begin with a user's message"
            )
    parts: list[dict[Serving, list[Rounds]]] = [{rule: [] for rule in rules} for _, rules in wanted]
    layers = tuple(sorted({layer for draft, _ in wanted for layer in draft.capture_layers}))
    heads = settings.heads
    for batch in _batches(conversations, settings.batch_size):
        tokens, mask, places = _pad([conversations[i] for i in batch], heads, target.device)
        output = target.forward(tokens, mask, layers=layers)
        captured = dict(zip(layers, output.features.chunk(len(layers), -1), strict=True))
        states = _TargetAlong(target, output.hidden, tokens, places)
        conversation = np.array(batch)[places.row_of_response]
        for (draft, rules), part in zip(wanted, parts, strict=True):
            features = torch.cat([captured[layer] for layer in draft.capture_layers], -1)
            logits: Iterable[torch.Tensor] = ()
            if len(places.row):
                logits = draft.teacher_forced(tokens, features, places.starts, heads)
            measured = _measure(states, logits, draft.draft_ids, rules, heads)
            for rule, arrays in measured.items():
                part[rule].append(Rounds(conversation, places.length, *arrays))
        count = int(mask.sum())
        advance(count, count)
    if not any(len(found.alpha) for by_rule in parts for of in by_rule.values() for found in of):
        raise DataError(
            "no response that fits has two tokens or more, so that none needs a round of "
            "speculative decoding; give longer responses, raise --max-length or lower --heads"
        )
    return [{rule: _concatenate(found) for rule, found in part.items()} for part in parts]


def _batches(conversations: Sequence[Tokens], batch_size: int) -> Iterator[list[int]]:
    """Batches of conversations, shortest first, of bounded attention scores.

    Teacher forcing holds scores [B, attention heads, L, L] at once.
    """
    batch: list[int] = []
    for index in sorted(range(len(conversations)), key=lambda i: len(conversations[i].input_ids)):
        scores = (len(batch) + 1) * len(conversations[index].input_ids) ** 2
        if batch and (scores > SCORES or len(batch) == batch_size):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@dataclass(frozen=True)
class Places:
    """Where responses are in a padded batch, and where rounds may begin.

    Attributes:
        row_of_response: [C] row of the batch of every response.
        length: [C] its tokens.
        starts: [B, L] bool, chain starts: the next token is known and of the response, and so is
            the one after it, which the first draft position predicts.
        row, position: [N] where the chain starts are.
        left: [N] tokens of the response behind the one known: what a round can give at most.
    """

    row_of_response: np.ndarray
    length: np.ndarray
    starts: torch.Tensor
    row: torch.Tensor
    position: torch.Tensor
    left: torch.Tensor

    @classmethod
    def of(cls, response: np.ndarray, device: torch.device) -> Places:
        """Find the responses in [B, L] bool, each a run of True in a row."""
        edges = np.diff(np.pad(response, ((0, 0), (1, 1))).astype(np.int8), axis=1)
        row, first = (edges == 1).nonzero()
        _, end = (edges == -1).nonzero()
        starts = np.zeros_like(response)
        # The token at first is known to the first round, which begins at the position before it.
        starts[:, :-2] = response[:, 1:-1] & response[:, 2:]
        at = starts.nonzero()
        ends = np.zeros_like(response, dtype=np.int64)
        for of, begin, stop in zip(row, first, end, strict=True):
            ends[of, begin:stop] = stop
        left = ends[at[0], at[1] + 1] - at[1] - 2
        tensors = (torch.from_numpy(values).to(device) for values in (starts, *at, left))
        return cls(row, end - first, *tensors)


def _pad(
    conversations: list[Tokens], heads: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, Places]:
    """Return right-padded tokens and attention mask [B, L], and where the responses are.

    There are ``heads`` + 1 columns more than the longest conversation has, so that every chain
    fits.
    """
    longest = max(len(c.input_ids) for c in conversations) + heads + 1
    tokens = np.zeros((len(conversations), longest), dtype=np.int64)
    response, mask = np.zeros_like(tokens, dtype=bool), np.zeros_like(tokens, dtype=bool)
    for row, conversation in enumerate(conversations):
        here = slice(len(conversation.input_ids))
        tokens[row, here] = conversation.input_ids
        response[row, here] = conversation.loss_mask
        mask[row, here] = True
    places = Places.of(response, device)
    return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device), places


def _concatenate(parts: list[Rounds]) -> Rounds:
    """Join batches, in the order of the conversations and of the responses in each."""
    conversation = np.concatenate([part.conversation for part in parts])
    length = np.concatenate([part.length for part in parts])
    order = np.argsort(conversation, kind="stable")
    tokens = np.maximum(length - 1, 0)
    first = tokens.cumsum() - tokens
    rows = [np.arange(first[i], first[i] + tokens[i]) for i in order]
    taken = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts])[taken]
        for name in ("alpha", "past", "coverage", "off_rule")
    }
    return Rounds(conversation[order], length[order], **joined)


class _TargetAlong:
    """The target's distributions at the positions that the chains of a batch predict from.

    Attributes:
        rows: [N, K] where `under` has the distribution that each draft position of every chain
            start is compared with; 0 where there is none.
        exists: [N, K] bool, whether there is one: the response goes on as far.
    """

    def __init__(
        self, target: Target, hidden: torch.Tensor, tokens: torch.Tensor, places: Places
    ) -> None:
        self._target = target
        # Every chain start is one token before a position that its first draft position reads.
        self._hidden = hidden[places.row, places.position + 1]
        self._tokens = tokens[places.row, places.position + 2]
        self._left = places.left
        #: Draft vocabularies with the logits on each.
        self._known: list[tuple[torch.Tensor | None, torch.Tensor]] = []
        self._shapes: dict[Sampling, Shape] = {}
        self._token_logits = torch.empty(0)
        self._best = torch.empty(0, dtype=torch.long)

    def reached(self, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return [N, K] rows of `under` that the draft positions are compared with.

        The second is bool, whether there is one: the response goes on as far. Chain starts of a
        response follow each other, so that the next ones are at the next tokens.
        """
        ahead = torch.arange(heads, device=self._left.device)
        exists = ahead < self._left[:, None]
        own = torch.arange(len(self._left), device=ahead.device)[:, None]
        return torch.where(exists, own + ahead, 0), exists

    def under(self, ids: torch.Tensor | None, samplings: Sequence[Sampling]) -> list[TargetRows]:
        """Return the distributions [N, V_d] on a draft vocabulary under every sampling.

        One pass of the LM head serves all of them, and all drafts with this vocabulary.
        """
        logits = self._logits_on(ids, samplings)
        vocabulary = self._target.vocab_size
        of_target = torch.arange(vocabulary, device=self._best.device)
        if ids is not None:
            of_target = torch.full_like(of_target, -1)
            of_target[ids] = torch.arange(len(ids), device=ids.device)
        best, token = of_target[self._best], of_target[self._tokens]
        found = []
        for sampling in samplings:
            of = self._shapes.get(sampling) or Shape(*[self._token_logits] * 3)
            if sampling.temperature == 0:
                probability = (self._best == self._tokens).to(logits.dtype)
            else:
                probability = probabilities(self._token_logits[:, None], of, sampling).squeeze(1)
            own = torch.arange(len(logits), device=logits.device)
            found.append(TargetRows(logits, own, of, sampling, best, token, probability))
        return found

    def _logits_on(self, ids: torch.Tensor | None, samplings: Sequence[Sampling]) -> torch.Tensor:
        hot = [s for s in dict.fromkeys(samplings) if s.temperature > 0]
        for known, logits in self._known:
            if _same(known, ids) and set(hot) <= self._shapes.keys():
                return logits
        on_draft, best, token = [], [], []
        shapes: dict[Sampling, list[Shape]] = {s: [] for s in hot}
        for hidden, tokens in zip(self._hidden.split(ROWS), self._tokens.split(ROWS), strict=True):
            logits = self._target.logits(hidden)
            on_draft.append(logits if ids is None else logits[:, ids])
            best.append(logits.argmax(-1))
            token.append(logits.gather(1, tokens[:, None]).squeeze(1))
            for sampling, parts in shapes.items():
                parts.append(shape(logits, sampling))
        self._best, self._token_logits = torch.cat(best), torch.cat(token)
        for sampling, parts in shapes.items():
            self._shapes[sampling] = Shape(*map(torch.cat, zip(*parts, strict=True)))
        self._known.append((ids, torch.cat(on_draft)))
        return self._known[-1][1]


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two draft vocabularies are the same; None is the whole vocabulary."""
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _measure(
    states: _TargetAlong,
    draft_logits: Iterable[torch.Tensor],
    ids: torch.Tensor | None,
    rules: Sequence[Serving],
    heads: int,
) -> Mapping[Serving, tuple[np.ndarray, ...]]:
    """Return alpha, past, coverage and off_rule of `Rounds` of one draft under every rule.

    Args:
        states: the target along the responses of a batch.
        draft_logits: K times [N, V_d], the draft's.
        ids: [V_d] target id of every draft index; None when V_d = V.
        rules: the rules.
        heads: number of draft positions K.
    """
    rows, exists = states.reached(heads)
    found = {}
    if not len(rows):
        nothing = np.zeros((0, heads), np.float32)
        return dict.fromkeys(rules, (nothing, nothing, nothing[:, 0], nothing[:, 0] > 0))
    targets = states.under(ids, [rule.target for rule in rules])
    zeros = targets[0].logits.new_zeros(rows.shape)
    alpha, past = ({rule: zeros.clone() for rule in rules} for _ in range(2))
    weights = {rule: torch.ones_like(zeros[:, 0]) for rule in rules}
    for head, logits in enumerate(draft_logits):
        for some in exists[:, head].nonzero().squeeze(1).split(ROWS):
            q_logits, at = logits[some], rows[some, head]
            for rule, p in zip(rules, targets, strict=True):
                accepted = rule_of(rule)(p[at], q_logits, rule.draft, weights[rule][some])
                alpha[rule][some, head] = accepted.alpha.to(zeros.dtype)
                past[rule][some, head] = accepted.past.to(zeros.dtype)
                weights[rule][some] = accepted.weight.to(zeros.dtype)
    for rule, p in zip(rules, targets, strict=True):
        coverage = torch.cat([p[at].coverage for at in p.rows.split(ROWS)])
        columns = (alpha[rule], past[rule], coverage, p.token_probability == 0)
        found[rule] = tuple(column.cpu().numpy() for column in columns)
    return found


__all__ = ["Places", "measure_responses"]
