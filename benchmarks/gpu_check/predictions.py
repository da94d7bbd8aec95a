"""What an audit without a GPU expected of an H100, before any of it was measured.

It counted instructions of the compiled kernels and bytes, and added the times of their bounds. They
are predictions, shown beside what was measured and in docs/cost.md; nothing else quotes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from specforge_lk.markdown import markdown_table


@dataclass(frozen=True)
class Prediction:
    """A figure of the rows that have these values.

    Attributes:
        of: names and values of a row.
        field: what is predicted.
        value: the figure, or a range of it, as text; in the unit of the field.
        note: what it holds for.
    """

    of: Mapping[str, Any]
    field: str
    value: str
    note: str = ""


_BF16: Final = "8192 x 32000, bfloat16 / bfloat16"
_MIXED: Final = "8192 x 32000, bfloat16 / float32"
_LARGE: Final = "4096 x 128256, bfloat16 / bfloat16"
_OURS: Final = ("overlap_terms kl", "overlap_terms lk_alpha", "overlap_terms lk_lambda")
_TARGET: Final = "16384 x 128256, V_d 32000, bfloat16"
_HEAD: Final = {"way": "linear_overlap", "head": "trained", "size": "8192 x 4096 x 128256"}

PREDICTIONS: Final = (
    Prediction({"section": "check"}, "copy_gb_per_s", "3000"),
    Prediction({"section": "check"}, "product_tflops", "650"),
    *(
        Prediction({"name": name, "cell": cell}, field, value, "before the rewrite " + before)
        for name in _OURS
        for cell, field, value, before in (
            (_BF16, "forward_ms", "0.50", "0.85"),
            (_BF16, "both_ms", "1.04", "1.4"),
            (_MIXED, "forward_ms", "0.66", "0.88"),
            (_MIXED, "both_ms", "1.4", "1.6"),
            (_LARGE, "both_ms", "2.15", "2.9"),
        )
    ),
    *(
        Prediction({"name": name, "cell": cell}, field, value)
        for name, values in {
            "speculators kl_div, fused": ("0.72", "1.26", "2.5"),
            "speculators nla, fused": ("0.75", "1.3", "2.6"),
            "speculators lk_hybrid, fused": ("1.47", "3.1", "6.2"),
            "liger ce + tvd": ("0.9", "1.5", "2.9"),
            "liger tvd": ("", "2.7", ""),
            "specforge kl, triton": ("0.7", "1.4 to 1.7", "8 to 9"),
        }.items()
        for cell, field, value in zip(
            (_BF16, _BF16, _LARGE), ("forward_ms", "both_ms", "both_ms"), values, strict=True
        )
        if value
    ),
    Prediction({"way": "target_terms", "size": _TARGET}, "ms", "2"),
    Prediction({"way": "from_logits", "size": _TARGET}, "ms", "33"),
    Prediction({"way": "from_logits", "size": _TARGET}, "peak_mib", "22000"),
    Prediction({**_HEAD, "way": "unfused"}, "ms", "45"),
    Prediction({**_HEAD, "way": "unfused"}, "peak_mib", "4000"),
    Prediction(_HEAD, "ms", "62", "the LM head's gradient on tensor cores, 1024 rows a chunk"),
    Prediction(_HEAD, "peak_mib", "2600"),
    Prediction({**_HEAD, "head": "frozen"}, "peak_mib", "500"),
    Prediction({"algorithm": "eagle3", "way": "stock"}, "step_ms", "650 to 700"),
    Prediction(
        {"algorithm": "eagle3", "way": "stock"}, "peak_mib", "31000", "logits alone, no activations"
    ),
    Prediction(
        {"algorithm": "eagle3", "way": "stock lk_lambda"}, "peak_mib", "57000", "logits alone"
    ),
    Prediction(
        {"algorithm": "eagle3", "way": "lk_lambda"}, "peak_mib", "8000 to 9000", "logits alone"
    ),
)


def predicted(row: Mapping[str, Any], field: str) -> str:
    """Return what was predicted of a field of a row; empty where nothing was."""
    for prediction in PREDICTIONS:
        if prediction.field == field and prediction.of.items() <= row.items():
            note = f" ({prediction.note})" if prediction.note else ""
            return prediction.value + note
    return ""


def table() -> str:
    """Return all of them, equal ones in one row."""
    fields = {"forward_ms": "forward, ms", "both_ms": "forward + backward, ms", "ms": "ms"}
    fields |= {"step_ms": "step, ms", "peak_mib": "peak, MiB"}
    fields |= {"copy_gb_per_s": "copy, GB/s", "product_tflops": "bfloat16 product, TFLOPS"}
    rows: dict[tuple[str, str, str], list[str]] = {}
    for prediction in PREDICTIONS:
        of = prediction.of
        head = f", {of['head']} LM head" if "head" in of else ""
        named = [of[key] for key in ("algorithm", "name", "way") if key in of]
        what = f"{' '.join(named)}{head}" if named else "the card"
        size = of.get("cell", of.get("size", "8 x 2048, K 7" if "algorithm" in of else ""))
        figure = prediction.value + (f" ({prediction.note})" if prediction.note else "")
        rows.setdefault((size, fields[prediction.field], figure), []).append(what)
    return markdown_table(
        ["", "size", "of", "predicted"],
        [["; ".join(dict.fromkeys(names)), *row] for row, names in rows.items()],
    )
