"""Unsloth as a row of `launch/benchmark.py inference`, measured in its own environment.

It patches transformers for the whole process and wants packages of its own, so it runs after the other rows, not in
turns with them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from launch.config import BenchmarkConfig
from launch.measurement import available_bytes
from launch.race_models import Racers, parameter_bytes
from launch.race_rows import NAMES, agreement

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv-unsloth" / "bin" / "python"
PARITY = 0.99
"""Share of plain transformers' tokens that it has to write to count, in fp32. Rounding in 16 bits decides ties
otherwise, and one such token changes all that follow: there the share is reported and nothing is refused."""


def unsloth_row(
    racers: Racers, prompts: list[list[int]], settings: BenchmarkConfig, reference: list[list[int]] | None
) -> dict[str, Any]:
    """Figures of the row, or a dict with nothing but the `reason` why there are none.

    Args:
        reference: what plain transformers wrote, which is checked first.
    """
    if not PYTHON.is_file():
        return {"reason": f"{PYTHON.parent.parent.name} is not installed; run: make unsloth"}
    if reference is None:
        return {"reason": "its outputs are checked against the row `generate`, which is not among --rows"}
    needed, free = parameter_bytes(racers.lm) * 3 // 2, available_bytes()
    if racers.device.type == "cpu" and free is not None and free < needed:
        return {
            "reason": f"needs a second copy of the weights, {needed / 1e9:.1f} GB; {free / 1e9:.1f} are free"
        }
    with tempfile.TemporaryDirectory() as directory:
        # From disk, as there is no other way into it; with the tokenizer that it insists on.
        if racers.lm_directory is None:
            racers.lm.save_pretrained(directory)
        else:
            for file in racers.lm_directory.iterdir():
                (Path(directory) / file.name).symlink_to(file.resolve())
        racers.latent.tokenizer.save_pretrained(directory)
        request = {
            "directory": directory,
            "prompts": prompts,
            "new_tokens": settings.new_tokens,
            "warm_up": min(settings.new_tokens, 32),
            "repeats": settings.repeats,
            "dtype": str(racers.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }
        done = subprocess.run(
            [str(PYTHON), str(ROOT / "launch" / "unsloth_peer.py")],
            input=json.dumps(request),
            capture_output=True,
            text=True,
        )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {"reason": f"it failed: {said[-1] if said else f'status {done.returncode}'}"}
    answer = json.loads(done.stdout.splitlines()[-1])
    share = agreement(answer["token_ids"], reference)
    assert share is not None
    if racers.dtype == torch.float32 and share < PARITY:
        return {"reason": f"it writes other tokens than transformers ({100 * share:.1f} % are the same)"}
    median = statistics.median(answer["seconds"])
    return {
        "key": "unsloth",
        "name": NAMES["unsloth"][0],
        "kind": NAMES["unsloth"][1],
        "is_streaming": True,
        "tokens_per_s": settings.batch_size * settings.new_tokens / median,
        "ms_per_token": 1e3 * median / settings.new_tokens,
        "spread_ms_per_token": 1e3 * (max(answer["seconds"]) - min(answer["seconds"])) / settings.new_tokens,
        "first_text_ms": 1e3 * statistics.median(answer["first_s"]),
        "agreement": share,
        "weight_bytes": answer["weight_bytes"],
        "kv_bytes_per_token": racers.kv_bytes(racers.architecture),
        "decoder_kv_bytes_per_token": 0.0,
        "peak_growth_bytes": None,
        "split_ms_per_token": None,
        "overhead_share": None,
        "note": f"Unsloth {answer['version']} on {answer['device']}, in a process of its own after the others",
    }
