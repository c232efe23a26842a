"""Kill training at random moments, again and again, and compare with a run that nobody killed.

    python -m tests.soak --kills 50 --seed 0

`make soak` runs this; `tests/integration/test_soak.py` a few kills of it. One rank, all ranks or a launcher get
SIGKILL at a step, an evaluation, a checkpoint, the switch of phases or while starting; the same command is then
given again. A run ends when the command gets through; runs follow one another until there were enough kills. At
the end of each its metrics.jsonl must equal, bitwise, that of the run that nobody killed: every line holds sums
over all samples since the one before, so no sample was repeated or lost. Every start must go on from the newest
checkpoint that was complete when it began.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.integration.conftest import (
    NANO,
    REPOSITORY,
    command_environment,
    launcher,
    records,
    run,
    write_corpus,
)

TARGETS = ("one rank", "all ranks", "launcher")
MOMENTS = ("step", "evaluation", "checkpoint", "phase switch", "start")
STEPS, FROZEN_STEPS, EVAL_EVERY = 40, 15, 10
PATIENCE_S = 300.0
"""Before something is taken to hang, at least: a start gets five times what the whole run took on this machine."""


def complete_steps(root: Path) -> list[int]:
    """Steps of all complete checkpoints, by a reading of the format that shares no code with the program."""
    found = []
    for mark in root.glob("step-*/COMPLETE.json"):
        sizes = json.loads(mark.read_text())["files"].items()
        if all(
            (mark.parent / name).exists() and (mark.parent / name).stat().st_size == n for name, n in sizes
        ):
            found.append(int(mark.parent.name.removeprefix("step-")))
    return sorted(found)


def state_of(run_directory: Path) -> str | None:
    """What STATUS says; None if the run did not come that far."""
    path = run_directory / "STATUS"
    return json.loads(path.read_text())["state"] if path.exists() else None


def first_difference(actual: list[dict[str, Any]], expected: list[dict[str, Any]]) -> str:
    """What to look at when two runs differ."""
    for ours, theirs in zip(actual, expected, strict=False):
        keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        if keys:
            values = {key: (ours.get(key), theirs.get(key)) for key in keys[:4]}
            return f"step {ours['step']}, {ours['split']}: {len(keys)} values, {values} (killed, not killed)"
    return f"{len(actual)} lines where there should be {len(expected)}"


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, parents first."""
    found = []
    for task in Path("/proc").glob(f"{pid}/task/*/children"):
        try:
            children = [int(word) for word in task.read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def command_of(pid: int) -> list[str]:
    """Words of a process's command line; empty if it has ended, whether or not anybody has asked after it."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
    except OSError:
        return []


def is_rank(pid: int) -> bool:
    """A training process, not a launcher with its script among the arguments."""
    return "launch/train.py" in command_of(pid)[:4]


def wait_for_end(pids: list[int]) -> None:
    """Of processes whose launcher was killed: until then they may still be at a checkpoint, whatever comes next.

    Raises:
        AssertionError: some outlive it; they are killed.
    """
    deadline = time.monotonic() + PATIENCE_S
    while alive := [pid for pid in pids if command_of(pid)]:
        if time.monotonic() > deadline:
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"processes that outlive their launcher or another rank: {alive}")
        time.sleep(0.01)


def remove_shared_memory(port: str) -> None:
    """DeepSpeed's buffers of a start, 66 MB a rank, where a rank was killed before all had opened them."""
    for file in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        file.unlink(missing_ok=True)


class Soak:
    """The runs of one corpus and what happened to them.

    Args:
        root: directory for everything.
        data: overrides that point at token shards.
        seed: of the random moments.
    """

    def __init__(self, root: Path, data: list[str], seed: int) -> None:
        self.root, self._data, self._draw = root, data, random.Random(seed)
        self.kills: Counter[tuple[str, str]] = Counter()
        self.starts = 0
        self._target = ""  # of the kill of this start
        # A copy, because nothing may change in the hour that this takes: every start reads the program anew.
        self._program = root / "program"
        for package in ("launch", "rqvae", "data_pipeline"):
            shutil.copytree(REPOSITORY / package, self._program / package)
        start = time.monotonic()
        whole = run(self._command("whole"), timeout_s=3600, program=self._program)
        assert whole.returncode == 0, whole.stdout + whole.stderr
        self._patience_s = max(PATIENCE_S, 5 * (time.monotonic() - start))
        self.expected = records(root / "whole/rqvae/metrics.jsonl")
        assert self.expected[-1]["step"] == STEPS

    def _command(self, name: str) -> list[str]:
        return [
            *launcher(2), "--config", str(NANO), "--stage", "rqvae", f"name={name}", f"run_root={self.root}",
            "tracking.wandb=disabled", f"train.steps={STEPS}", f"stages.rqvae.frozen_steps={FROZEN_STEPS}",
            f"train.eval_every={EVAL_EVERY}", "train.checkpoint_every_s=3", *self._data,
        ]  # fmt: skip

    def run_until(self, name: str, kills: int) -> None:
        """Kill one run until it gets through or there were `kills` in all, let it finish, and compare."""
        directory = self.root / name / "rqvae"
        while True:
            before = complete_steps(directory / "checkpoints")
            log = self.root / f"{name}.log"
            command = self._command(name)
            with log.open("w") as file:
                process = subprocess.Popen(
                    command,
                    cwd=self._program,
                    env=command_environment(self._program),
                    stdout=file,
                    stderr=file,
                )
                self.starts += 1
                self._target = ""
                if self.kills.total() < kills:
                    self._kill_at_some_moment(process, directory)
                try:
                    status = process.wait(timeout=self._patience_s)
                except subprocess.TimeoutExpired:
                    for pid in [*descendants(process.pid), process.pid]:
                        os.kill(pid, signal.SIGKILL)
                    raise AssertionError(f"a start hangs: {log.read_text()}") from None
                finally:
                    remove_shared_memory(command[command.index("--master_port") + 1])
            text = log.read_text()
            for step in re.findall(r"Going on from step (\d+)", text):
                assert int(step) == before[-1], f"went on from {step}, complete were {before}"
            assert not (before and "Starting afresh" in text), f"started afresh beside {before}"
            if status == 0 and state_of(directory) == "finished":
                break
            # `deepspeed` exits with 0 when a signal ended its lower process.
            assert status != 0 or self._target == "launcher", (
                f"status 0 of a run that has not finished: {text}"
            )
            assert "error:" not in text.replace("DistNetworkError:", ""), text
        actual = records(directory / "metrics.jsonl")
        assert actual == self.expected, f"'{directory}' differs: {first_difference(actual, self.expected)}"

    def _kill_at_some_moment(self, process: subprocess.Popen[bytes], directory: Path) -> None:
        moment = self._draw.choice(MOMENTS)
        if moment == "phase switch" and (complete_steps(directory / "checkpoints") or [0])[-1] > FROZEN_STEPS:
            moment = "step"
        target = self._draw.choice(TARGETS)
        start, lines = time.monotonic(), len(records(directory / "metrics.jsonl"))
        delay = self._draw.uniform(0, 15) if moment == "start" else self._draw.uniform(0, 0.3)
        while process.poll() is None:
            assert time.monotonic() - start < self._patience_s, f"{moment} never came"
            if self._reached(moment, directory, lines) and (
                moment != "start" or time.monotonic() - start > delay
            ):
                break
            time.sleep(0.003)
        if moment in ("step", "phase switch"):
            time.sleep(delay)
        if process.poll() is None and self._kill(process.pid, target):
            self._target = target
            self.kills[target, moment] += 1
            print(f"{self.kills.total()}: {target} at {moment} of {directory.parent.name}", flush=True)

    def _reached(self, moment: str, directory: Path, lines: int) -> bool:
        if moment == "checkpoint":
            return any(not (path / "COMPLETE.json").exists() for path in directory.glob("checkpoints/step-*"))
        if moment == "phase switch":
            return FROZEN_STEPS in complete_steps(directory / "checkpoints")
        if moment == "start":
            return True
        new = records(directory / "metrics.jsonl")[lines:]
        if moment == "step":
            return bool(new)
        # The training line of such a step is written just before its evaluation begins.
        return any(line["step"] % EVAL_EVERY >= EVAL_EVERY - 1 for line in new)

    def _kill(self, pid: int, target: str) -> bool:
        below = descendants(pid)
        ranks = [child for child in below if is_rank(child)]
        launchers = [pid, *(child for child in below if "deepspeed.launcher.launch" in command_of(child))]
        victims = {"one rank": self._draw.sample(ranks, min(1, len(ranks))), "all ranks": ranks}.get(
            target, [self._draw.choice(launchers)]
        )
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        if victims:
            wait_for_end(below)
        return bool(victims)


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.monotonic()
    root = Path(tempfile.mkdtemp())
    try:
        corpus = root / "documents.jsonl"
        write_corpus(corpus, 400)
        data = [f"data.directory={root / 'shards'}", f"data.source.paths={corpus}"]
        build = [sys.executable, "-m", "data_pipeline", "build", "--config", str(NANO), *data]
        assert run(build).returncode == 0
        soak = Soak(root, data, args.seed)
        runs = 0
        while soak.kills.total() < args.kills:
            soak.run_until(f"run{runs}", args.kills)
            runs += 1
    except AssertionError:
        print(f"what is left to look at: {root}", flush=True)
        raise
    shutil.rmtree(root)
    for (target, moment), count in sorted(soak.kills.items()):
        print(f"{count:4d}  {target} at {moment}")
    print(
        f"{soak.kills.total()} kills, {soak.starts} starts, {runs} runs: all metrics bitwise equal to those of a run "
        f"that nobody killed; {time.monotonic() - start:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
