"""A short all-reduce over all ranks, and between neighbouring nodes, timed. Started by `slurm.preflight`."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

# A request to stop is no fault of the node; and the import of torch takes long.
signal.signal(signal.SIGUSR2, signal.SIG_IGN)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from slurm.preflight import ALLREDUCE, TIMEOUT_S  # noqa: E402

REPEATS = 5


def main(arguments: list[str]) -> int:
    """One rank; the first writes the figures."""
    directory, (address, _, port) = Path(arguments[0]), arguments[1].rpartition(":")
    rank, world_size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["SLURM_LOCALID"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    patience = timedelta(seconds=TIMEOUT_S / 2)
    # Before all are there: whoever has come this far is not the one that the others wait for.
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address, int(port), world_size, rank == 0, patience, wait_for_workers=False
    )
    node = os.environ["SLURMD_NODENAME"]
    (directory / f"{node}.joined").touch()
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world_size, timeout=patience
    )
    names: list[str] = [""] * world_size
    dist.all_gather_object(names, node)
    megabytes = 256 if on_gpu else 4
    values = torch.ones(megabytes * 1_000_000 // 4, device=device)
    everywhere = bandwidth(values, None, world_size)
    pairs: dict[str, float] = {}
    firsts = [names.index(name) for name in dict.fromkeys(names)]
    for left, right in itertools.pairwise(firsts) if len(firsts) > 2 else ():
        group = dist.new_group([left, right])
        if rank in (left, right):
            pairs[f"{names[left]} {names[right]}"] = bandwidth(values, group, 2)
    gathered: list[dict[str, float]] = [{}] * world_size
    dist.all_gather_object(gathered, pairs)
    if rank == 0:
        together = {name: speed for part in gathered for name, speed in part.items()}
        content = {"gb_per_s": everywhere, "pairs": together, "ranks": world_size}
        (directory / ALLREDUCE).write_text(json.dumps(content) + "\n")
    dist.barrier()
    dist.destroy_process_group()
    return 0


def bandwidth(values: torch.Tensor, group: dist.ProcessGroup | None, ranks: int) -> float:
    """Bus bandwidth of an all-reduce in GB/s: 2 (n - 1) / n times the bytes, over the time of the fastest."""
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        dist.all_reduce(values, group=group)
        if values.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 2 * (ranks - 1) / ranks * values.nbytes / min(times) / 1e9


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
