"""Check the GPU path, in phases that each write a report before the next begins.

Every phase is a process that ends at its limit, and keeps what it has measured by then. Started
again without naming phases, the command goes on with those that are not whole.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from benchmarks.gpu_check.record import Record

#: By name in their order, the seconds that each phase may take. The first three fit into a command
#: of six minutes, and the others into a second one, the last with what is left of its limit.
PHASES: Final[Mapping[str, int]] = {
    "correctness": 120,
    "operations": 130,
    "sharded": 60,
    "steps": 170,
    "study": 330,
}
#: After its limit a phase has these to end by itself, and these to be ended.
GRACE: Final = 15
#: Seconds in which a driver says what card there is.
ANSWERED_IN: Final = 60
#: For all together: a command on a machine that is lent has ten minutes.
SECONDS: Final = 570


def main() -> None:
    """Run the phases, write the tables, and exit with 1 if anything was wrong."""
    options = _parsed()
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    # Read when torch and Triton are imported. The last lets processes fork: to ask whether there is
    # a GPU must not touch it.
    if options.dry:
        os.environ |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    os.environ |= {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "PYTHONWARNINGS": "ignore"}
    warnings.simplefilter("ignore")
    device = "cpu" if options.dry else "cuda"
    os.environ["SPECFORGE_DEVICE"] = device
    import torch

    from benchmarks.gpu_check import record, table

    # Once, for all processes; one that cannot be imported says so in its report.
    for name in options.phases or PHASES:
        with suppress(Exception):
            import_module(f"benchmarks.gpu_check.{name}")
    # Should an import have touched the device, a process that forks could not.
    method = "spawn" if torch.cuda.is_initialized() else "fork"
    try:
        machine = _elsewhere(method, record.machine, device)
    except RuntimeError as error:
        sys.exit(f"there is no GPU to check ({error}); --dry rehearses on a CPU")
    folder = options.out / record.folder_name(machine["card"])
    head = {"machine": machine, **record.code(), "dry": options.dry, "command": sys.argv[1:]}
    wrong = False
    wanted = options.phases or record.unfinished(folder, PHASES, head)
    if not wanted:
        print("every phase has a whole report: name those to run again")
    for name in wanted:
        left = options.seconds - (time.monotonic() - began) - GRACE
        limit = min(options.limit.get(name, PHASES[name]), left)
        if limit < 1:
            print(f"{name}: no time is left", flush=True)
            continue
        print(f"{name}: at most {limit:.0f} seconds", flush=True)
        report = record.Record(
            path=folder / f"{name}.json",
            head={"phase": name, **head},
            device=device,
            dry=options.dry,
            deadline=time.monotonic() + limit,
            model=options.model,
        )
        report.write()
        wrong |= not _ran(name, report, limit + GRACE, method)
        try:
            table.write(folder)
        except Exception as error:  # the reports are there, and the next phase is not its business
            print(f"  no tables: {record.described(error)}")
            wrong = True
    print(folder / table.NAME, flush=True)
    if multiprocessing.active_children():
        # Python would wait for what cannot be ended because a driver hangs.
        os._exit(1)
    if wrong:
        sys.exit(1)


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "phases", nargs="*", help=f"of {', '.join(PHASES)}; by default those that are not whole"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of reports")
    parser.add_argument("--dry", action="store_true", help="rehearse, tiny, on a CPU")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all phases together")
    parser.add_argument(
        "--limit", action="append", default=[], help="PHASE=SECONDS in place of its own; repeatable"
    )
    parser.add_argument("--model", type=Path, help="folder of the model's parts, for `study`")
    options = parser.parse_args()
    limits = dict(word.partition("=")[::2] for word in options.limit)
    if unknown := [name for name in (*options.phases, *limits) if name not in PHASES]:
        parser.error(f"{unknown[0]}: name phases of {', '.join(PHASES)}")
    try:
        options.limit = {name: float(value) for name, value in limits.items()}
    except ValueError:
        parser.error(f"--limit {options.limit[0]}: give PHASE=SECONDS, such as steps=120")
    return options


def _ran(name: str, report: Record, seconds: float, method: str = "fork") -> bool:
    """Run a phase in a process of its own; return whether nothing was found wrong."""
    import json

    context: Any = multiprocessing.get_context(method)
    process = context.Process(target=_phase, args=(name, report))
    process.start()
    try:
        process.join(seconds)
    finally:  # too late, or this process is asked to end
        if process.is_alive():
            _end_group(process)
    found = json.loads(report.path.read_text())
    if found["ended"] == "under way":
        report.rows, report.left_out = found["rows"], found["left_out"]
        report.ended = "ended for being late" if process.exitcode == -signal.SIGKILL else "died"
        report.write()
        found["ended"] = report.ended
    failed = [row for row in found["rows"] if row.get("ok") is False]
    for row in failed:
        print(f"  WRONG: {row}")
    print(f"{name}: {found['ended']}, {len(found['rows'])} rows, {len(failed)} wrong", flush=True)
    return not failed and found["ended"] in ("whole", "out of time", "skipped")


def _end_group(process: BaseProcess) -> None:
    """End a phase with every process that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.kill()
    process.join(GRACE)


def _phase(name: str, report: Record) -> None:
    # A group, and no session of its own: what ends the command ends all of it.
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        import_module(f"benchmarks.gpu_check.{name}").run(report)
        if report.ended == "under way":
            report.ended = "out of time" if report.left_out else "whole"
    except BaseException as error:
        report.ended = f"failed: {type(error).__name__}: {error}"[:1000]
        raise
    finally:
        report.write()


def _elsewhere(method: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns in another process, so that this one stays off the GPU.

    Raises:
        RuntimeError: the function raised, and the message is that of its error; or no answer came.
    """
    context: Any = multiprocessing.get_context(method)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        answer = here.recv() if here.poll(ANSWERED_IN) else f"no answer in {ANSWERED_IN} seconds"
    except EOFError:
        answer = "the process that asked died"
    process.kill()
    process.join(GRACE)
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return answer


def _answer(there: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        there.send(function(*arguments))
    except Exception as error:
        there.send(f"{type(error).__name__}: {error}".split("\n")[0])


if __name__ == "__main__":
    main()
