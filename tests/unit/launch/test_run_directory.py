"""Lock, status and launchers: who may write a run directory, and what became of the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import run_status
from launch.launcher import _is_launcher
from launch.run_lock import RunLock

HOLD = """
import sys, time, os
from pathlib import Path
from launch.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
child = os.fork()  # a forked child must not keep the lock
if child == 0:
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""


def test_a_second_holder_is_told_of_the_first_and_gets_in_when_it_is_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(ValueError, match=rf"in use by process {holder.pid} on .* since 20\d\d-"):
            RunLock(tmp_path, patience_s=0)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with RunLock(tmp_path, patience_s=2):
            assert json.loads((tmp_path / "LOCK").read_text())["pid"] == os.getpid()
        RunLock(tmp_path, patience_s=0).release()
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)


def test_status_keeps_the_first_failure(tmp_path: Path) -> None:
    assert run_status.read(tmp_path) == {}
    run_status.running(tmp_path)
    assert run_status.read(tmp_path)["pid"] == os.getpid()
    run_status.failed(tmp_path, 1, FloatingPointError("non-finite loss"))
    run_status.failed(tmp_path, 0, RuntimeError("connection closed"))
    failed = run_status.read(tmp_path)
    assert (failed["rank"], failed["error"]) == (1, "FloatingPointError: non-finite loss")
    run_status.running(tmp_path)
    run_status.stopped(tmp_path, 7, "SIGTERM")
    assert {"state": "stopped", "step": 7, "reason": "SIGTERM"}.items() <= run_status.read(tmp_path).items()
    run_status.finished(tmp_path, 9)
    assert run_status.read(tmp_path)["state"] == "finished"
    assert [path.name for path in tmp_path.iterdir()] == ["STATUS"]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/x/bin/python3.11 /x/bin/deepspeed --num_gpus 2 launch/train.py", True),
        ("/x/bin/python -u -m deepspeed.launcher.launch --world_info=e30= launch/train.py", True),
        ("python /x/bin/torchrun --standalone launch/train.py", True),
        ("python -m torch.distributed.run launch/train.py", True),
        ("python /x/torch/distributed/run.py launch/train.py", True),
        ("python launch/train.py --config deepspeed", False),
        ("bash run_deepspeed.sh", False),
        ("timeout 60 deepspeed launch/train.py", False),
        ("python -m pytest test_deepspeed_config.py", False),
        ("", False),
    ],
)
def test_launchers_are_known_by_their_command(command: str, expected: bool) -> None:
    assert _is_launcher(command.replace(" ", "\0")) == expected


# Stands for both processes of `deepspeed`, which differ from a rank's in their command line only.
LAUNCHER = """
import subprocess, sys
next_script, *rest = sys.argv[1:]
subprocess.Popen([sys.executable, next_script, *rest]).wait()
"""
RANK = """
import sys, time
from pathlib import Path
from launch.launcher import die_with_launcher
die_with_launcher()
while True:
    Path(sys.argv[1]).write_text(str(time.time()))
    time.sleep(0.02)
"""


@pytest.mark.parametrize("killed", ["outer", "inner"])
def test_ranks_die_with_any_launcher_above_them(tmp_path: Path, killed: str) -> None:
    inner_directory = tmp_path / "inner"
    inner_directory.mkdir()
    outer, inner, rank, beat = (
        tmp_path / "deepspeed",
        inner_directory / "deepspeed",
        tmp_path / "rank.py",
        tmp_path / "beat",
    )
    outer.write_text(LAUNCHER)
    inner.write_text(LAUNCHER)
    rank.write_text(RANK)
    environment = {**os.environ, "CROSS_RANK": "0", "PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen([sys.executable, outer, inner, rank, beat], env=environment)
    deadline = time.monotonic() + 30
    while not beat.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid if killed == "outer" else int(children[0]), signal.SIGKILL)
    process.wait(timeout=10)
    time.sleep(0.5)
    last = beat.read_text()
    time.sleep(0.3)
    assert beat.read_text() == last


IMPORTING = """
import os, sys, time
from pathlib import Path
Path(sys.argv[2]).write_text(str(os.getpid()))
while not Path(sys.argv[3]).exists():
    time.sleep(0.02)
"""


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "alive"])
def test_ranks_end_whose_launcher_was_killed_while_they_were_importing(tmp_path: Path, killed: bool) -> None:
    """The upper process of `deepspeed` is then no longer above them, and the lower one is."""
    upper, lower = tmp_path / "bin/deepspeed", tmp_path / "deepspeed/launcher/launch.py"
    rank = tmp_path / "rank.py"
    for directory in (upper.parent, lower.parent):
        directory.mkdir(parents=True)
    for package in (lower.parent.parent, lower.parent):
        (package / "__init__.py").touch()  # found before the real one
    upper.write_text(LAUNCHER)
    lower.write_text(LAUNCHER)
    rank.write_text(IMPORTING + RANK)
    beat, started, imported = (tmp_path / name for name in ("beat", "started", "imported"))
    environment = {**os.environ, "CROSS_RANK": "0", "PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen(
        [sys.executable, upper, "-m", "deepspeed.launcher.launch", rank, beat, started, imported],
        env=environment,
        cwd=tmp_path,
        start_new_session=True,
    )
    wait_for(lambda: started.exists() and started.read_text() != "")
    if killed:
        process.kill()
        process.wait(timeout=10)
    imported.touch()
    own = int(started.read_text())
    try:
        wait_for(lambda: beat.exists() or not command_line(own))
        assert beat.exists() != killed
    finally:
        process.kill()
        process.wait(timeout=10)
        if command_line(own):
            os.kill(own, signal.SIGKILL)


def command_line(pid: int) -> bytes:
    """Empty for a process that has ended."""
    file = Path(f"/proc/{pid}/cmdline")
    return file.read_bytes() if file.exists() else b""


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
