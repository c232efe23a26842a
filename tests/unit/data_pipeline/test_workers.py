from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from data_pipeline.errors import WorkerError
from data_pipeline.workers import map_in_processes

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="looks at processes through /proc"
)


def descendants(pid: int) -> list[int]:
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *descendants(int(child))]
    return found


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until(condition: object, seconds: float = 60.0) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def start_at_a_terminal(command: list[str]) -> subprocess.Popen[str]:
    """A process of its own group that Ctrl-C reaches, also where the tests run as a background job."""
    return subprocess.Popen(
        command,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def half_or_fail(number: int) -> float:
    if number < 0:
        raise ValueError(f"{number} is negative")
    if number == 99:
        os.kill(os.getpid(), signal.SIGKILL)
    return number / 2


def test_results_keep_the_order_of_the_items() -> None:
    assert map_in_processes(half_or_fail, range(7), 2) == [number / 2 for number in range(7)]


def tokenizing_threads(_: int) -> tuple[str, str]:
    time.sleep(0.2)
    return os.environ["RAYON_NUM_THREADS"], os.environ["TOKENIZERS_PARALLELISM"]


def test_few_items_share_all_cores() -> None:
    """Half of a machine would idle, or be fought over, otherwise."""
    cores = len(os.sched_getaffinity(0))
    assert map_in_processes(tokenizing_threads, [0], 4) == [(str(cores), "true" if cores > 1 else "false")]
    many = map_in_processes(tokenizing_threads, range(cores), cores)
    assert many == [("1", "false")] * cores


def test_errors_stop_the_others() -> None:
    with pytest.raises(ValueError, match="-1 is negative"):
        map_in_processes(half_or_fail, [1, -1, *range(50)], 2)
    with pytest.raises(WorkerError, match="a worker process was killed, perhaps for lack of memory"):
        map_in_processes(half_or_fail, [99, 1], 2)


SLEEPERS = """
import sys, time
from data_pipeline.workers import map_in_processes
try:
    map_in_processes(time.sleep, [600.0, 600.0], 2)
except KeyboardInterrupt:
    sys.exit("stopped")
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_die_with_their_parent(number: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", SLEEPERS])
    # two workers and Python's resource tracker
    wait_until(lambda: len(descendants(parent.pid)) == 3)
    time.sleep(random.Random(number).random())  # while they start, or once they work
    workers = descendants(parent.pid)
    parent.send_signal(number)
    assert parent.wait() == -number
    wait_until(lambda: not any(runs(pid) for pid in workers), 20)


def takes_interrupts(pid: int) -> bool:
    """Whether SIGINT would reach the process: it is neither blocked nor ignored."""
    lines = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return not (int(lines["SigBlk"], 16) | int(lines["SigIgn"], 16)) & 1 << signal.SIGINT - 1


def test_workers_do_not_see_ctrl_c_from_their_start_on() -> None:
    parent = start_at_a_terminal([sys.executable, "-c", SLEEPERS])
    wait_until(lambda: len(descendants(parent.pid)) == 3)
    workers = descendants(parent.pid)
    wait_until(lambda: takes_interrupts(parent.pid))  # held back only while it starts them
    assert not any(takes_interrupts(pid) for pid in workers)
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.communicate(timeout=20)[1] == "stopped\n"
    wait_until(lambda: not any(runs(pid) for pid in workers), 20)


def test_ctrl_c_ends_a_build_in_one_line(tmp_path: Path) -> None:
    generator = random.Random(0)
    words = [f"word{number}" for number in range(1000)]
    for name in ("a", "b"):
        text = [" ".join(generator.choices(words, k=200)) for _ in range(4000)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in text))
    data = {
        "directory": str(tmp_path / "tokens"),
        "source": {"kind": "jsonl", "paths": [str(tmp_path / "*.jsonl")]},
        "tokenizer": {"kind": "bpe", "vocab_size": 300, "training_mib": 1},
        "samples_per_shard": 50,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"data": data}))
    command = [sys.executable, "-m", "data_pipeline", "build", "--num-workers", "2", "--config"]
    parent = start_at_a_terminal([*command, str(tmp_path / "run.yaml")])
    wait_until(lambda: list(tmp_path.glob("tokens/.build/*/unit-*/train/*.tar")))
    workers = descendants(parent.pid)
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does: to every process
    _, shown = parent.communicate(timeout=20)
    assert parent.returncode == 130
    lines = [line for line in shown.splitlines() if "parts of the source:" not in line]
    assert lines == ["interrupted; what is done is kept, and the same command goes on from there"]
    wait_until(lambda: not any(runs(pid) for pid in workers), 20)
