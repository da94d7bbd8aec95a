"""Which tokens the draft's rows stand for, and whose embeddings and LM head it has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch

from specforge_lk.doctor import edits
from specforge_lk.doctor.case import Case, read_tensors
from specforge_lk.doctor.findings import Finding, Weight
from specforge_lk.doctor.measure import SERVED, Edit, token_counts
from specforge_lk.doctor.reading import BLOCK, EAGLE

#: Share of the responses' tokens outside the draft vocabulary that is worth a word.
_UNCOVERED = 0.1


def truncates(case: Case) -> str:
    """Return why there is no draft vocabulary; empty where there is one."""
    return "" if case.draft.draft_ids is not None else "it drafts from the whole vocabulary"


def mapping_of_training(case: Case) -> Sequence[Finding]:
    """Compare the exported draft vocabulary with the training's file."""
    assert case.run is not None
    file = case.run.file("model", "vocab_mapping_path")
    if file is None:
        return []
    offsets = read_tensors(file, "d2t")["d2t"].long()
    trained = offsets + torch.arange(len(offsets))
    ids = case.draft.draft_ids
    ids = torch.arange(case.target.vocab_size) if ids is None else ids.cpu()
    if torch.equal(ids, trained):
        return []
    if len(ids) != len(trained):
        differ = f"{len(trained)} tokens, the export has {len(ids)}"
        return [
            Finding(
                "the draft vocabulary is of another size than the training's",
                f"{file}: {len(trained)} tokens",
                f"{len(ids)} tokens",
                "export again with --vocab-mapping of the training",
                Weight.UNKNOWN,
                caveat=f"the LM head does not fit the training's mapping ({differ})",
            )
        ]
    differing = int((ids != trained).sum())
    return [
        case.judged(
            f"{differing} of {len(ids)} rows of the LM head stand for other tokens than trained",
            trained=str(file),
            served="d2t of the export",
            remedy="export again with --vocab-mapping of the training",
            remedied=case.served.but(edits.vocabulary(trained, "the training's")),
        )
    ]


def mapping_order(case: Case) -> Sequence[Finding]:
    """Measure the draft with its vocabulary in order, and with d2t read as ids."""
    assert case.bench is not None and case.draft.draft_ids is not None
    ids = case.draft.draft_ids.cpu()
    orders = {"the same tokens in ascending order": ids.sort().values}
    raw = case.weights.get("d2t")
    allowed = range(case.target.vocab_size)
    if raw is not None and len(set(raw.tolist())) == len(raw) and set(raw.tolist()) <= {*allowed}:
        orders["d2t as target ids, not offsets"] = raw.long()
    candidates = {
        name: case.served.but(edits.vocabulary(order, name))
        for name, order in orders.items()
        if not torch.equal(order, ids)
    }
    best = case.better(candidates)
    if best is None:
        return []
    return [
        case.judged(
            "rows of the LM head stand for other tokens: another order of d2t fits better",
            trained=best[0],
            served="d2t of the export",
            remedy="export again with --vocab-mapping of the training",
            remedied=candidates[best[0]],
        )
    ]


def coverage(case: Case) -> Sequence[Finding]:
    """Count how many of the responses' tokens the draft vocabulary has."""
    assert case.bench is not None and case.draft.draft_ids is not None
    known = torch.zeros(case.target.vocab_size, dtype=torch.bool)
    known[case.draft.draft_ids.cpu()] = True
    here = _share(case, _counts(case), known)
    trained = "unknown"
    allowed = _UNCOVERED
    if case.features:
        counts: Counter[int] = Counter()
        for ids, mask in case.features.samples:
            counts.update(compress(ids, mask))
        there = _share(case, counts, known)
        trained, allowed = f"{there:.1%} of the training's tokens", max(0.02, 2 * (1 - there))
    if 1 - here <= allowed:
        return []
    return [
        Finding(
            "the draft vocabulary lacks tokens of these responses",
            trained,
            f"{here:.1%} of these responses' tokens",
            "train with a draft vocabulary that is counted on such responses, or a larger one",
            Weight.UNKNOWN,
            caveat="no draft with more tokens was measured: its τ would be higher by a part of "
            "the missing share at every draft position",
        )
    ]


def _counts(case: Case) -> Counter[int]:
    assert case.bench is not None
    return token_counts(case.bench.responses[SERVED])


def _share(case: Case, counts: Counter[int], known: torch.Tensor) -> float:
    inside = sum(count for token, count in counts.items() if known[token])
    return inside / max(1, counts.total())


# ------------------------------------------------------------- a draft that knows nothing


def knows_target(case: Case) -> Sequence[Finding]:
    """Compare the draft with one that only knows how frequent tokens are."""
    assert case.bench is not None
    served, frequencies = case.bench.measure(case.served), case.frequencies
    if served.tau >= frequencies.tau:
        return []
    return [
        Finding(
            "the draft accepts less than one that only knows how frequent tokens are",
            "another target, vocabulary or state of training",
            f"τ {served.tau:.3f}, token frequencies {frequencies.tau:.3f}",
            "look at the costs of the other findings first; else check that draft, target and "
            "vocabulary mapping belong together: a draft of another target, or one exported "
            "before it was trained, looks like this",
            Weight.UNKNOWN,
            caveat="what such a draft would accept when it is put right is not measured here",
        )
    ]


# ------------------------------------------------------------ embeddings and LM head


def has_embeddings(case: Case) -> str:
    """Return why there are no embeddings to compare; empty where there are."""
    if case.kind.name in BLOCK:
        return "embeddings and LM head are lent by the target"
    if case.kind.name not in (*EAGLE, "mtp"):
        return f"{case.kind.title}: not embedded with the target's matrix"
    return ""


def embeddings(case: Case) -> Sequence[Finding]:
    """Measure the draft with the target's embeddings and, of MTP, its LM head."""
    found = []
    parts: list[tuple[str, torch.Tensor, torch.Tensor, Edit]] = []
    draft: Any = case.draft
    theirs = case.target.model.get_input_embeddings().weight
    holder = draft._decoder if case.kind.name == "mtp" else draft
    parts.append(("embeddings", holder.embed_tokens.weight, theirs, edits.LEND_EMBEDDINGS))
    if case.kind.name == "mtp":
        parts.append(("LM head", draft._head.weight, case.target.head.weight, edits.LEND_HEAD))
    for name, mine, lent, edit in parts:
        if mine.shape == lent.shape and torch.equal(mine, lent):
            continue
        kind = edit.name.partition(":")[0]
        own, shared = case.served.without(kind), case.served.but(edit)
        if case.kind.name == "mtp" and "vllm" in case.engines:
            found.append(
                case.judged(
                    f"vLLM gives the MTP module the target's {name}, not its own",
                    trained="its own",
                    served="the target's",
                    remedy=f"train with the target's {name}, frozen, as specforge-lk does",
                    remedied=own,
                    as_served=shared,
                )
            )
        elif case.bench is not None and case.bench.cost(shared, own).exceeds(case.tolerance):
            found.append(
                case.judged(
                    f"the {name} of the export are not the target's, which fit better",
                    trained="the target's",
                    served="those of the export",
                    remedy="export again with --embedding-source of the target that it was "
                    "trained for, or remove embed_tokens.weight",
                    remedied=shared,
                    as_served=own,
                )
            )
    return found
