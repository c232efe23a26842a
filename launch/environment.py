"""What a run ran on: code, packages, hardware, and a few environment variables by allow-list."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

# Everything else stays out, because the environment holds keys and tokens.
ALLOWED_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "DS_ACCELERATOR",
    "HF_HUB_OFFLINE",
    "LOCAL_WORLD_SIZE",
    "MASTER_PORT",
    "NCCL_DEBUG",
    "NCCL_IB_DISABLE",
    "NCCL_SOCKET_IFNAME",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "SLURM_CPUS_PER_TASK",
    "SLURM_JOB_ID",
    "SLURM_JOB_NUM_NODES",
    "SLURM_NTASKS",
    "SLURM_RESTART_COUNT",
    "TOKENIZERS_PARALLELISM",
    "TORCH_NUM_THREADS",
    "WORLD_SIZE",
)
_ROOT = Path(__file__).resolve().parents[1]


def describe_environment() -> dict[str, Any]:
    """What a reader of a figure wants to know first.

    Returns:
        commit (None outside a git clone), dirty, python, torch, deepspeed, transformers, processor, cores,
        memory_gib, accelerators (names), hostname.
    """
    hardware = _hardware()
    versions = {name: metadata.version(name) for name in ("torch", "deepspeed", "transformers")}
    shown = ("processor", "cores", "memory_gib", "accelerators", "hostname")
    git, _ = _git_state()
    return {**git, "python": platform.python_version(), **versions, **{key: hardware[key] for key in shown}}


def capture_environment(run_dir: Path) -> dict[str, Any]:
    """Write `run_dir/env/` and return `describe_environment()`.

    Files: `git.json` (commit, and whether the work tree differs from it), `git.diff` (how it differs, without
    new files), `packages.txt` (exact versions), `hardware.json`, `variables.json` (allow-list only). They
    describe the latest start of the run.
    """
    directory = run_dir / "env"
    directory.mkdir(parents=True, exist_ok=True)
    git, diff = _git_state()
    variables = {name: os.environ[name] for name in ALLOWED_VARIABLES if name in os.environ}
    packages = sorted({f"{d.name}=={d.version}" for d in metadata.distributions() if d.name}, key=str.lower)
    for name, content in (("git", git), ("hardware", _hardware()), ("variables", variables)):
        (directory / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (directory / "git.diff").write_text(diff, encoding="utf-8")
    (directory / "packages.txt").write_text("\n".join(packages) + "\n", encoding="utf-8")
    return describe_environment()


def _git(*arguments: str) -> str | None:
    """Output of a git command in the project, None where there is no git or no clone."""
    try:
        result = subprocess.run(
            ["git", *arguments],
            cwd=_ROOT,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout


def _git_state() -> tuple[dict[str, Any], str]:
    snapshot = _ROOT / "SNAPSHOT.json"  # a copy of the program that launch/submit.py made for a job
    if snapshot.is_file():
        return json.loads(snapshot.read_text()), ""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "dirty": None}, ""
    status = _git("status", "--porcelain")
    return {"commit": commit.strip(), "dirty": bool(status)}, _git("diff", "HEAD") or ""


def _hardware() -> dict[str, Any]:
    return {
        "hostname": platform.node(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerators": _accelerators(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _accelerators() -> list[str]:
    # Only where the caller has torch already: asking for GPUs is no reason to import it.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
