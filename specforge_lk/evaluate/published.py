"""The acceptance lengths τ that the paper reports, to see one's own beside them.

Samarin et al., arXiv 2602.23881 v1, tables 1 and 2: chains of K drafted tokens with rejection
sampling, T = 0 and T = 1, on MT-bench, HumanEval and GSM8K. Table 2 has means over the three;
where the model card of a released draft has the benchmarks at T = 1, they are here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath

#: The benchmarks, in the order of the paper's tables.
BENCHMARKS = ("MT-bench", "HumanEval", "GSM8K")


@dataclass(frozen=True)
class Tau:
    """τ of one draft at one temperature: on each of `BENCHMARKS` where known, and their mean."""

    mean: float
    each: tuple[float, float, float] | None = None

    @classmethod
    def of(cls, *each: float) -> Tau:
        """Return τ on each of `BENCHMARKS`, in their order, with its mean."""
        first, second, third = each
        return cls(sum(each) / len(each), (first, second, third))


#: (algorithm, loss) -> τ by temperature.
Drafts = dict[tuple[str, str], dict[float, Tau]]

#: Target, by the name of its hub repository -> drafts. ``lk_lambda`` is the paper's choice of η:
#: 3, and 10 for MEDUSA; ``untuned`` the MTP module that DeepSeek-V3 comes with.
PUBLISHED: dict[str, Drafts] = {
    "Llama-3.1-8B-Instruct": {
        ("eagle3", "kl"): {0.0: Tau.of(3.75, 4.82, 4.50), 1.0: Tau.of(3.39, 4.31, 3.88)},
        ("eagle3", "tv"): {0.0: Tau.of(2.81, 3.42, 3.34), 1.0: Tau.of(2.67, 3.25, 3.12)},
        ("eagle3", "lk_alpha"): {0.0: Tau.of(3.77, 4.82, 4.55), 1.0: Tau.of(3.50, 4.48, 3.98)},
        ("eagle3", "lk_fixed"): {
            0.0: Tau.of(3.78, 4.84, 4.53),
            1.0: Tau.of(3.35, 4.36, 3.95),
        },
        ("eagle3", "lk_lambda_eta1"): {
            0.0: Tau.of(3.80, 4.83, 4.54),
            1.0: Tau.of(3.51, 4.47, 3.96),
        },
        ("eagle3", "lk_lambda"): {0.0: Tau.of(3.84, 4.89, 4.57), 1.0: Tau.of(3.48, 4.52, 4.02)},
        ("medusa", "kl"): {0.0: Tau.of(2.05, 2.41, 2.11), 1.0: Tau.of(1.72, 2.02, 1.81)},
        ("medusa", "lk_alpha"): {0.0: Tau.of(2.06, 2.42, 2.11), 1.0: Tau.of(1.78, 2.09, 1.85)},
        ("medusa", "lk_lambda"): {0.0: Tau.of(2.07, 2.44, 2.13), 1.0: Tau.of(1.85, 2.22, 1.92)},
        ("mlp_speculator", "kl"): {0.0: Tau.of(2.45, 2.42, 2.42), 1.0: Tau.of(2.13, 2.16, 2.16)},
        ("mlp_speculator", "lk_alpha"): {
            0.0: Tau.of(2.48, 2.46, 2.46),
            1.0: Tau.of(2.17, 2.19, 2.19),
        },
        ("mlp_speculator", "lk_lambda"): {
            0.0: Tau.of(2.48, 2.83, 2.46),
            1.0: Tau.of(2.19, 2.62, 2.18),
        },
    },
    "Llama-3.3-70B-Instruct": {
        ("eagle3", "kl"): {0.0: Tau(4.78), 1.0: Tau(4.50)},
        ("eagle3", "lk_lambda"): {0.0: Tau(4.81), 1.0: Tau(4.66, (3.89, 5.08, 5.01))},
    },
    "gpt-oss-20b": {
        ("eagle3", "kl"): {0.0: Tau(3.46), 1.0: Tau(3.17)},
        ("eagle3", "lk_lambda"): {0.0: Tau(3.49), 1.0: Tau(3.29, (3.20, 3.01, 3.65))},
    },
    "gpt-oss-120b": {
        ("eagle3", "kl"): {0.0: Tau(2.76), 1.0: Tau(2.46)},
        ("eagle3", "lk_lambda"): {0.0: Tau(2.81), 1.0: Tau(2.65)},
    },
    "Qwen3-235B-A22B-Instruct-2507": {
        ("eagle3", "kl"): {0.0: Tau(4.25), 1.0: Tau(3.77)},
        ("eagle3", "lk_lambda"): {0.0: Tau(4.32), 1.0: Tau(4.08, (3.18, 4.42, 4.65))},
    },
    "DeepSeek-V3-0324": {
        ("mtp", "untuned"): {0.0: Tau(3.20), 1.0: Tau(3.09)},
        ("mtp", "kl"): {0.0: Tau(4.79), 1.0: Tau(4.43)},
        ("mtp", "lk_lambda"): {0.0: Tau(4.83), 1.0: Tau(4.68)},
    },
}

#: The loss that the paper's gains are over.
GAIN_BASELINE = "kl"

#: Drafted tokens K in the paper's evaluation.
HEADS = {"eagle3": 7, "mtp": 7, "medusa": 6, "mlp_speculator": 6}


def find_target(name: str) -> str | None:
    """Return the target that a folder or hub id is named after, in any case, or None."""
    wanted = PurePath(name).name.casefold()
    return next((target for target in PUBLISHED if target.casefold() == wanted), None)


def find_benchmark(name: str) -> int | None:
    """Return the index in `BENCHMARKS` of a benchmark, or None.

    Spelling does not matter: ``mt_bench`` is MT-bench, ``human-eval`` is HumanEval.
    """

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.casefold())

    names = [plain(benchmark) for benchmark in BENCHMARKS]
    return names.index(plain(name)) if plain(name) in names else None


__all__ = [
    "BENCHMARKS",
    "GAIN_BASELINE",
    "HEADS",
    "PUBLISHED",
    "Tau",
    "find_benchmark",
    "find_target",
]
