"""Write SpecForge's offline feature files from a Hugging Face target.

SpecForge trains offline from one file per sample: token ids, loss mask and the target's hidden
states under the names that the algorithm's reader expects. Its own preparation script needs
SGLang and CUDA; this module needs transformers and works on any device. Which layers are wanted
and what the features are called comes from ``resolve_offline_capture``, so that every algorithm
that registers a layout is covered.

Auxiliary layer k is the state after decoder layer k, HF ``hidden_states[k + 1]``. The last hidden
state is the one after the final norm, from which the head makes the target's logits.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import pickle
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specforge_lk.data.conversations import Tokens, read_rows, tokenize
from specforge_lk.files import atomic_write, write_text

if TYPE_CHECKING:
    import torch

#: Beside the feature files: what they were made from and how.
MANIFEST = "capture.json"
#: Positions that a target is checked on.
_PROBE = 64
#: How many times as far as rounding moves them distributions may be apart.
_MARGIN = 3
#: What settings that change logits have in their names, in all models of transformers 5.8.
_ABOUT_LOGITS = ("logit", "softcap", "soft_cap", "lm_head", "output_mult", "mup")


@dataclass(frozen=True)
class Sample:
    """A row to capture: where its features go, and its tokens.

    Hundreds of thousands are held at once, so they are packed: 5 bytes a token, where a list of
    integers has 36.
    """

    path: Path
    input_ids: array
    loss_mask: bytes

    @classmethod
    def of(cls, path: Path, tokens: Tokens) -> Sample:
        """Pack the tokens of a row."""
        return cls(path, array("i", tokens.input_ids), bytes(tokens.loss_mask))

    @property
    def tokens(self) -> Tokens:
        """Unpacked."""
        return Tokens(self.input_ids.tolist(), list(self.loss_mask))

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Samples:
    """The samples of a response file.

    Attributes:
        kept: Rows to capture, in file order.
        truncated: How many rows were cut to the longest length.
        skipped: How many rows had no supervised position, or too few tokens for the algorithm.
    """

    kept: list[Sample]
    truncated: int
    skipped: int

    def token_counts(self) -> Counter[int]:
        """How often each token occurs as a supervised token."""
        counts: Counter[int] = Counter()
        for sample in self.kept:
            counts.update(compress(sample.input_ids, sample.loss_mask))
        return counts


def read_samples(
    responses: Path,
    tokenizer: Any,
    directory: Path,
    *,
    vocab_size: int,
    max_length: int,
    limit: int | None = None,
    loss_mask_filter: Callable[[object], bool] | None = None,
) -> Samples:
    """Tokenise a response file.

    Args:
        responses: Conversation JSONL, see :mod:`specforge_lk.data.conversations`.
        tokenizer: The target's tokenizer.
        directory: Where feature files go; their names are the rows' numbers.
        vocab_size: Size of the target vocabulary.
        max_length: Longest sample in tokens; longer ones are cut.
        limit: Only the first rows.
        loss_mask_filter: The algorithm's own test of whether a loss mask is usable.

    Raises:
        ValueError: a row is malformed, or holds a token id outside the target vocabulary.
    """
    from specforge.data.loss_mask import has_supervised_position

    kept, truncated, skipped = [], 0, 0
    for index, row in enumerate(read_rows(responses)):
        if limit is not None and index >= limit:
            break
        tokens = tokenize(row, tokenizer)
        if not all(0 <= token < vocab_size for token in tokens.input_ids):
            raise ValueError(
                f"{responses}: row {row.get('id', index)!r} has token id {max(tokens.input_ids)}, "
                f"outside the target's vocabulary of {vocab_size}; were the responses sampled "
                "from another target?"
            )
        if len(tokens.input_ids) > max_length:
            truncated += 1
            tokens = Tokens(tokens.input_ids[:max_length], tokens.loss_mask[:max_length])
        # Nothing is drafted before a response's first token, or after its last one.
        if not has_supervised_position(tokens.loss_mask) or (
            loss_mask_filter is not None and not loss_mask_filter(tokens.loss_mask)
        ):
            skipped += 1
            continue
        kept.append(Sample.of(directory / f"sample_{index:08d}.ckpt", tokens))
    return Samples(kept, truncated, skipped)


def open_directory(directory: Path, names: tuple[str, ...], settings: dict[str, Any]) -> None:
    """Begin or continue a directory of features, keeping ``settings`` in its manifest.

    Args:
        directory: where the feature files are.
        names: features to capture. Files there may hold more of them, or get more: what some
            algorithms read is part of what others do.
        settings: everything else that the features depend on.

    Raises:
        ValueError: the directory holds features made with other settings, or other features.
    """
    directory.mkdir(parents=True, exist_ok=True)
    manifest = directory / MANIFEST
    if manifest.exists():
        before = json.loads(manifest.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{directory} holds features made with {name}={before.get(name)!r}, not "
                    f"{value!r}; remove it, or write to another directory"
                )
        held = set(before.get("features", ()))
        if not (held <= set(names) or held >= set(names)):
            raise ValueError(
                f"{directory} holds other features, {sorted(held)}, not {sorted(names)}; remove "
                "it, or write to another directory"
            )
        names = tuple(held.union(names))
    write_text(manifest, json.dumps({"features": sorted(names), **settings}, indent=2) + "\n")


def is_captured(sample: Sample, names: tuple[str, ...]) -> bool:
    """Whether the sample's feature file is there, whole, and of the same tokens.

    It may hold more: the features of DFlash with a registered loss serve it without one too.
    """
    import torch

    if not sample.path.exists():
        return False
    try:
        record = torch.load(sample.path, weights_only=True, mmap=True)
        return set(record) >= set(names) and sample.tokens == Tokens(
            record["input_ids"].tolist(), record["loss_mask"].tolist()
        )
    except (RuntimeError, KeyError, AttributeError, EOFError, pickle.UnpicklingError):
        return False


def batches(samples: list[Sample], batch_tokens: int) -> Iterator[list[Sample]]:
    """Group samples of similar length, each batch at most ``batch_tokens`` padded tokens."""
    batch: list[Sample] = []
    for sample in sorted(samples, key=len):
        if batch and (len(batch) + 1) * len(sample) > batch_tokens:
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def capture(
    decoder: Any,
    batch: list[Sample],
    *,
    layers: tuple[int, ...],
    layout: Any,
    dtype: torch.dtype,
) -> None:
    """Run the target on a batch and write a feature file for each of its samples.

    Args:
        decoder: A Hugging Face model without its head (its output ends with the final norm).
        batch: Samples, padded to the longest on the right.
        layers: Auxiliary layers k, concatenated in this order.
        layout: SpecForge's ``OfflineCaptureLayout``.
        dtype: Floating-point type of the stored states.

    Raises:
        FloatingPointError: the target's states are not finite.
    """
    import torch

    lengths = [len(sample) for sample in batch]
    longest = max(lengths)
    rows = [sample.tokens.input_ids + [0] * (longest - len(sample)) for sample in batch]
    mask = [[1] * length + [0] * (longest - length) for length in lengths]
    with torch.inference_mode():
        output = decoder(
            input_ids=torch.tensor(rows, device=decoder.device),
            attention_mask=torch.tensor(mask, device=decoder.device),
            use_cache=False,
            output_hidden_states=True,
        )
        states = output.hidden_states
        auxiliary = torch.cat([states[layer + 1] for layer in layers], dim=-1).to("cpu", dtype)
        last = output.last_hidden_state.to("cpu", dtype)
    for row, (sample, length) in enumerate(zip(batch, lengths, strict=True)):
        # Clones: a slice would take the whole batch's storage with it into the file.
        record = layout.materialize(
            {
                "input_ids": torch.tensor(sample.tokens.input_ids),
                "loss_mask": torch.tensor(sample.tokens.loss_mask),
                "aux_hidden_states": auxiliary[row : row + 1, :length].clone(),
                "last_hidden_states": last[row : row + 1, :length].clone(),
            }
        )
        for name, tensor in record.items():
            if not tensor.isfinite().all():
                raise FloatingPointError(
                    f"{sample.path.name}: feature {name} is not finite in {dtype}; "
                    "use --dtype float32 and model.torch_dtype=bfloat16 or float32"
                )
        _save(record, sample.path)


def check_target(model: Any, decoder: Any, tokens: list[int], head: torch.nn.Module | None) -> None:
    """Refuse a target from whose features training would learn other distributions than its own.

    Training makes the target's distributions of the last hidden states with a head of its own,
    which has to know what the model does to them. In one forward, what that head makes of them is
    compared with the model's own logits. They may differ by the model's rounding only; how much
    that is shows when states and logits are moved by a unit roundoff.

    Args:
        model: A Hugging Face model with its head.
        decoder: Its part that is captured, which ends with the final norm.
        tokens: A text to compare on; its first positions are used.
        head: Training's head in float32, from [..., H] to [..., V]; None where it needs none.

    Raises:
        ValueError: the distributions differ, or there is no state of every layer.
    """
    import torch

    text = model.config.get_text_config()
    seen: list[Any] = []
    hook = decoder.register_forward_hook(lambda *call: seen.append(call[-1]))
    try:
        with torch.inference_mode():
            logits = model(
                input_ids=torch.tensor([tokens[:_PROBE]], device=model.device),
                use_cache=False,
                output_hidden_states=True,
            ).logits[0]
    finally:
        hook.remove()
    name = f"{type(model).__name__} (model_type {model.config.model_type})"
    states = getattr(seen[0], "hidden_states", None) if len(seen) == 1 else None
    count = text.num_hidden_layers
    if not states or len(states) != count + 1 or states[0].ndim != 3:
        raise ValueError(
            f"{name} does not give one state of every position after each of its {count} layers, "
            "so no features can be captured from it with transformers; use another target"
        )
    if head is None:
        return
    hidden = seen[0].last_hidden_state[0]
    roundoff = torch.finfo(hidden.dtype).eps / 2
    # Products of a rounded weight, and their sum in float32 at least.
    relative = roundoff + hidden.shape[-1] ** 0.5 * torch.finfo(torch.float32).eps / 2
    hidden = hidden.to(next(head.parameters()).device, torch.float32)
    with torch.inference_mode():
        ours = head(hidden)
        # What comes after the sum, a scale or a cap: three roundings are one roundoff in the mean.
        moved = _moved(head(_moved(hidden, relative)), roundoff)
    same = ours.shape == logits.shape
    found, rounding = _variation(ours, logits) if same else 1.0, _variation(ours, moved)
    if found <= _MARGIN * rounding:
        return
    named = [
        f"{key}={value!r}"
        for key, value in (model.config.to_dict() | text.to_dict()).items()
        if value is not None and any(part in key for part in _ABOUT_LOGITS)
    ]
    keys = f" (its config has {', '.join(named)})" if named else ""
    raise ValueError(
        "training would learn other distributions than the target's: those that SpecForge's target "
        f"head makes of the last hidden states of {name} are a total variation of {found:.2g} away "
        f"from the model's own, of which rounding explains {rounding:.2g}. Check "
        "model.lm_head_key; if that is right, the model does to its logits what the target head "
        f"does not{keys}: use another target"
    )


def _moved(values: torch.Tensor, size: float) -> torch.Tensor:
    """Every value larger or smaller by a share of ``size``, at random but always the same."""
    import torch

    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, values.shape, generator=generator) * 2 - 1
    return values * (1 + size * signs.to(values.device))


def _variation(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Mean over positions of the total variation between the distributions of logits [L, V]."""
    ours, theirs = ours.double().softmax(-1).cpu(), theirs.double().softmax(-1).cpu()
    return float((ours - theirs).abs().sum(-1).mean()) / 2


