"""Latent decoding against autoregressive decoding, side by side in one run.

Every row generates the same number of kept tokens from the same prompts, greedily and past any end of text.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from data_pipeline import TokenDataset, load_tokenizer
from launch import flops
from launch.config import BenchmarkConfig
from launch.environment import describe_environment
from launch.measurement import take_turns
from rqvae import FlatTransformer, LatentGenerator, LatentModel, load_codec, load_latent_model
from rqvae.cached_decoding import CachedGreedyDecoder
from rqvae.codec import Codec
from rqvae.config import ArchitectureConfig
from rqvae.generation import Timing


def benchmark_inference(model: Path, data: Path, settings: BenchmarkConfig) -> dict[str, Any]:
    """Latent decoding against the base LM: `transformers.generate`, and a loop as lean as ours."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = load_codec(model / "rqvae").to(device)
    latent_model = load_latent_model(model / "rq_transformer").to(device)
    latent = LatentGenerator(vae, latent_model, load_tokenizer(data))
    if not (model / "base_lm").is_dir():
        raise ValueError(
            f"'{model}/base_lm' is missing, and without an autoregressive model there is no race; convert the "
            "base_lm stage of this project or copy that of another one on the same data"
        )
    lm: Any = AutoModelForCausalLM.from_pretrained(model / "base_lm", dtype=torch.float32)
    lm.to(device).eval()
    prompts = prompts_from(data, settings.batch_size, settings.prompt_tokens)
    prompt_ids = torch.tensor(prompts, device=device)
    lean = CachedGreedyDecoder(lm, settings.prompt_tokens + settings.new_tokens)
    parts: list[Timing] = []

    def generate() -> torch.Tensor:
        return lm.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            min_new_tokens=settings.new_tokens,
            max_new_tokens=settings.new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=latent.tokenizer.pad_token_id,
        )[:, settings.prompt_tokens :]

    def decode_latents() -> None:
        parts.append(latent.generate_tokens(prompts, settings.new_tokens, stop_at_end_of_text=False).timing)

    agreement = float((generate() == lean.generate(prompt_ids, settings.new_tokens)).float().mean())
    # What is fast must be what is good: a model that reads its own text is timed decoding it on the way.
    mode = "streaming" if latent_model.config.reads_tokens else "deferred"
    latent_row = f"latent, {mode} decoding"
    rows: dict[str, Callable[[], Any]] = {
        "base LM, transformers generate": generate,
        "base LM, lean loop": lambda: lean.generate(prompt_ids, settings.new_tokens),
        latent_row: decode_latents,
    }
    seconds = take_turns(rows, settings.repeats, device)
    timings = parts[-settings.repeats :]
    kept = settings.batch_size * settings.new_tokens
    median = {name: statistics.median(values) for name, values in seconds.items()}
    reference = median["base LM, transformers generate"]
    work = work_per_token(vae, latent_model, settings)
    table = [
        {
            "name": name,
            "tokens_per_s": kept / median[name],
            "ms_per_token": 1e3 * median[name] / settings.new_tokens,
            "spread_ms_per_token": 1e3 * (max(values) - min(values)) / settings.new_tokens,
            "speedup_over_generate": reference / median[name],
            **work["latent" if name.startswith("latent") else "ar"],
            "note": "same weights, a static cache and no library around it" if "lean" in name else "",
        }
        for name, values in seconds.items()
    ]
    split = {
        f"{part}_ms": 1e3 * statistics.median(getattr(t, f"{part}_s") for t in timings) / settings.new_tokens
        for part in ("encode", "spatial", "depth", "decode")
    }
    return {
        "ar_tokens_per_s": kept / reference,
        "latent_tokens_per_s": kept / median[latent_row],
        "speedup": reference / median[latent_row],
        "speedup_over_lean_loop": median["base LM, lean loop"] / median[latent_row],
        "ar_ms": 1e3 * reference / settings.new_tokens,
        **split,
        "rows": table,
        "lean_loop_agreement": agreement,
        "kept_tokens": settings.new_tokens,
        "prompt_tokens": settings.prompt_tokens,
        "batch_size": settings.batch_size,
        "repeats": settings.repeats,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "environment": describe_environment(),
    }


def prompts_from(data: Path, count: int, length: int) -> list[list[int]]:
    """The first `length` tokens of the first long enough documents of the test split.

    Raises:
        ValueError: there are not enough.
    """
    dataset = TokenDataset(data, "test")
    prompts: list[list[int]] = []
    for index in range(len(dataset)):
        batch = dataset.read([index])
        ids, documents = batch["input_ids"][0], batch["document_ids"][0]
        for document in range(1, int(documents.max()) + 1):
            tokens = ids[documents == document]
            if len(tokens) > length and len(prompts) < count:
                prompts.append(tokens[:length].tolist())
        if len(prompts) == count:
            return prompts
    raise ValueError(
        f"'{data}' has {len(prompts)} test documents of more than {length} tokens, {count} needed"
    )


def work_per_token(
    vae: Codec, latent_model: LatentModel, settings: BenchmarkConfig
) -> dict[str, dict[str, float]]:
    """Layer calls in sequence and forward FLOPs per kept token, prompt left out."""
    factor = vae.config.compression_factor
    architecture: ArchitectureConfig = vae.config.backbone.architecture
    context = settings.prompt_tokens + settings.new_tokens / 2
    shape = latent_model.config
    layers = shape.spatial_layers + shape.codebook_levels * shape.depth_layers
    if isinstance(latent_model, FlatTransformer):
        layers = shape.codebook_levels * shape.spatial_layers
    # The decoder runs once over all new tokens, or once per latent.
    decoder_tokens = factor if shape.reads_tokens else settings.new_tokens
    decoder_layers = 0 if vae.config.model == "identity" else vae.config.num_latent_layers
    if vae.config.model != "identity" and vae.config.backbone.decoder != "none":
        decoder_layers += architecture.num_hidden_layers
    return {
        "ar": {
            "layer_calls_per_token": float(architecture.num_hidden_layers),
            "flops_per_token": flops.backbone(architecture, context) + flops.head(architecture),
        },
        "latent": {
            "layer_calls_per_token": layers / factor + decoder_layers / decoder_tokens,
            "flops_per_token": flops.latent_model(type(latent_model).__name__, shape, 2 * context / factor)
            / factor
            + flops.codec(vae.config, round(2 * context)).decode,
        },
    }


def print_table(speed: dict[str, Any]) -> None:
    """The result for a person."""
    print(f"{'':34}{'tokens/s':>10}{'ms/token':>10}{'speed-up':>10}{'layer calls':>13}{'MFLOP':>8}")
    for row in speed["rows"]:
        print(
            f"{row['name']:34}{row['tokens_per_s']:10.1f}{row['ms_per_token']:10.2f}"
            f"{row['speedup_over_generate']:9.2f}x{row['layer_calls_per_token']:13.2f}"
            f"{row['flops_per_token'] / 1e6:8.1f}"
        )
    parts = ", ".join(
        f"{part} {speed[part + '_ms']:.2f}" for part in ("encode", "spatial", "depth", "decode")
    )
    print(f"latent, ms per token: {parts}; batch {speed['batch_size']}, {speed['kept_tokens']} tokens kept")
