"""The tokens of training beside those of serving: mask token, chat template, loss mask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from specforge_lk.data.conversations import Tokens
from specforge_lk.data.messages import messages_in
from specforge_lk.data.rows import MalformedRow
from specforge_lk.doctor import edits
from specforge_lk.doctor.case import Case
from specforge_lk.doctor.findings import Finding, Weight
from specforge_lk.doctor.measure import SERVED
from specforge_lk.doctor.reading import BLOCK

#: Share of samples that may differ for reasons of their own.
_ODD = 0.05
#: Special tokens that are tried as the mask token.
_TRIED = 8
#: Names of responses whose prompts are as in training.
_BEGINNING, _SYSTEM = "the training's beginning", "the training's system prompt"


def has_mask_token(case: Case) -> str:
    """Return why there is no mask token; empty where there is one."""
    if case.kind.name in (*BLOCK, "peagle"):
        return ""
    return f"{case.kind.title}: no mask token"


def mask_token(case: Case) -> Sequence[Finding]:
    """Compare the mask token with the training's, or else measure the target's special tokens."""
    draft: Any = case.draft
    now = int(draft.mask_token)
    tokenizer = case.target.tokenizer
    named = None
    if case.run:
        config = case.run.draft_config
        block = (config.get("dflash_config") or {}).get("mask_token_id")
        named = case.run.get("model", "mask_token_id", config.get("ptd_token_id") or block)
    setting = "ptd_token_id" if case.kind.name == "peagle" else "dflash_config.mask_token_id"

    def show(token: int) -> str:
        return f"{token} ({tokenizer.convert_ids_to_tokens(token)!r})"

    if named is not None and int(named) != now:
        return [
            case.judged(
                "the mask token is not that of the training",
                trained=show(int(named)),
                served=show(now),
                remedy=f"set {setting} of the export to {named}",
                remedied=case.served.but(edits.mask_token(int(named))),
            )
        ]
    if case.bench is None or named is not None:
        return []
    special = [tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
    special += [0, case.target.vocab_size - 1, *tokenizer.all_special_ids[:_TRIED]]
    others = {int(token) for token in special if token is not None} - {now}
    best = case.better(
        {str(token): case.served.but(edits.mask_token(token)) for token in sorted(others)}
    )
    if best is None:
        return []
    token = int(best[0])
    return [
        case.judged(
            "another mask token fits the draft better",
            trained=show(token),
            served=show(now),
            remedy=f"set {setting} of the export to {token}, if model.mask_token_id of the "
            "training was that",
            remedied=case.served.but(edits.mask_token(token)),
        )
    ]


# ------------------------------------------------------------------- chat template


def _frame(case: Case) -> tuple[list[int], list[int]]:
    """Return the tokens that serving puts before and after a user's first message."""
    contents = ("a", "9 9", "Zz")
    rendered = [
        case.target.chat.prompt_ids([{"role": "user", "content": content}]) for content in contents
    ]
    reverse = [ids[::-1] for ids in rendered]
    return _common(rendered), _common(reverse)[::-1]


def _common(rows: Sequence[list[int]]) -> list[int]:
    """Return what all rows begin with."""
    first, *rest = rows
    length = 0
    while length < len(first) and all(
        row[length : length + 1] == first[length : length + 1] for row in rest
    ):
        length += 1
    return first[:length]


def chat_template(case: Case) -> Sequence[Finding]:
    """Compare how the training's samples begin with how serving begins a conversation."""
    assert case.features is not None
    before, _ = _frame(case)
    samples = [ids for ids, _ in case.features.samples]
    other = [ids for ids in samples if ids[: len(before)] != before]
    if len(other) <= _ODD * len(samples):
        return []
    trained = _common(other)
    show = case.target.tokenizer.decode
    condition = case.served
    caveat = ""
    if case.bench is not None:
        case.bench.responses[_BEGINNING] = [
            Tokens(
                trained + tokens.input_ids[len(before) :],
                [0] * len(trained) + tokens.loss_mask[len(before) :],
            )
            if tokens.input_ids[: len(before)] == before
            else tokens
            for tokens in case.bench.responses[SERVED]
        ]
        condition = replace(condition, responses=_BEGINNING)
        caveat = "measured on the same responses after the training's beginning"
    return [
        case.judged(
            f"{len(other)} of {len(samples)} samples of the training begin otherwise than "
            "conversations that are served",
            trained=repr(show(trained)),
            served=repr(show(before)),
            remedy="capture with the template and the system prompt that are served, or serve "
            "those of the training",
            remedied=condition,
            caveat=caveat,
        )
    ]


