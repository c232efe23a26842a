"""Measures the memory of a few training steps of the codec on several ranks.

Tensors are counted as operators return them, by the storages that are alive, so nothing comes from the formulas of
`launch/memory.py`. What an operator allocates and frees within is not seen.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from launch.config import RunConfig, load_config
from tests.integration.conftest import free_port, run

STEPS = 2
"""Optimizer states are there from the first one on, so that the second has all that a step ever has."""


class TensorBytes(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most there have been after any operator."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._bytes: dict[StorageWeakRef, int] = {}
        self._total = 0  # of those that were alive when last looked at, and all that came since

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference not in self._bytes:
                    self._bytes[reference] = storage.nbytes()
                    self._total += storage.nbytes()
        if self._total > self.peak:
            self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        """Bytes that are alive."""
        self._bytes = {ref: size for ref, size in self._bytes.items() if not ref.expired()}
        self._total = sum(self._bytes.values())
        return self._total


def measure(
    config_file: Path, overrides: Sequence[str], world_size: int, phase: str
) -> list[dict[str, float]]:
    """Of every rank, in bytes: in tensors, `peak_built` until the engine is there, `tensors` between two steps and
    `peak_tensors` of the last one; and at the same two times the process's resident memory less what it was before
    the model was built, `process` and `peak_process`.
    """
    with tempfile.TemporaryDirectory() as directory:
        request = {
            "config_file": str(config_file),
            "overrides": list(overrides),
            "world_size": world_size,
            "phase": phase,
            "directory": directory,
        }
        result = run([sys.executable, "-m", "tests.integration.memory_of_ranks", json.dumps(request)], 900)
        assert result.returncode == 0, result.stdout + result.stderr
        return [json.loads(Path(directory, f"{rank}.json").read_text()) for rank in range(world_size)]


def main() -> None:
    """Fork the ranks from a process that has imported everything, so that no rank's memory grows by that."""
    request = json.loads(sys.argv[1])

    port = free_port()
    ranks = []
    for rank in range(request["world_size"]):
        process = os.fork()
        if process == 0:
            try:
                _rank(rank, port, **request)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        ranks.append(process)
    failed = [os.waitpid(process, 0)[1] for process in ranks]
    sys.exit(int(any(failed)))


def _rank(
    rank: int,
    port: int,
    config_file: str,
    overrides: Sequence[str],
    world_size: int,
    phase: str,
    directory: str,
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    from launch.engine import start_process_group, stop_process_group

    start_process_group()
    config = load_config(config_file, stage="rqvae", overrides=overrides)
    before = _resident("VmRSS")
    with TensorBytes() as counter:
        found = _train(config, world_size, phase, counter)
    found["process"] -= before
    found["peak_process"] = _resident("VmHWM") - before
    found["peak_tensors"] = counter.peak
    Path(directory, f"{rank}.json").write_text(json.dumps(found))
    stop_process_group()


def _train(config: RunConfig, world_size: int, phase_name: str, counter: TensorBytes) -> dict[str, float]:
    """Steps of a phase; what there is before the last one, whose peak is yet to be read."""
    from launch.codec_tasks import RQVAETask
    from launch.phases import Phases

    task, train = RQVAETask(config), config.train
    phase = next(phase for phase in task.phases() if phase.name == phase_name)
    engine, _ = Phases(task, "bf16" if train.precision == "bf16" else "fp32", torch.device("cpu")).enter(
        phase, None
    )
    length, size = config.data.sample_length, train.micro_batch_size
    ids = torch.randint(config.codec.backbone.architecture.vocab_size, (size, length))
    batch = {
        "input_ids": ids,
        "document_ids": torch.ones_like(ids),
        "sample_index": torch.arange(size),
    }
    num_tokens = torch.tensor(float(size * length))
    found = {"peak_built": float(counter.peak)}
    engine.train()
    for step in range(phase.start, phase.start + STEPS):
        if step == phase.start + STEPS - 1:
            found["process"] = _resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
            found["tensors"] = counter.peak = counter.now()
        for _ in range(train.global_batch_size // size // world_size):
            out = task.forward(engine, batch, num_tokens, step)
            engine.backward(out.loss)
            engine.step()
            del out
        task.after_step(engine.module, step)
    return found


def _resident(field: str) -> float:
    """A figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


if __name__ == "__main__":
    main()
