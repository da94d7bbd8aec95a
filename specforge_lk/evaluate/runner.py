"""Acceptance of drafts: sampled τ on benchmarks, and exact expected τ on held-out responses.

The acceptance rates here are computed from the definition α = Σ_{x∈D} min(p(x), q(x)), with p over
the full vocabulary and never renormalised. Nothing is shared with the training objective, because
these figures are the check on it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal, Protocol, Self
from urllib.parse import quote

import numpy as np
import torch

from specforge_lk.data.conversations import Tokens, prompt_ids, tokenize
from specforge_lk.data.prompts import (
    HUB_PREFIX,
    DataError,
    read_rows,
    user_turns,
)
from specforge_lk.decode.draft import Draft, DraftError
from specforge_lk.decode.prefill import Prefills
from specforge_lk.decode.sampling import distribution
from specforge_lk.decode.speculate import Generation, speculate
from specforge_lk.decode.target import Target
from specforge_lk.evaluate.report import HELD_OUT, Paired, Report, Result, read_report, versions

RESAMPLES = 1000
#: Rows of [rows, V] float32 that exist at once: 200 MB at V = 49152, 600 MB at 152k.
_ROWS = 1024
#: Attention scores per attention head that exist at once: 0.5 GB in float32 with 32 heads.
_SCORES = 1 << 22
#: Part of every fingerprint; raise it when a change makes earlier figures incomparable.
_MEASUREMENT = 1

#: Called with tokens processed, and with the share of the announced total they stand for.
Advance = Callable[[int, int], None]


class Progress(Protocol):
    """A progress display, such as `specforge_lk.cli.progress.ProgressBar`."""

    def advance(self, items: int, work: int) -> None:
        """Count ``items`` for the rate and ``work`` towards the total."""
        ...


#: Opens a progress display: (description, total).
Track = Callable[[str, int], AbstractContextManager[Progress]]


def _silent(items: int, work: int) -> None:
    """No progress display."""


@dataclass(frozen=True)
class Settings:
    """What an evaluation's figures depend on, beside the models and the data.

    Attributes:
        heads: drafted tokens per cycle, K.
        draft_sampling: ``probabilistic`` samples the draft from q; ``greedy`` drafts argmax q at
            any temperature, as engines do by default (the article's Appendix D).
        max_new_tokens: longest benchmark response.
        limit: rows of each benchmark to use, from its start; None for all.
        held_out_limit: the same for held-out responses.
        batch_size: prompts (conversations) per batch.
        max_length: longest prompt or conversation, in tokens; longer ones are left out.
        turns: benchmark turns to answer (MT-bench has two).
        seed: of all sampling and of the bootstrap.
    """

    heads: int = 7
    draft_sampling: Literal["probabilistic", "greedy"] = "probabilistic"
    max_new_tokens: int = 256
    limit: int | None = None
    held_out_limit: int | None = None
    batch_size: int = 32
    max_length: int = 2048
    turns: int = 1
    seed: int = 0


@dataclass(frozen=True)
class LoadedDraft:
    """A draft with the names it is reported under: its training loss and training seed."""

    loss: str
    seed: int
    path: str
    model: Draft


# Intervals


def _resamples(count: int, seed: int) -> np.ndarray:
    """[RESAMPLES, count] how often each of ``count`` entries is drawn."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)


def _interval(values: np.ndarray) -> list[float]:
    return [float(bound) for bound in np.percentile(values, [2.5, 97.5])]


def bootstrap_ratio(numerator: np.ndarray, denominator: np.ndarray, seed: int) -> list[float]:
    """95 % percentile interval of Σ numerator / Σ denominator, resampling the entries [C]."""
    weights = _resamples(len(numerator), seed)
    total = weights @ denominator
    return _interval((weights @ numerator)[total > 0] / total[total > 0])


def _nullable(values: Iterable[float]) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


# Benchmarks: sampled τ


def pooled_tau(accepted: int, drafted: int, heads: int) -> float:
    """τ = K · accepted / drafted + 1, pooled over all drafted tokens."""
    return heads * accepted / drafted + 1


@dataclass(frozen=True)
class _Arrays:
    """Arrays of one measurement, kept in a file beside the report."""

    def save(self, path: Path) -> None:
        """Write the arrays to an .npz file, through a temporary one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.npz")
        np.savez_compressed(temporary, **asdict(self))
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read arrays written by `save`."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{name: arrays[name] for name in arrays.files})


@dataclass(frozen=True)
class Drafted(_Arrays):
    """What one draft proposed in every prompt of a benchmark.

    Attributes:
        prompt: [N] row of the prompt.
        drafted: [N] drafted tokens.
        accepted: [N] accepted ones among them.
    """

    prompt: np.ndarray
    drafted: np.ndarray
    accepted: np.ndarray

    def resampled_tau(self, heads: int, weights: np.ndarray) -> np.ndarray:
        """Pooled τ of every resample of the prompts; NaN where nothing was drafted."""
        with np.errstate(invalid="ignore"):
            return heads * (weights @ self.accepted) / (weights @ self.drafted) + 1


def paired_benchmark_difference(
    a: Drafted, b: Drafted, heads: int, seed: int = 0
) -> tuple[float, list[float]]:
    """Pooled τ_a - τ_b over the same prompts, and its 95 % interval.

    The bootstrap resamples prompts, the same ones for both drafts: what makes a prompt easy for
    both does not widen the interval.

    Raises:
        ValueError: the two did not draft for the same prompts.
    """
    if not np.array_equal(a.prompt, b.prompt):
        raise ValueError(
            "the two drafts were measured on different prompts; evaluate both with the same "
            "benchmark file, --limit and --max-length"
        )
    everything = np.ones((1, len(a.prompt)))
    (difference,) = a.resampled_tau(heads, everything) - b.resampled_tau(heads, everything)
    weights = _resamples(len(a.prompt), seed)
    differences = a.resampled_tau(heads, weights) - b.resampled_tau(heads, weights)
    return float(difference), _interval(differences[~np.isnan(differences)])


def measure_benchmark(
    target: Target,
    draft: Draft,
    prompts: Sequence[Sequence[str]],
    temperature: float,
    settings: Settings,
    prefills: Prefills | None = None,
    advance: Advance = _silent,
) -> tuple[dict, Drafted]:
    """Speculative decoding of benchmark prompts.

    Args:
        target: the target model.
        draft: the draft model.
        prompts: user turns of every prompt.
        temperature: of target and draft.
        settings: see `Settings`.
        prefills: target states of the prompts' first turns, shared between measurements.
        advance: see `Advance`; all prompts and turns stand for max_new_tokens each.

    Returns:
        The fields of a `Result` that it measures, and the counts of every prompt.
    """
    generator = torch.Generator(target.device).manual_seed(settings.seed)
    chats: list[list[dict]] = [[] for _ in prompts]
    per_prompt: list[list[Generation]] = [[] for _ in prompts]
    skipped = 0
    for turn in range(settings.turns):
        encoded = {}
        for index, turns in enumerate(prompts):
            if turn < len(turns) and len(per_prompt[index]) == turn:
                chats[index].append({"role": "user", "content": turns[turn]})
                encoded[index] = prompt_ids(target.tokenizer, chats[index])
        longest = target.max_positions - settings.max_new_tokens - settings.heads - 1
        usable = {
            i: ids for i, ids in encoded.items() if len(ids) <= min(longest, settings.max_length)
        }
        skipped += len(encoded) - len(usable)
        advance(0, (len(encoded) - len(usable)) * settings.max_new_tokens)
        for batch in _even_batches(sorted(usable, key=lambda i: len(usable[i])), settings):
            generations = speculate(
                target,
                draft,
                [usable[index] for index in batch],
                heads=settings.heads,
                temperature=temperature,
                greedy_draft=settings.draft_sampling == "greedy",
                max_new_tokens=settings.max_new_tokens,
                prefills=None if turn else prefills,
                generator=generator,
                advance=advance,
            )
            for index, generation in zip(batch, generations, strict=True):
                per_prompt[index].append(generation)
                text = target.tokenizer.decode(
                    generation.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
                chats[index].append({"role": "assistant", "content": text})

    flat = [generation for generations in per_prompt for generation in generations]
    drafted = sum(g.drafted for g in flat)
    accepted = sum(g.accepted for g in flat)
    if not drafted:
        raise DataError(
            f"no token was drafted in {len(prompts)} prompts ({skipped} too long); raise "
            "--max-length or --max-new-tokens"
        )
    reached = sum(g.reached for g in flat)
    counts = Drafted(
        np.array([index for index, gs in enumerate(per_prompt) if gs]),
        np.array([sum(g.drafted for g in gs) for gs in per_prompt if gs]),
        np.array([sum(g.accepted for g in gs) for gs in per_prompt if gs]),
    )
    low, high = bootstrap_ratio(counts.accepted, counts.drafted, settings.seed)
    with np.errstate(invalid="ignore"):
        alpha = sum(g.alpha for g in flat) / reached
        empirical = sum(g.accepted_at for g in flat) / reached
    fields = {
        "tau": pooled_tau(accepted, drafted, settings.heads),
        "tau_ci": [settings.heads * low + 1, settings.heads * high + 1],
        "alpha_per_head": _nullable(alpha),
        "alpha_per_head_empirical": _nullable(empirical),
        "coverage": float(sum(g.coverage.sum() for g in flat) / reached.sum()),
        "drafted": drafted,
        "accepted": accepted,
        "prompts": sum(bool(generations) for generations in per_prompt),
        "skipped": skipped,
        "generated_tokens": sum(len(g.tokens) for g in flat),
    }
    return fields, counts


def _even_batches(order: list[int], settings: Settings) -> list[list[int]]:
    """Batches of nearly equal size, none above the batch size."""
    count = -(-len(order) // settings.batch_size)
    return [list(part) for part in np.array_split(order, count)] if count else []


def _square_batches(
    order: list[int], conversations: Sequence[Tokens], settings: Settings
) -> Iterable[list[int]]:
    """Batches of conversations in ``order``, shortest first, of bounded attention scores.

    Teacher forcing holds scores [B, heads, L, L] at once.
    """
    batch: list[int] = []
    for index in order:
        scores = (len(batch) + 1) * len(conversations[index].input_ids) ** 2
        if batch and (scores > _SCORES or len(batch) == settings.batch_size):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


# Held-out responses: exact expected τ


@dataclass(frozen=True)
class ChainStarts(_Arrays):
    """Exact acceptance of one draft at every chain start of the held-out responses.

    Attributes:
        conversation: [N] index of the conversation.
        position: [N] position t of the chain start; head i predicts token t + 1 + i.
        alpha: [N, K] Σ_{x∈D} min(p, q) of every head, teacher-forced.
        coverage: [N, K] Σ_{x∈D} p.
    """

    conversation: np.ndarray
    position: np.ndarray
    alpha: np.ndarray
    coverage: np.ndarray

    @property
    def tau(self) -> np.ndarray:
        """[N] expected tokens per target step: 1 + Σ_k Π_{i≤k} α_i."""
        return 1 + np.cumprod(self.alpha.astype(np.float64), axis=1).sum(1)


def _per_conversation(starts: ChainStarts, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts of per-chain-start values in every conversation that has any."""
    _, cluster = np.unique(starts.conversation, return_inverse=True)
    return np.bincount(cluster, weights=values), np.bincount(cluster)


def expected_tau(starts: ChainStarts, seed: int) -> tuple[float, list[float]]:
    """Mean expected τ and its 95 % interval by a bootstrap over conversations."""
    interval = bootstrap_ratio(*_per_conversation(starts, starts.tau), seed)
    return float(starts.tau.mean()), interval


def paired_difference(a: ChainStarts, b: ChainStarts, seed: int = 0) -> tuple[float, list[float]]:
    """Mean of τ_a - τ_b over the same chain starts, and its 95 % interval.

    The bootstrap resamples conversations, since chain starts within one are dependent.

    Raises:
        ValueError: the two were not measured at the same chain starts.
    """
    if not (
        np.array_equal(a.conversation, b.conversation) and np.array_equal(a.position, b.position)
    ):
        raise ValueError(
            "the two drafts were measured at different chain starts; evaluate both with the same "
            "held-out file, --heads and --max-length"
        )
    difference = a.tau - b.tau
    interval = bootstrap_ratio(*_per_conversation(a, difference), seed)
    return float(difference.mean()), interval


def chain_starts(response: torch.Tensor, heads: int) -> torch.Tensor:
    """Positions t where a chain of K heads is supervised throughout: [B, L] bool.

    At a chain start the target has just generated token t + 1, and head i predicts t + 1 + i; all
    of t + 1 … t + 1 + K must be response tokens. These are the starts that decoding can meet.
    """
    length = response.shape[1]
    starts = torch.zeros_like(response)
    if length > heads + 1:
        starts[:, : length - heads - 1] = response[:, 1:].unfold(1, heads + 1, 1).all(-1)
    return starts


@torch.inference_mode()
def measure_held_out(
    target: Target,
    wanted: Sequence[tuple[Draft, Sequence[float]]],
    conversations: Sequence[Tokens],
    settings: Settings,
    advance: Advance = _silent,
) -> list[dict[float, ChainStarts]]:
    """Exact acceptance at all chain starts of tokenized conversations.

    The target runs once per batch, whatever the number of drafts and temperatures.

    Args:
        target: the target model.
        wanted: drafts, each with the temperatures to measure it at.
        conversations: tokenized held-out responses.
        settings: see `Settings`.
        advance: see `Advance`; the total is that of the conversations' tokens.

    Returns:
        For every entry of ``wanted``, the measurement at each of its temperatures.
    """
    parts: list[dict[float, list[ChainStarts]]] = [{t: [] for t in ts} for _, ts in wanted]
    order = sorted(range(len(conversations)), key=lambda i: len(conversations[i].input_ids))
    for batch in _square_batches(order, conversations, settings):
        tokens, response, mask = _pad([conversations[i] for i in batch], target.device)
        starts = chain_starts(response, settings.heads)
        where = starts.nonzero()
        if len(where):
            layers = tuple(sorted({layer for draft, _ in wanted for layer in draft.capture_layers}))
            output = target.forward(tokens, mask, layers=layers)
            captured = dict(zip(layers, output.features.chunk(len(layers), -1), strict=True))
            states = _TargetAtStarts(target, output.hidden, starts, settings.heads)
            numbering = np.array(batch)[where[:, 0].cpu().numpy()]
            for (draft, temperatures), part in zip(wanted, parts, strict=True):
                features = torch.cat([captured[layer] for layer in draft.capture_layers], -1)
                overlaps = _overlaps(
                    states, draft, tokens, features, starts, temperatures, settings
                )
                for temperature, (alpha, coverage) in overlaps.items():
                    position = where[:, 1].cpu().numpy()
                    part[temperature].append(ChainStarts(numbering, position, alpha, coverage))
        count = int(mask.sum())
        advance(count, count)
    if not any(part for by_temperature in parts for part in by_temperature.values()):
        raise DataError(
            f"no held-out response is longer than {settings.heads + 1} tokens, so no chain of "
            f"{settings.heads} heads can start; lower --heads or give longer responses"
        )
    return [{t: _concatenate(found) for t, found in part.items()} for part in parts]


def _pad(
    conversations: list[Tokens], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded tokens, response mask and attention mask, each [B, L]."""

    def pad(rows: Iterable[list[int]], dtype: torch.dtype) -> torch.Tensor:
        tensors = [torch.tensor(row, dtype=dtype) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)

    tokens = pad((c.input_ids for c in conversations), torch.long)
    response = pad((c.loss_mask for c in conversations), torch.bool)
    mask = pad(([1] * len(c.input_ids) for c in conversations), torch.bool)
    return tokens.to(device), response.to(device), mask.to(device)


def _concatenate(parts: list[ChainStarts]) -> ChainStarts:
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("conversation", "position", "alpha", "coverage")
    }
    order = np.lexsort((joined["position"], joined["conversation"]))
    return ChainStarts(**{name: values[order] for name, values in joined.items()})


class _TargetAtStarts:
    """Target distributions at the positions that the heads of a batch's chains predict from."""

    def __init__(
        self, target: Target, hidden: torch.Tensor, starts: torch.Tensor, heads: int
    ) -> None:
        self.target = target
        needed = torch.zeros_like(starts)
        for head in range(1, heads + 1):
            needed[:, head:] |= starts[:, :-head]
        self.hidden = hidden[needed]
        row = needed.flatten().cumsum(0).view_as(needed) - 1
        batch, position = starts.nonzero(as_tuple=True)
        #: [K][N] row of ``hidden`` that head k of every chain start is compared with.
        self.rows = [row[batch, position + head] for head in range(1, heads + 1)]
        self._known: list[tuple[torch.Tensor | None, torch.Tensor]] = []
        self._normalizers: dict[float, torch.Tensor] = {}
        self._best: torch.Tensor | None = None

    def _chunks(self) -> Iterable[torch.Tensor]:
        return (self.target.logits(part) for part in self.hidden.split(_ROWS))

    def prepare(
        self, ids: torch.Tensor | None, temperatures: Sequence[float]
    ) -> tuple[torch.Tensor, dict[float, torch.Tensor], torch.Tensor]:
        """Logits on a draft vocabulary, log-normalisers by temperature, and argmax tokens.

        One pass of the LM head serves all temperatures, and all drafts with this vocabulary.

        Returns:
            [M, V_d] target logits; per temperature above 0, [M] log-normalisers of logits / T over
            the FULL vocabulary; [M] argmax over it.
        """
        hot = [t for t in temperatures if t > 0]
        for known, logits in self._known:
            same = known is ids or (
                known is not None and ids is not None and torch.equal(known, ids)
            )
            if same and all(t in self._normalizers for t in hot):
                return logits, self._normalizers, self._best
        on_draft, best = [], []
        normalizers: dict[float, list[torch.Tensor]] = {t: [] for t in hot}
        for logits in self._chunks():
            on_draft.append(logits if ids is None else logits[:, ids])
            best.append(logits.argmax(-1))
            for temperature in hot:
                normalizers[temperature].append(torch.logsumexp(logits / temperature, -1))
        self._best = torch.cat(best)
        self._normalizers |= {t: torch.cat(values) for t, values in normalizers.items()}
        self._known.append((ids, torch.cat(on_draft)))
        return self._known[-1][1], self._normalizers, self._best


def _overlaps(
    states: _TargetAtStarts,
    draft: Draft,
    tokens: torch.Tensor,
    features: torch.Tensor,
    starts: torch.Tensor,
    temperatures: Sequence[float],
    settings: Settings,
) -> dict[float, tuple[np.ndarray, np.ndarray]]:
    """α and coverage [N, K] of one draft at the chain starts of a batch, by temperature."""
    ids = draft.draft_ids
    greedy = settings.draft_sampling == "greedy"
    logits, normalizers, best = states.prepare(ids, temperatures)
    found: dict[float, tuple[list, list]] = {t: ([], []) for t in temperatures}
    per_head = draft.teacher_forced(tokens, features, starts, settings.heads)
    for rows, draft_logits in zip(states.rows, per_head, strict=True):
        drafted = draft_logits.argmax(-1)
        for temperature in temperatures:
            alpha, coverage = [], []
            if temperature == 0:
                wanted = best[rows]
                alpha.append((drafted if ids is None else ids[drafted]) == wanted)
                covered = torch.ones_like(wanted) if ids is None else torch.isin(wanted, ids)
                coverage.append(covered)
            else:
                z = normalizers[temperature]
                for part in torch.arange(len(rows), device=rows.device).split(_ROWS):
                    row = rows[part]
                    p = torch.exp(logits[row] / temperature - z[row, None])
                    coverage.append(p.sum(-1))
                    if greedy:
                        alpha.append(p.gather(1, drafted[part, None]).squeeze(1))
                    else:
                        q = distribution(draft_logits[part], temperature)
                        alpha.append(torch.minimum(p, q).sum(-1))
            found[temperature][0].append(torch.cat(alpha).float().cpu().numpy())
            found[temperature][1].append(torch.cat(coverage).float().cpu().numpy())
    return {t: (np.stack(a, 1), np.stack(c, 1)) for t, (a, c) in found.items()}


# The whole evaluation


def _digest(source: str) -> str:
    """Identity of a file, a model directory or a hub name, by content where that is cheap."""
    path = Path(source)
    digest = hashlib.sha256()
    if path.is_file():
        digest.update(path.read_bytes())
    elif path.is_dir():
        for file in sorted(path.iterdir()):
            if file.suffix in (".json", ".safetensors", ".jinja", ".bin", ".pt"):
                digest.update(file.name.encode())
                with file.open("rb") as handle:
                    digest.update(hashlib.file_digest(handle, "sha256").digest())
    else:
        digest.update(source.encode())
    return digest.hexdigest()


def run(
    target: Target,
    target_path: str,
    drafts: Sequence[LoadedDraft],
    *,
    benchmarks: dict[str, str],
    held_out: str | None,
    temperatures: Sequence[float],
    settings: Settings,
    out: Path,
    track: Track,
    command: Sequence[str] = (),
    published: str | None = None,
) -> Report:
    """Measure every draft on everything asked for, writing ``out`` after each measurement.

    A result already in ``out`` is kept when the models, the data and the settings are the same.

    Args:
        target: the loaded target.
        target_path: where it was loaded from.
        drafts: the drafts; each is compared with every earlier one.
        benchmarks: name -> JSONL file or ``hub:…``.
        held_out: JSONL of conversations, or None.
        temperatures: sampling temperatures, 0 for greedy decoding.
        settings: see `Settings`.
        out: report.json to write or to continue.
        track: opens a progress display.
        command: command line, for the report.
        published: target of `specforge_lk.evaluate.published` to compare with.
    """
    for draft in drafts:
        limit = draft.model.max_heads
        if limit is not None and settings.heads > limit:
            raise DraftError(
                f"draft {draft.path} has {limit} heads; set --heads to at most {limit}"
            )
    if benchmarks and not target.rewinds:
        raise ValueError(
            f"benchmarks ({', '.join(benchmarks)}) are decoded speculatively, but the target "
            f"{target_path} has layers whose cache cannot leave out rejected tokens here "
            "(recurrent ones, or attention that is neither full nor sliding); leave out "
            "--benchmark and give --held-out, or measure in a serving engine"
        )
    report = read_report(out) if out.exists() else Report()
    report.settings = {
        "target": target_path,
        "dtype": str(target.head.weight.dtype).removeprefix("torch."),
        "device": str(target.device),
        "threads": torch.get_num_threads(),
        **asdict(settings),
    }
    report.versions, report.command = versions(), list(command)
    report.published = published
    common = [_MEASUREMENT, _digest(target_path), report.settings["dtype"], asdict(settings)]
    identities = [_digest(draft.path) for draft in drafts]

    def fingerprint(draft: int, source: str) -> str:
        layers = list(drafts[draft].model.capture_layers)
        parts = [common, identities[draft], layers, sources[source]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def result(index: int, benchmark: str, source: str, temperature: float) -> Result:
        draft = drafts[index]
        return Result(
            algorithm=draft.model.algorithm,
            loss=draft.loss,
            seed=draft.seed,
            temperature=temperature,
            benchmark=benchmark,
            draft_sampling=settings.draft_sampling,
            heads=settings.heads,
            alpha_per_head=[],
            coverage=None,
            draft=draft.path,
            fingerprint=fingerprint(index, source),
        )

    # Read all data first: a bad row should not surface after an hour of measuring.
    paths = {**benchmarks, **({HELD_OUT: held_out} if held_out else {})}
    limits = {**dict.fromkeys(benchmarks, settings.limit), HELD_OUT: settings.held_out_limit}
    rows = {name: read_rows(path)[: limits[name]] for name, path in paths.items()}
    sources = {
        name: _digest(path) if not path.startswith(HUB_PREFIX) else path
        for name, path in paths.items()
    }
    prompts = {name: [user_turns(row, paths[name]) for row in rows[name]] for name in benchmarks}

    if held_out:
        wanted = [
            (
                i,
                [
                    t
                    for t in temperatures
                    if not _kept(report, out, result(i, HELD_OUT, HELD_OUT, t))
                ],
            )
            for i in range(len(drafts))
        ]
        wanted = [(i, ts) for i, ts in wanted if ts]
        if wanted:
            encoded = [tokenize(row, target.tokenizer) for row in rows[HELD_OUT]]
            longest = min(settings.max_length, target.max_positions - settings.heads)
            fitting = [c for c in encoded if len(c.input_ids) <= longest]
            began = time.monotonic()
            with track("held-out responses", sum(len(c.input_ids) for c in fitting)) as progress:
                measured = measure_held_out(
                    target,
                    [(drafts[i].model, ts) for i, ts in wanted],
                    fitting,
                    settings,
                    progress.advance,
                )
            seconds = round(time.monotonic() - began, 1)
            for (index, _), by_temperature in zip(wanted, measured, strict=True):
                for temperature, starts in by_temperature.items():
                    empty = result(index, HELD_OUT, HELD_OUT, temperature)
                    arrays = _arrays_path(out, empty)
                    starts.save(out.parent / arrays)
                    tau, interval = expected_tau(starts, settings.seed)
                    report.put(
                        empty.model_copy(
                            update={
                                "tau_expected": tau,
                                "tau_expected_ci": interval,
                                "alpha_per_head": [float(a) for a in starts.alpha.mean(0)],
                                "coverage": float(starts.coverage.mean()),
                                "conversations": len(np.unique(starts.conversation)),
                                "chain_starts": len(starts.position),
                                "skipped": len(encoded) - len(fitting),
                                "arrays": arrays,
                                "seconds": seconds,
                            }
                        )
                    )
            report.write(out)
        _compare(report, out, drafts, [HELD_OUT], temperatures, settings)
        report.write(out)

    for name in benchmarks:
        prefills = Prefills(target, [i for d in drafts for i in d.model.capture_layers])
        for temperature in temperatures:
            for index, draft in enumerate(drafts):
                empty = result(index, name, name, temperature)
                if _kept(report, out, empty):
                    continue
                count = sum(min(len(turns), settings.turns) for turns in prompts[name])
                began = time.monotonic()
                what = f"{name}, T = {temperature:g}, {draft.loss}"
                with track(what, count * settings.max_new_tokens) as progress:
                    fields, counts = measure_benchmark(
                        target,
                        draft.model,
                        prompts[name],
                        temperature,
                        settings,
                        prefills,
                        progress.advance,
                    )
                fields["seconds"] = round(time.monotonic() - began, 1)
                fields["arrays"] = _arrays_path(out, empty)
                counts.save(out.parent / fields["arrays"])
                report.put(empty.model_copy(update=fields))
                report.write(out)
    _compare(report, out, drafts, list(benchmarks), temperatures, settings)
    report.write(out)
    return report


def _arrays_path(out: Path, result: Result) -> str:
    """Where a result's arrays are, relative to the report's directory."""
    name = f"{result.algorithm}-{result.loss}-seed{result.seed}-T{result.temperature:g}"
    if result.benchmark != HELD_OUT:
        name = f"{quote(result.benchmark, safe='')}-{name}"
    return f"{out.stem}-arrays/{name}-{result.draft_sampling}.npz"


def _kept(report: Report, out: Path, result: Result) -> bool:
    """Whether the report already has this measurement, its arrays included."""
    found = report.find(result.key, result.fingerprint)
    return found is not None and (found.arrays is None or (out.parent / found.arrays).is_file())


def _compare(
    report: Report,
    out: Path,
    drafts: Sequence[LoadedDraft],
    benchmarks: Sequence[str],
    temperatures: Sequence[float],
    settings: Settings,
) -> None:
    """Fill ``report.paired``: every draft against every earlier one of its algorithm and seed.

    Pairs that this run did not measure stay as they are.
    """
    order = [(d.model.algorithm, d.loss, d.seed) for d in drafts]

    def measured_here(of: Paired | Result, loss: str) -> bool:
        return (
            of.benchmark in benchmarks
            and of.temperature in temperatures
            and of.draft_sampling == settings.draft_sampling
            and (of.algorithm, loss, of.seed) in order
        )

    report.paired = [
        p for p in report.paired if not (measured_here(p, p.loss) or measured_here(p, p.baseline))
    ]
    measured = [r for r in report.results if r.arrays and measured_here(r, r.loss)]
    measured.sort(key=lambda r: order.index((r.algorithm, r.loss, r.seed)))
    measured.sort(key=lambda r: (benchmarks.index(r.benchmark), r.temperature))
    for baseline, result in combinations(measured, 2):
        same = ("algorithm", "seed", "benchmark", "temperature")
        if any(getattr(baseline, name) != getattr(result, name) for name in same):
            continue
        files = (out.parent / result.arrays, out.parent / baseline.arrays)
        if result.benchmark == HELD_OUT:
            a, b = map(ChainStarts.load, files)
            difference, interval = paired_difference(a, b, settings.seed)
            size = {
                "chain_starts": len(a.position),
                "conversations": len(np.unique(a.conversation)),
            }
        else:
            a, b = map(Drafted.load, files)
            difference, interval = paired_benchmark_difference(a, b, result.heads, settings.seed)
            size = {"prompts": len(a.prompt)}
        report.paired.append(
            Paired(
                benchmark=result.benchmark,
                algorithm=result.algorithm,
                seed=result.seed,
                temperature=result.temperature,
                draft_sampling=result.draft_sampling,
                loss=result.loss,
                baseline=baseline.loss,
                difference=difference,
                ci=interval,
                **size,
            )
        )