def system_prompt(case: Case) -> Sequence[Finding]:
    """Look for a system prompt that SpecForge's own tokenization adds in training."""
    assert case.run is not None
    if not case.run.get("data", "train_data_path"):
        return []
    from specforge.data.template import TEMPLATE_REGISTRY

    name = case.run.get("data", "chat_template", "llama3")
    prompt = TEMPLATE_REGISTRY.get(name).system_prompt
    rendered = case.target.tokenizer.decode(
        case.target.chat.prompt_ids([{"role": "user", "content": "a"}])
    )
    if not prompt or prompt in rendered:
        return []
    condition, caveat = case.served, ""
    if case.bench is not None:
        system = {"role": "system", "content": prompt}
        chat = case.target.chat
        try:
            case.bench.responses[_SYSTEM] = [
                tokens
                for row in case.rows
                for tokens in chat.tokenize(
                    {**row, "conversations": [system, *messages_in(row)], "messages": None}
                )
            ]
            condition = replace(condition, responses=_SYSTEM)
            caveat = "measured on the same responses after the training's system prompt"
        except MalformedRow as error:
            caveat = f"its cost cannot be measured: {error}"
    return [
        case.judged(
            f"SpecForge's template data.chat_template={name} adds a system prompt in training",
            trained=repr(prompt),
            served="no system prompt, or another one",
            remedy="train on specforge-lk's tokens (capture, or data.prompts_path), or serve that "
            "system prompt",
            remedied=condition,
            caveat=caveat,
        )
    ]


# ------------------------------------------------------------- supervised positions


def _supervised(mask: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the spans of ones."""
    begin = None
    for index, value in enumerate([*mask, 0]):
        if value and begin is None:
            begin = index
        elif not value and begin is not None:
            yield begin, index
            begin = None


def supervised_positions(case: Case) -> Sequence[Finding]:
    """Compare the loss masks of the training with where serving's template has responses."""
    assert case.features is not None
    _, header = _frame(case)
    ends = {*case.target.eos_ids, case.target.tokenizer.eos_token_id}
    shifts: Counter[int | None] = Counter()
    unfinished = spans = 0
    for ids, mask in case.features.samples:
        for begin, end in _supervised(mask):
            spans += 1
            shifts[_shift(ids, begin, header)] += 1
            unfinished += end < len(ids) and ids[end] in ends
    found = []
    wrong = spans - shifts[0]
    if wrong > _ODD * spans:
        by = next(shift for shift, _ in shifts.most_common() if shift != 0)
        moved = "elsewhere" if by is None else f"{by:+d} tokens from there"
        found.append((f"{wrong} of {spans} responses begin {moved} in the loss mask", moved))
    if unfinished > _ODD * spans:
        found.append(
            (f"{unfinished} of {spans} loss masks end before the end-of-turn token", "before it")
        )
    return [
        Finding(
            what,
            trained,
            "from the first token after the assistant's header to the end-of-turn token",
            "capture again with the target's own chat template: these are the positions that "
            "decoding meets",
            Weight.UNKNOWN,
            caveat="what a draft would have learned at other positions cannot be measured",
        )
        for what, trained in found
    ]


def _shift(ids: Sequence[int], begin: int, header: list[int]) -> int | None:
    """Return how far a span begins after the header before it, within a few tokens."""
    for by in sorted(range(-4, 5), key=abs):
        at = begin - by
        if at >= len(header) and list(ids[at - len(header) : at]) == header:
            return by
    return None
