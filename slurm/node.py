"""One node of a training job: limits and environment, then `torchrun` in this process's place.

srun --ntasks-per-node=1 python -m slurm.node --master ADDRESS:PORT --logs DIR -- launch/train.py ...
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys

from slurm.scheduler import ranks_per_node, shutdown_s


def main(arguments: list[str] | None = None) -> None:
    """Replace this process by the node's `torchrun`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--master", required=True, metavar="ADDRESS:PORT", help="of the first node")
    parser.add_argument("--logs", required=True, help="directory for the output of every rank")
    parser.add_argument("command", nargs="+", help="script and its arguments")
    args = parser.parse_args(arguments)
    # Slurm sends a signal to every process of a step. What is ignored here stays so in torchrun, which SIGUSR2
    # would end, and in the ranks until they can stop with a checkpoint.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    raise_limits()
    for name, value in environment(ranks_per_node(), num_cores()).items():
        os.environ.setdefault(name, value)
    node, nodes = int(os.environ["SLURM_NODEID"]), int(os.environ["SLURM_NNODES"])
    command = torchrun(args.master, node, nodes, ranks_per_node(), args.logs, args.command)
    os.execv(command[0], command)  # noqa: S606


def torchrun(master: str, node: int, nodes: int, ranks: int, logs: str, command: list[str]) -> list[str]:
    """Command line of the launcher on one node. All ranks write files; the first of the job also to the job's log."""
    address, _, port = master.rpartition(":")
    return [
        *[sys.executable, "-m", "torch.distributed.run"],
        *[f"--nnodes={nodes}", f"--node-rank={node}", f"--nproc-per-node={ranks}"],
        *[f"--master-addr={address}", f"--master-port={port}", "--max-restarts=0"],
        *[f"--shutdown-timeout={shutdown_s()}", f"--log-dir={logs}/node-{node}", "--redirects=3"],
        *(["--tee=0:3"] if node == 0 else []),
        *command,
    ]


def environment(ranks: int, cores: int) -> dict[str, str]:
    """What is set where neither the user nor the site has: threads of a rank, and errors instead of hanging."""
    return {
        "OMP_NUM_THREADS": str(max(1, cores // ranks)),
        "NCCL_DEBUG": "WARN",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }


def num_cores() -> int:
    """Cores of this task."""
    return int(os.environ.get("SLURM_CPUS_PER_TASK") or len(os.sched_getaffinity(0)))


def raise_limits() -> None:
    """Soft limits to the hard ones: open files (shards, sockets), locked memory (InfiniBand); no core dumps."""
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK):
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (hard, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


if __name__ == "__main__":
    main()
