"""Latent decoding against whatever else one would pick, side by side in one run.

Every row continues the same prompts by the same number of kept tokens, greedily and past any end of text. Rows take
turns after a warm-up of each. A row that cannot be run stays in the table, with the reason.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from launch import speed_model
from launch.config import BenchmarkConfig
from launch.environment import describe_environment
from launch.measurement import peak_extra_bytes, take_turns, time_limit
from launch.race_comparison import compare, predict, quality
from launch.race_models import Racers, parameter_bytes
from launch.race_rows import COMPILED, NAMES, Output, Row, rows
from launch.unsloth_row import unsloth_row
from launch.work_per_token import ar_work_per_token, latent_work_per_token

WARM_UP_STEPS, WARM_UP_TOKENS, WARM_UP_S = 4, 32, 1.0
"""Before it is timed each row takes so many steps, and if that took less than so long, it writes so many tokens."""
RANDOM_NOTE = "random weights: speed only; they repeat themselves, so speculative rows do not count"
PARTS = ("encode", "spatial", "depth", "decode")


def race(
    racers: Racers,
    prompts: list[list[int]],
    settings: BenchmarkConfig,
    measure: Callable[[], speed_model.Machine],
    wanted: set[str],
    bits_per_byte: dict[str, float] | None = None,
) -> dict[str, Any]:
    """One table.

    Args:
        prompts: as `settings` says.
        measure: the machine, for the predictions; called before and after the race.
        wanted: keys of `NAMES`; the others are listed as left out.
        bits_per_byte: of report.json, quality beside speed.

    Returns:
        rows, missing (key, name, reason), fastest_ar, what was run, and the machine. See `table_row` for the figures.
    """
    found, missing = rows(racers, prompts, settings.new_tokens, wanted)
    warm_up(found, missing, settings)
    device = racers.device
    machines = [measure()]
    outputs: dict[str, list[Output]] = {key: [] for key in found}
    growth: dict[str, list[int | None]] = {key: [] for key in found}

    def timed(key: str, row: Row) -> Callable[[], None]:
        def run() -> None:
            start = time.perf_counter()
            done: list[Output] = []
            growth[key].append(_peak(lambda: done.append(row.run(settings.new_tokens)), device))
            outputs[key] += done
            progress(
                f"{row.name}: {len(outputs[key])} of {settings.repeats}, {time.perf_counter() - start:.2f} s"
            )

        return run

    def first(row: Row) -> Callable[[], Output]:
        return lambda: row.run(min(row.chunk, settings.new_tokens))

    seconds = take_turns({key: timed(key, row) for key, row in found.items()}, settings.repeats, device, True)
    at_once = {key: first(row) for key, row in found.items() if row.is_streaming}
    first_s = take_turns(at_once, settings.repeats, device, True)
    machines.append(measure())
    machine = speed_model.mean_machine(machines)
    reference = outputs["generate"][0].token_ids if "generate" in outputs else None
    table = []
    for key, row in found.items():
        table.append(
            table_row(row, racers, settings, seconds[key], first_s.get(key, seconds[key]), outputs[key])
            | {"peak_growth_bytes": max((grown for grown in growth[key] if grown is not None), default=None)}
        )
    if "unsloth" in wanted:
        entry = unsloth_row(racers, prompts, settings, reference)
        progress(f"{NAMES['unsloth'][0]}: {entry.get('reason', 'done')}")
        if "reason" in entry:
            missing["unsloth"] = entry["reason"]
        else:
            table.append(entry)
    for key in NAMES:
        if key not in wanted:
            missing[key] = "left out by --rows"
    compare(table, outputs, reference)
    predict(table, racers, settings, machine)
    for entry in table:
        entry["bits_per_byte"] = quality(entry["kind"], bits_per_byte or {})
    order = list(NAMES)
    table.sort(key=lambda entry: order.index(entry["key"]))
    codec = racers.latent.vae.config
    return {
        "rows": table,
        "missing": [{"key": k, "name": NAMES[k][0], "reason": missing[k]} for k in order if k in missing],
        "fastest_ar": next(
            (entry["name"] for entry in table if entry["speedup_over_fastest_ar"] == 1.0), None
        ),
        "backbone_parameters": parameter_bytes(racers.lm) // racers.dtype.itemsize,
        "compression_factor": codec.compression_factor,
        "codebook_levels": codec.codebook_levels,
        "codebook_size": codec.codebook_size,
        "spatial": [
            racers.latent.rq_transformer.config.spatial_layers,
            racers.latent.rq_transformer.config.spatial_dim,
        ],
        "depth": [
            racers.latent.rq_transformer.config.depth_layers,
            racers.latent.rq_transformer.config.depth_dim,
        ],
        "ar_kv_bytes_per_token": racers.kv_bytes(racers.architecture),
        "ar_kv_bytes_over_compression_factor": racers.kv_bytes(racers.architecture)
        / codec.compression_factor,
        "kept_tokens": settings.new_tokens,
        "prompt_tokens": settings.prompt_tokens,
        "batch_size": settings.batch_size,
        "repeats": settings.repeats,
        "machine": {
            "bandwidth_gb_s": machine.bandwidth / 1e9,
            "matmul_gflops": machine.matmul / 1e9,
            "launch_us": 1e6 * machine.launch_s,
        },
    }


def about(racers: Racers) -> dict[str, Any]:
    """What holds for all tables of a run."""
    return {
        "is_trained": racers.is_trained,
        "note": "trained models" if racers.is_trained else RANDOM_NOTE,
        "dtype": str(racers.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "environment": describe_environment(),
    }


def warm_up(found: dict[str, Row], missing: dict[str, str], settings: BenchmarkConfig) -> None:
    """Run every row; a peer that fails, or does not finish compiling, moves to `missing` with the reason."""
    compile_limit_s = settings.compile_limit_s
    for key, row in list(found.items()):
        start = time.perf_counter()
        try:
            with time_limit(compile_limit_s if key in COMPILED else None):
                row.run(min(settings.new_tokens, WARM_UP_STEPS * row.chunk))
                if time.perf_counter() - start < WARM_UP_S:
                    row.run(min(settings.new_tokens, WARM_UP_TOKENS))
        except Exception as error:
            # Ours, and what all is compared with, must run.
            if key not in (*COMPILED, "static", "lookup", "assisted"):
                raise
            if key in COMPILED and time.perf_counter() - start > compile_limit_s:
                missing[key] = f"not compiled within {compile_limit_s:g} s (benchmark.compile_limit_s)"
            else:
                missing[key] = (
                    f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
                )
            del found[key]
        said = f"cannot be run: {missing[key]}" if key in missing else "warm"
        progress(f"{row.name}: {said}, {time.perf_counter() - start:.2f} s")


def table_row(
    row: Row,
    racers: Racers,
    settings: BenchmarkConfig,
    seconds: list[float],
    first_s: list[float],
    outputs: list[Output],
) -> dict[str, Any]:
    """The figures of a row by itself: speed, memory, parts of latent decoding, counted work."""
    median, kept = statistics.median(seconds), settings.batch_size * settings.new_tokens
    entry: dict[str, Any] = {
        "key": row.key,
        "name": row.name,
        "kind": row.kind,
        "is_streaming": row.is_streaming,
        "tokens_per_s": kept / median,
        "ms_per_token": 1e3 * median / settings.new_tokens,
        "spread_ms_per_token": 1e3 * (max(seconds) - min(seconds)) / settings.new_tokens,
        "first_text_ms": 1e3 * statistics.median(first_s),
        "weight_bytes": parameter_bytes(*row.models),
        "kv_bytes_per_token": row.kv_bytes,
        "decoder_kv_bytes_per_token": row.decoder_kv_bytes,
        "split_ms_per_token": None,
        "overhead_share": None,
        "note": _note(row, racers),
    }
    timings = [output.timing for output in outputs if output.timing is not None]
    if timings:
        parts = {part: statistics.median(getattr(t, f"{part}_s") for t in timings) for part in PARTS}
        entry["split_ms_per_token"] = {part: 1e3 * s / settings.new_tokens for part, s in parts.items()}
        inside = [sum(getattr(t, f"{part}_s") for part in PARTS) for t in timings]
        entry["overhead_share"] = statistics.median(
            (wall - model) / model for wall, model in zip(seconds, inside, strict=True)
        )
    if row.kind == "ar":
        entry |= ar_work_per_token(racers.architecture, settings)
    elif row.kind != "speculative":  # whose work depends on what is accepted
        models = racers.generator(row.kind)
        entry |= latent_work_per_token(models.vae, models.rq_transformer, settings, row.is_streaming)
    return entry


def _note(row: Row, racers: Racers) -> str:
    if row.key == "lean":
        return "same weights, a static cache and no library around it"
    if row.kind == "speculative" and not racers.is_trained:
        return "does not count: random weights repeat themselves"
    return ""


def _peak(run: Callable[[], Any], device: torch.device) -> int | None:
    """Growth of memory while it runs: the device's, or the process's where the system tells it."""
    if device.type != "cuda":
        if not Path("/proc/self/clear_refs").exists():
            run()
            return None
        return peak_extra_bytes(run)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def progress(text: str) -> None:
    """A line for whoever waits."""
    print(f"  {text}", file=sys.stderr, flush=True)


def report_speed(table: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """`speed` of report.json: a table with the figures that the report and the demo read at its top.

    Raises:
        ValueError: a row is missing that they need.
    """
    found = {entry["key"]: entry for entry in table["rows"]}
    latent = found.get("deferred") or found.get("streaming")
    if latent is None or "generate" not in found or "lean" not in found:
        raise ValueError(
            "--report needs the rows generate, lean, and deferred or streaming; name them in --rows"
        )
    generate, lean = found["generate"], found["lean"]
    return {
        "ar_tokens_per_s": generate["tokens_per_s"],
        "latent_tokens_per_s": latent["tokens_per_s"],
        "speedup": latent["speedup_over_generate"],
        "speedup_over_lean_loop": lean["ms_per_token"] / latent["ms_per_token"],
        "ar_ms": generate["ms_per_token"],
        **{f"{part}_ms": latent["split_ms_per_token"][part] for part in PARTS},
        "lean_loop_agreement": lean["agreement"],
        **table,
        **run,
    }
