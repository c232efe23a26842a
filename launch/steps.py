"""Commands in a row, each skipped when what it reads and what it wrote are, by content, what they were before.

    failure = run_steps(steps, project, records)

A step that was interrupted is started again, and goes on by itself where it can (training, encoding, building data).
The steps themselves are in launch/chain.py. Free of torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import run_status
from launch.report_data import read_report

REPOSITORY = Path(__file__).resolve().parent.parent
_TOLD_LINES = 8  # of a failed step's log
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Step:
    """One command of a chain."""

    name: str
    command: list[str]
    inputs: list[Path]
    """Files and directories that the result depends on."""
    outputs: list[Path]
    settings: str = ""
    """What else it depends on: the part of the configuration that it reads, as text."""
    threads: int | None = None
    """OMP_NUM_THREADS of each process, where the environment does not say; None leaves it alone."""
    run_directory: Path | None = None
    """Of training, whose STATUS has the last word: `deepspeed` exits with 0 when a signal ended its lower process."""
    goes_on: bool = False
    """Interrupted, it goes on from what it has written; otherwise that is removed first."""
    report_key: tuple[Path, str] | None = None
    """Of a step that writes into a report which others write into as well: the file, and a key that it then holds."""


@dataclass(frozen=True)
class Failure:
    """The step that ended a chain."""

    step: str
    status: int
    reason: str
    """The last lines of what it said, where that was kept."""


def run_steps(
    steps: Sequence[Step], project: Path, records: Path, logs: Path | None = None
) -> Failure | None:
    """Run what is not done yet, in order, up to the first failure.

    Args:
        project: outputs of a step are removed before it starts afresh, if they are in this directory.
        records: directory for what `mark` notes.
        logs: directory for each step's output; None lets it pass to the terminal.
    """
    for number, step in enumerate(steps, 1):
        record = records / f"{step.name}.json"
        if is_done(step, record):
            print(f"[{number}/{len(steps)}] {step.name}: done already", flush=True)
            continue
        print(f"[{number}/{len(steps)}] {step.name}: {shlex.join(step.command)}", flush=True)
        if not (step.goes_on and was_interrupted(step, record)):
            remove_outputs(step, project)
        mark(step, record, finished=False)
        begin = time.monotonic()
        log = None if logs is None else REPOSITORY / logs / f"{step.name}.log"
        status = run(step, log)
        if status != 0:
            return Failure(step.name, status, "" if log is None else last_words(log))
        mark(step, record, finished=True, seconds=time.monotonic() - begin)
        print(f"    {time.monotonic() - begin:.0f} s", flush=True)
    return None


def run(step: Step, log: Path | None = None) -> int:
    """Run the command from the repository; returns its exit status, or 1 if training does not say it is done."""
    environment = dict(os.environ)
    if step.threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(step.threads))
    directory = None if step.run_directory is None else REPOSITORY / step.run_directory
    if directory is not None:
        (directory / run_status.FILE).unlink(missing_ok=True)  # what it says of an earlier start
    with contextlib.ExitStack() as opened:
        output = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            output = opened.enter_context(log.open("wb"))
        status = subprocess.run(
            step.command,
            cwd=REPOSITORY,
            env=environment,
            check=False,
            stdout=output,
            stderr=output,
            preexec_fn=_die_with_parent,
        ).returncode
    if status == 0 and directory is not None:
        return int(run_status.read(directory).get("state") != "finished")
    return status


def _die_with_parent() -> None:
    """In the child: SIGKILL when the chain is killed, or it would work on where the next start does. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def last_words(log: Path) -> str:
    """What a failed command said of the reason: from its last line that names an error, else its last lines."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    lines = [line for line in lines if line.strip()]
    told = [index for index, line in enumerate(lines) if "rror: " in line]
    start = told[-1] if told else max(0, len(lines) - _TOLD_LINES)
    return "\n".join(lines[start : start + _TOLD_LINES])


def is_done(step: Step, record: Path) -> bool:
    """The step finished before, reading and writing exactly what is there now."""
    known = recorded(record)
    if step.report_key is not None:
        path, key = step.report_key
        if key not in read_report(REPOSITORY / path):
            return False
    return known is not None and known == {**inputs_of(step), "outputs": content_hash(step.outputs)}


def was_interrupted(step: Step, record: Path) -> bool:
    """The step was started on what is there now and did not finish."""
    return recorded(record) == {**inputs_of(step), "outputs": None}


def recorded(record: Path) -> dict[str, str | None] | None:
    """State noted by `mark`, None if there is none that can be read."""
    try:
        return json.loads(record.read_text())["state"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return None


def mark(step: Step, record: Path, finished: bool, seconds: float = 0.0) -> None:
    """Note what the step reads and, when it has finished, what it wrote."""
    record.parent.mkdir(parents=True, exist_ok=True)
    state = {**inputs_of(step), "outputs": content_hash(step.outputs) if finished else None}
    record.write_text(json.dumps({"state": state, "wall_s": seconds}, indent=2) + "\n")


def seconds_of(records: Path, steps: Sequence[Step]) -> float:
    """Wall-clock seconds that the finished steps have taken, whenever that was."""
    return sum(json.loads((records / f"{step.name}.json").read_text())["wall_s"] for step in steps)


def inputs_of(step: Step) -> dict[str, str | None]:
    """What the step depends on: its command (but for the port, and where programs lie), its settings and the content
    of its inputs."""
    port = step.command.index("--master_port") + 1 if "--master_port" in step.command else None
    programs = Path(sys.executable).parent
    command = [
        "python" if word == sys.executable else word.removeprefix(f"{programs}/")
        for index, word in enumerate(step.command)
        if index != port
    ]
    return {
        "command": shlex.join(command),
        "settings": hashlib.sha256(step.settings.encode()).hexdigest(),
        "inputs": content_hash(step.inputs),
    }


def content_hash(paths: Sequence[Path]) -> str:
    """sha256 over names and contents of files, directories with all that is in them; what is missing counts."""
    digest = hashlib.sha256()
    for path in paths:
        root = REPOSITORY / path
        files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
        for file in files:
            digest.update(
                str(file.relative_to(REPOSITORY) if file.is_relative_to(REPOSITORY) else file).encode()
            )
            digest.update(hash_file(file) if file.is_file() else b"missing")
    return digest.hexdigest()


def hash_file(path: Path) -> bytes:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def remove_outputs(step: Step, project: Path) -> None:
    """Remove what the step made from other inputs. Shared data stays: its build knows what it can keep."""
    for output in step.outputs:
        path = REPOSITORY / output
        if not path.is_relative_to(REPOSITORY / project):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def as_text(settings: Mapping[str, Any]) -> str:
    """Settings as text that is equal where they are."""
    return json.dumps(settings, sort_keys=True)