def vocabulary_mapping(
    counts: Counter[int], draft_vocab_size: int, vocab_size: int
) -> dict[str, torch.Tensor]:
    """Truncate the vocabulary to the most frequent tokens, in SpecForge's format.

    Ties, and places left when too few tokens occur, go to the lower ids.

    Args:
        counts: Token id to frequency.
        draft_vocab_size: V_d, the number of tokens to keep.
        vocab_size: V, the size of the target vocabulary.

    Returns:
        ``t2d`` [V], true on tokens of the draft vocabulary; ``d2t`` [V_d], the offset from a
        draft id to its target id (target_id = draft_id + d2t[draft_id]).

    Raises:
        ValueError: the draft vocabulary is not smaller than the target's.
    """
    import torch

    if not 0 < draft_vocab_size < vocab_size:
        raise ValueError(
            f"draft_vocab_size must be between 1 and {vocab_size - 1} (the target has "
            f"{vocab_size} tokens), got {draft_vocab_size}; without truncation no mapping is needed"
        )
    ranked = sorted(range(vocab_size), key=lambda token: (-counts[token], token))
    kept = torch.tensor(sorted(ranked[:draft_vocab_size]))
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[kept] = True
    return {"t2d": t2d, "d2t": kept - torch.arange(draft_vocab_size)}


