"""What training has cost: tokens, FLOPs and seconds by stage, and of everything a model needs together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline import TokenDataset
from data_pipeline.errors import DatasetError
from launch.config import RunConfig, load_config
from launch.metrics_log import read_metrics
from launch.training_flops import encoding_flops, stage_flops

STAGES = ("base_lm", "rqvae", "rq_transformer", "joint")


def compute_report(project: Path) -> dict[str, Any]:
    """The report's `compute`, from the run directories in `project`.

    Returns:
        By stage `steps`, `train_tokens`, `train_flops`, `wall_s`; `encoding` with the tokens and FLOPs of encoding
        the training text into codes, where there are codes; and `total_latent`, everything that the latent model
        stands on: its own stages, encoding, and the base LM where the codec's backbone was started from pretrained
        weights. `total_base_lm` is what it is to be compared with.
    """
    report: dict[str, Any] = {}
    configs: dict[str, RunConfig] = {}
    for stage in STAGES:
        run = project / stage
        if not (run / "config.yaml").is_file():
            continue
        config = configs[stage] = load_config(run / "config.yaml")
        records = read_metrics(run / "metrics.jsonl")
        steps = max((record["step"] for record in records), default=0)
        tokens_per_step = config.train.global_batch_size * config.data.sample_length
        report[stage] = {
            "steps": steps,
            "train_tokens": steps * tokens_per_step,
            "train_flops": stage_flops(stage, config, steps),
            "wall_s": max((record.get("time_s", 0.0) for record in records), default=0.0),
        }
    if "rq_transformer" in configs and (encoded := _encoding(configs["rq_transformer"], project / "codes")):
        report["encoding"] = encoded
    needed: list[str] = [name for name in ("rqvae", "encoding", "rq_transformer", "joint") if name in report]
    codec = next((configs[name] for name in ("rqvae", "joint") if name in configs), None)
    if codec is not None and codec.codec.backbone.pretrained is not None and "base_lm" in report:
        needed.insert(0, "base_lm")
    for name, parts in (
        ("total_latent", needed),
        ("total_base_lm", ["base_lm"] if "base_lm" in report else []),
    ):
        if parts:
            report[name] = {"parts": parts} | {
                key: sum(report[part].get(key, 0) for part in parts)
                for key in ("train_tokens", "train_flops", "wall_s")
            }
    return report


def _encoding(config: RunConfig, codes: Path) -> dict[str, Any]:
    """One pass of the encoder over the splits that there are codes of; empty where codes or text are gone."""
    sources = {source.name: source.directory for source in config.data.mixture} or {"": config.data.directory}
    tokens = 0
    for name, directory in sources.items():
        for split in ("train", "validation"):
            if (codes / name / split).is_dir():
                try:
                    tokens += len(TokenDataset(directory, split)) * config.data.sample_length
                except (DatasetError, OSError):
                    return {}
    return {"train_tokens": tokens, "train_flops": encoding_flops(config, tokens)} if tokens else {}
