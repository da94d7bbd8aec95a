"""Write SpecForge's offline feature files from a Hugging Face target.

SpecForge trains offline from one file per sample: token ids, loss mask and the target's hidden
states under the names that the algorithm's reader expects. Its own preparation script needs
SGLang and CUDA; this module needs transformers and works on any device. SpecForge's
``resolve_offline_capture`` says which layers an algorithm wants and what its features are called,
so every algorithm that registers a layout is covered.

Auxiliary layer k is the state after decoder layer k, HF ``hidden_states[k + 1]``. The last hidden
state is the one after the final norm, from which the LM head makes the target's logits.
"""

from __future__ import annotations

import itertools
import json
import pickle
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import compress, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specforge_lk.data.conversations import Chat, Tokens
from specforge_lk.data.jsonl import numbered_rows
from specforge_lk.data.responses import recorded, sampling_of
from specforge_lk.data.rows import LeftOut, usable_rows
from specforge_lk.data.vocabulary import require_known
from specforge_lk.files import atomic_write, read_json, save_tensors, write_text
from specforge_lk.serving import Sampling

if TYPE_CHECKING:
    import torch
    from specforge.runtime.data_plane.feature_contents import FeatureContents

#: File beside the feature files that says what they were made from, and how.
MANIFEST = "capture.json"


@dataclass(frozen=True)
class Sample:
    """A row to capture: the path of its features, and its tokens.

    Hundreds of thousands are held at once, so they are packed: 5 bytes a token, where a list of
    integers has 36.

    Attributes:
        path: Where its features go.
        input_ids: [L] token ids.
        loss_mask: [L] 1 on tokens of the response.
        sampling: What the response is a sample of; None where the row does not say.
    """

    path: Path
    input_ids: array
    loss_mask: bytes
    sampling: Sampling | None

    @classmethod
    def of(cls, path: Path, tokens: Tokens, sampling: Sampling | None) -> Sample:
        """Pack the tokens of a row."""
        return cls(path, array("i", tokens.input_ids), bytes(tokens.loss_mask), sampling)

    @property
    def tokens(self) -> Tokens:
        """The tokens as lists."""
        return Tokens(self.input_ids.tolist(), list(self.loss_mask))

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Samples:
    """The samples of a response file.

    Attributes:
        kept: Rows to capture, in file order.
        truncated: How many were cut to the longest length.
        skipped: Why each row was that had no supervised position, or too few tokens for the
            algorithm.
        malformed: What was wrong with each row that was left out for it.
    """

    kept: list[Sample]
    truncated: int
    skipped: list[str]
    malformed: list[str] = field(default_factory=list)

    @property
    def left_out(self) -> dict[str, int]:
        """How many rows are missing, by what they lack."""
        return {"malformed": len(self.malformed), "nothing supervised": len(self.skipped)}

    def token_counts(self) -> Counter[int]:
        """Count how often each token occurs at a supervised position."""
        counts: Counter[int] = Counter()
        for sample in self.kept:
            counts.update(compress(sample.input_ids, sample.loss_mask))
        return counts

    def samplings(self) -> list[dict[str, float | int] | None]:
        """Return what the responses are samples of, as rows say it; None if some do not."""
        found = {sample.sampling for sample in self.kept}
        known = sorted((s for s in found if s is not None), key=str)
        return [*map(recorded, known), *([None] if None in found else [])]


def read_samples(
    responses: Path,
    chat: Chat,
    directory: Path,
    *,
    vocab_size: int,
    max_length: int,
    limit: int | None = None,
    loss_mask_filter: Callable[[object], bool] | None = None,
    malformed: LeftOut | None = None,
) -> Samples:
    """Tokenize a response file.

    A row whose turns do not extend one another has several samples.

    Args:
        responses: Conversation JSONL, see :mod:`specforge_lk.data.conversations`.
        chat: The target's chat template.
        directory: Where feature files go; their names are the rows' numbers.
        vocab_size: Size of the target vocabulary.
        max_length: Longest sample in tokens; longer ones are cut.
        limit: Only the first rows.
        loss_mask_filter: The algorithm's own test of whether a loss mask is usable.
        malformed: What becomes of rows that are malformed, hold a token id outside the target
            vocabulary, or say something of their sampling that cannot be read; by default the
            first is an error.

    Raises:
        ValueError: a row cannot be used, or too many of them, or there is none.
    """
    from specforge.data.loss_mask import has_supervised_position

    kept: list[Sample] = []
    truncated, skipped = 0, []
    malformed = malformed or LeftOut()
    # One object for all rows that say the same.
    samplings: dict[Sampling | None, Sampling | None] = {}
    count = itertools.count()
    rows = itertools.islice(numbered_rows(responses, malformed), limit)

    def read(row: dict[str, Any]) -> tuple[int, list[Tokens], Sampling | None]:
        index = next(count)
        samples = chat.tokenize(row)
        for tokens in samples:
            require_known(tokens.input_ids, vocab_size)
        sampling = sampling_of(row)
        return index, samples, samplings.setdefault(sampling, sampling)

    def trains(mask: list[int]) -> bool:
        # Nothing is drafted before a response's first token, or after its last one.
        return has_supervised_position(mask) and (
            loss_mask_filter is None or bool(loss_mask_filter(mask))
        )

    for place, _, (index, samples, sampling) in usable_rows(rows, read, malformed):
        usable = 0
        for number, tokens in enumerate(samples):
            if len(tokens.input_ids) > max_length:
                truncated += 1
                tokens = Tokens(tokens.input_ids[:max_length], tokens.loss_mask[:max_length])
            if not trains(tokens.loss_mask):
                continue
            usable += 1
            name = f"sample_{index:08d}" + (f"_{number}" if number else "")
            kept.append(Sample.of(directory / f"{name}.ckpt", tokens, sampling))
        if usable:
            continue
        if any(trains(tokens.loss_mask) for tokens in samples):
            why = f"nothing of it is supervised within data.max_length={max_length}; raise that"
        else:
            longest = max(sum(tokens.loss_mask) for tokens in samples)
            why = f"an answer of {longest} tokens, end included, is too short to train on"
        skipped.append(f"{place}: {why}")
    malformed.check(responses, skipped)
    return Samples(kept, truncated, skipped, malformed.left_out)