def coverage(mapping: dict[str, torch.Tensor], counts: Counter[int]) -> float:
    """Share of the tokens counted that the draft vocabulary has."""
    kept = mapping["t2d"].tolist()
    total = counts.total()
    return sum(count for token, count in counts.items() if kept[token]) / total if total else 0.0


def save_mapping(mapping: dict[str, torch.Tensor], path: Path) -> None:
    """Write a mapping where ``model.vocab_mapping_path`` can read it.

    Raises:
        ValueError: another mapping is there, which drafts may have been trained with.
    """
    import torch

    if path.exists():
        before = torch.load(path, weights_only=True)
        if all(torch.equal(before[name], mapping[name]) for name in ("t2d", "d2t")):
            return
        raise ValueError(
            f"{path} holds another draft vocabulary; drafts trained with it need it: remove it, "
            "or write to another --vocab-mapping"
        )
    _save(mapping, path)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_tokens(samples: list[Sample], path: Path) -> None:
    """Write token ids and loss masks where ``data.prompts_path`` of a streamed run reads them.

    Raises:
        ValueError: something else is there: conversations, which SpecForge can read as well, or
            the tokens of other ones.
    """
    with atomic_write(path) as temporary:
        with temporary.open("w", encoding="utf-8") as stream:
            for sample in samples:
                stream.write(json.dumps(asdict(sample.tokens)) + "\n")
        if path.exists() and not filecmp.cmp(temporary, path, shallow=False):
            raise ValueError(
                f"data.prompts_path={path} holds something else than these tokens; remove it, or "
                "give data.prompts_path the name of a new file"
            )


def _save(record: dict[str, torch.Tensor], path: Path) -> None:
    import torch

    with atomic_write(path) as temporary:
        torch.save(record, temporary)


__all__ = [
    "MANIFEST",
    "Sample",
    "Samples",
    "batches",
    "capture",
    "check_target",
    "coverage",
    "file_digest",
    "is_captured",
    "open_directory",
    "read_samples",
    "save_mapping",
    "vocabulary_mapping",
    "write_tokens",
]
