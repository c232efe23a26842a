"""What rows of a race are beside each other, beside the speed model, and beside the models' quality."""

from __future__ import annotations

from typing import Any

from launch import speed_model
from launch.config import BenchmarkConfig
from launch.race_models import Racers
from launch.race_rows import COMPILED, Output, agreement
from rqvae import FlatTransformer


def compare(table: list[dict[str, Any]], outputs: dict[str, list[Output]], reference: Any) -> None:
    """Speed-ups, and how many tokens are those that the row should have written."""
    ms = {entry["key"]: entry["ms_per_token"] for entry in table}
    fastest = min((entry["ms_per_token"] for entry in table if entry["kind"] == "ar"), default=None)
    for entry in table:
        key, kind = entry["key"], entry["kind"]
        entry["speedup_over_fastest_ar"] = fastest and fastest / entry["ms_per_token"]
        entry["speedup_over_generate"] = ms["generate"] / entry["ms_per_token"] if "generate" in ms else None
        if key in outputs and "agreement" not in entry:
            expected = reference
            if kind == "latent":
                expected = outputs["deferred"][0].token_ids if "deferred" in outputs else None
            elif kind == "identity":
                expected = None
            entry["agreement"] = agreement(outputs[key][0].token_ids, expected)


def predict(
    table: list[dict[str, Any]], racers: Racers, settings: BenchmarkConfig, machine: speed_model.Machine
) -> None:
    """The speed model's figure beside the measured one, where it has one."""
    shape = speed_model.Race(
        settings.batch_size, settings.prompt_tokens, settings.new_tokens, racers.dtype.itemsize
    )
    for entry in table:
        predicted = None
        if entry["kind"] == "ar":
            predicted = speed_model.autoregressive(racers.architecture, shape).seconds(machine)
        elif entry["kind"] in ("latent", "identity"):
            generator = racers.generator(entry["kind"])
            if generator.vae.config.model != "anchor" and not isinstance(
                generator.rq_transformer, FlatTransformer
            ):
                parts = speed_model.latent(
                    generator.vae.config,
                    generator.rq_transformer.config,
                    shape,
                    entry["is_streaming"],
                    entry["key"] in COMPILED,
                )
                split = {part: work.seconds(machine) for part, work in parts.items()}
                entry["predicted_split_ms_per_token"] = {
                    part: 1e3 * s / settings.new_tokens for part, s in split.items()
                }
                predicted = sum(split.values())
        entry["predicted_ms_per_token"] = None if predicted is None else 1e3 * predicted / settings.new_tokens
        entry["predicted_over_measured"] = (
            None if predicted is None else entry["predicted_ms_per_token"] / entry["ms_per_token"]
        )


def quality(kind: str, bits_per_byte: dict[str, float]) -> float | None:
    """Bits per byte of the model of a kind of row; None where they are not known."""
    key = {"ar": "base_lm", "speculative": "base_lm", "latent": "latent_bound", "identity": "identity_codec"}[
        kind
    ]
    return bits_per_byte.get(key)