def open_directory(
    directory: Path,
    names: tuple[str, ...],
    settings: dict[str, Any],
    found: dict[str, Any],
) -> None:
    """Begin or continue a directory of features, keeping ``settings`` in its manifest.

    Args:
        directory: The folder of the feature files.
        names: Features to capture. Files there may hold more of them, or be given more: some
            algorithms read a part of what others read.
        settings: Everything else that the features depend on.
        found: What follows from the settings: which target it is, what the responses are samples
            of, what of them is missing. A directory of an earlier version, which does not have
            them, gets them.

    Raises:
        ValueError: the directory holds features made with other settings, or other features.
    """
    from specforge.modeling.target.identity import identity_differences

    directory.mkdir(parents=True, exist_ok=True)
    manifest = directory / MANIFEST
    if manifest.exists():
        before = read_json(manifest, "remove the folder, or write to another one")
        identity = before.get("target_identity")
        if identity is not None and (
            differing := identity_differences(identity, found["target_identity"])
        ):
            raise ValueError(
                f"{directory} holds features of another target, {before.get('target')!r}, than "
                f"{settings['target']!r}: {'; '.join(differing)}; remove it, or write to another "
                "directory"
            )
        for name, value in settings.items():
            # A target that was moved is the same one.
            if before.get(name) != value and not (name == "target" and identity):
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
    held_here = {"features": sorted(names), **settings, **found}
    _write_manifest(manifest, held_here, complete=False)


def close_directory(directory: Path, samples: list[Sample]) -> None:
    """Note in the manifest which samples are captured, so that SpecForge trains on all of them.

    Args:
        directory: The folder of the feature files.
        samples: What was captured into it.
    """
    manifest = directory / MANIFEST
    held = read_json(manifest, "capture again")
    held["files"] = sorted(sample.path.name for sample in samples)
    _write_manifest(manifest, held, complete=True)


def _write_manifest(path: Path, held: dict[str, Any], *, complete: bool) -> None:
    held = {**held, "complete": complete}
    write_text(path, json.dumps(held, indent=2) + "\n", durable=complete)


def is_captured(sample: Sample, names: tuple[str, ...], contents: FeatureContents) -> bool:
    """Return whether the sample's feature file is there, undamaged, and of the same tokens.

    It may hold more features: those of DFlash with a registered loss serve it without one too.

    Args:
        sample: the sample.
        names: features that it has to hold.
        contents: SpecForge's ``FeatureContents``, what it trains on only.
    """
    from specforge.runtime.data_plane.feature_store import load_feature_file

    try:
        record = load_feature_file(str(sample.path))
        contents.check(record)
    except (FileNotFoundError, ValueError, LookupError, AttributeError, pickle.UnpicklingError):
        return False
    return set(record) >= set(names) and sample.tokens == Tokens(
        record["input_ids"].tolist(), record["loss_mask"].tolist()
    )


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
        decoder: A Hugging Face model without its LM head (its output ends with the final norm).
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
        save_tensors(record, sample.path)


def write_tokens(samples: list[Sample], path: Path) -> None:
    """Write token ids and loss masks where ``data.prompts_path`` of a streamed run reads them.

    A row also says what its response is a sample of, where that is known; SpecForge ignores it.

    Raises:
        ValueError: the file exists and holds something else, such as conversations, which
            SpecForge can read as well, or the tokens of others.
    """
    with atomic_write(path) as temporary:
        with temporary.open("w", encoding="utf-8") as stream:
            for sample in samples:
                row: dict[str, Any] = {**vars(sample.tokens)}
                if sample.sampling is not None:
                    row["sampling"] = recorded(sample.sampling)
                stream.write(json.dumps(row) + "\n")
        if path.exists() and not _same_tokens(temporary, path):
            raise ValueError(
                f"data.prompts_path={path} holds something else than these tokens; remove it, or "
                "give data.prompts_path the name of a new file"
            )


def _same_tokens(ours: Path, other: Path) -> bool:
    """Return whether two files hold the same tokens, whatever else their rows say."""

    def tokens(path: Path) -> Iterator[tuple[Any, Any]]:
        # Plain JSONL whatever the file is called, as SpecForge reads it.
        with path.open(encoding="utf-8") as stream:
            for line in stream:
                row = json.loads(line)
                yield row.get("input_ids"), row.get("loss_mask")

    try:
        return all(a == b for a, b in zip_longest(tokens(ours), tokens(other)))
    except (ValueError, AttributeError):  # not JSON, not objects
        return False


__all__ = [
    "MANIFEST",
    "Sample",
    "Samples",
    "batches",
    "capture",
    "close_directory",
    "is_captured",
    "open_directory",
    "read_samples",
    "write_tokens",
]
