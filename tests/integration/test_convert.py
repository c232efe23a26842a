"""Checkpoints of a real run converted by the real command, and what that takes of memory."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rqvae import RQVAE
from tests.integration.conftest import NANO, REPOSITORY, command_environment, run

pytestmark = pytest.mark.slow
# Mostly embeddings and head, 100 million parameters: large beside what the libraries take by themselves.
LARGE = [
    "codec.backbone.architecture.vocab_size=65536", "codec.backbone.architecture.hidden_size=768",
    "train.steps=1", "train.warmup_steps=0", "stages.rqvae.frozen_steps=0", "stages.rqvae.switch_warmup_steps=0",
    "stages.rqvae.quantizer_warmup_steps=1",
]  # fmt: skip


def peak_anonymous_bytes(command: list[str]) -> int:
    """Run a command; the most memory of its own (RssAnon) that it was seen with."""
    process = subprocess.Popen(command, cwd=REPOSITORY, env=command_environment(), stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        for line in status.splitlines():
            if line.startswith("RssAnon"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.005)
    assert process.wait() == 0
    return peak


def test_conversion_streams_and_universal_has_all(tmp_path: Path, nano_data: list[str]) -> None:
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]
    settings = ["--config", str(NANO), "--stage", "rqvae", "name=large", f"run_root={tmp_path}", *nano_data]
    trained = run([*torchrun, "launch/train.py", *settings, "tracking.wandb=disabled", *LARGE], timeout_s=900)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    convert = [sys.executable, "launch/convert_checkpoint.py", str(tmp_path / "large/rqvae")]

    peak = peak_anonymous_bytes([*convert, str(tmp_path / "model"), "--to", "safetensors"])
    [shard] = (tmp_path / "model").glob("*.safetensors")
    print(f"peak {peak / 2**20:.0f} MiB, largest shard {shard.stat().st_size / 2**20:.0f} MiB")
    assert peak < 1.3 * shard.stat().st_size
    state = RQVAE.from_pretrained(tmp_path / "model").state_dict()

    universal = run([*convert, str(tmp_path / "universal"), "--to", "universal"], timeout_s=900)
    assert universal.returncode == 0, universal.stdout + universal.stderr
    print(universal.stdout.splitlines()[-2])
    rest = load_file(tmp_path / "universal/not_universal.safetensors")
    assert {name for name in state if "quantizer" in name} <= rest.keys()
    for name, tensor in state.items():
        if name in rest:
            assert torch.equal(rest[name], tensor)
        else:
            content = torch.load(tmp_path / "universal/zero" / name / "fp32.pt", weights_only=True)
            assert torch.equal(content.view(tensor.shape), tensor)  # a bare tensor under ZeRO-3
