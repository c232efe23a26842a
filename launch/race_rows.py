"""The ways of decoding that race in `launch/benchmark.py inference`, each as something that can be run.

All continue the same prompts by the same number of tokens, greedily and past any end of text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import CompileConfig, StaticCache

from launch.race_models import Racers
from rqvae import FlatTransformer, LatentGenerator, RQTransformer
from rqvae.cached_decoding import CachedGreedyDecoder
from rqvae.generation import Timing
from rqvae.generation_checks import compile_depth_loop

Kind = Literal["ar", "speculative", "latent", "identity"]
NAMES: dict[str, tuple[str, Kind]] = {
    "generate": ("base LM, transformers generate", "ar"),
    "static": ("base LM, generate with a static cache", "ar"),
    "compiled": ("base LM, generate, static cache, compiled", "ar"),
    "lean": ("base LM, lean loop", "ar"),
    "unsloth": ("base LM, Unsloth", "ar"),
    "lookup": ("base LM, prompt lookup", "speculative"),
    "assisted": ("base LM, speculative with a draft model", "speculative"),
    "identity": ("identity codec, tokens as codes", "identity"),
    "deferred": ("latent, deferred decoding", "latent"),
    "streaming": ("latent, streaming decoding", "latent"),
    "deferred_compiled": ("latent, deferred, depth loop compiled", "latent"),
    "streaming_compiled": ("latent, streaming, depth loop compiled", "latent"),
    "unsloth_decoder": ("latent, Unsloth under the decoder", "latent"),
}
"""Title and kind of every row, by the name that `--rows` takes."""
COMPILED = ("compiled", "deferred_compiled", "streaming_compiled")
LOOKUP_TOKENS = 10
"""Tokens proposed at once by prompt lookup."""
UNSLOTH_DECODER = (
    "not the same function: Unsloth's fast decoding takes token ids, the decoder feeds vectors; its patched "
    "attention is plain causal and does not take the mask that keeps documents apart"
)


class Output(NamedTuple):
    """What one run of a row wrote."""

    token_ids: list[list[int]]
    timing: Timing | None
    """Of latent decoding."""


@dataclass(frozen=True)
class Row:
    """One way of decoding.

    Attributes:
        run: continues the prompts by so many tokens.
        chunk: tokens that a step writes.
        is_streaming: text appears on the way; otherwise all at the end.
        models: whose weights it needs.
        kv_bytes: bytes of keys and values per token of text and sequence: those kept between steps.
        decoder_kv_bytes: the same of the latent decoder: kept by streaming, filled at the end by deferred decoding.
    """

    key: str
    run: Callable[[int], Output]
    chunk: int
    is_streaming: bool
    models: tuple[nn.Module, ...]
    kv_bytes: float
    decoder_kv_bytes: float = 0.0

    @property
    def name(self) -> str:
        """Title in tables."""
        return NAMES[self.key][0]

    @property
    def kind(self) -> Kind:
        """What it is measured against."""
        return NAMES[self.key][1]


def rows(
    racers: Racers, prompts: list[list[int]], new_tokens: int, wanted: set[str]
) -> tuple[dict[str, Row], dict[str, str]]:
    """The rows that can be run, and the reasons why others cannot; Unsloth's is run elsewhere.

    Args:
        prompts: of equal length.
        wanted: keys of `NAMES`.
    """
    found: dict[str, Row] = {}
    missing = {key: reason for key, reason in racers.missing.items() if key in wanted}
    if "unsloth_decoder" in wanted:
        missing["unsloth_decoder"] = UNSLOTH_DECODER
    makers = {**_autoregressive(racers, prompts, new_tokens), **_latent(racers, prompts)}
    reads_tokens = racers.latent.rq_transformer.config.reads_tokens
    if reads_tokens:
        reason = "the latent model reads the tokens of every latent before it draws the next"
        missing |= dict.fromkeys(wanted & {"deferred", "deferred_compiled"}, reason)
    if len(prompts) > 1:
        for key in wanted & {"lookup", "assisted"}:
            missing.setdefault(key, f"transformers speculates for one sequence at a time, not {len(prompts)}")
    for key in NAMES:
        if key in wanted and key not in missing and key in makers:
            found[key] = makers[key]()
    return found, missing


def _autoregressive(
    racers: Racers, prompts: list[list[int]], new_tokens: int
) -> dict[str, Callable[[], Row]]:
    lm, device = racers.lm, racers.device
    ids = torch.tensor(prompts, device=device)
    longest = ids.shape[1] + new_tokens

    def output(tokens: Tensor) -> Output:
        return Output(tokens.tolist(), None)

    def generate(count: int, **options: Any) -> Output:
        tokens = lm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            use_cache=True,
            **options,
        )
        return output(tokens[:, ids.shape[1] :])

    def row(key: str, run: Callable[[int], Output], *models: nn.Module) -> Row:
        return Row(key, run, 1, True, (lm, *models), racers.kv_bytes(racers.architecture))

    def static(key: str) -> Row:
        cache = StaticCache(config=lm.config, max_cache_len=longest)
        compile_config = CompileConfig(fullgraph=False, mode="default")
        # Its name in transformers: compile on a CPU too.
        compile_config._compile_all_devices = True  # type: ignore[assignment]
        options = {"compile_config": compile_config} if key == "compiled" else {"disable_compile": True}

        def run(count: int) -> Output:
            cache.reset()
            return generate(count, past_key_values=cache, **options)

        return row(key, run)

    def lean() -> Row:
        loop = CachedGreedyDecoder(lm, longest)
        return row("lean", lambda count: output(loop.generate(ids, count)))

    def lookup() -> Row:
        return row("lookup", lambda count: generate(count, prompt_lookup_num_tokens=LOOKUP_TOKENS))

    def assisted() -> Row:
        draft = racers.assistant
        assert draft is not None  # else it is among the missing
        return row("assisted", lambda count: generate(count, assistant_model=draft), draft)

    return {
        "generate": lambda: row("generate", generate),
        "static": lambda: static("static"),
        "compiled": lambda: static("compiled"),
        "lean": lean,
        "lookup": lookup,
        "assisted": assisted,
    }


def _latent(racers: Racers, prompts: list[list[int]]) -> dict[str, Callable[[], Row]]:
    def row(key: str, generator: LatentGenerator, mode: str) -> Row:
        def run(count: int) -> Output:
            with compiled_depth_loop(generator) if key in COMPILED else nullcontext():
                done = generator.generate_tokens(prompts, count, stop_at_end_of_text=False, mode=mode)
            return Output(done.token_ids, done.timing)

        vae, model = generator.vae, generator.rq_transformer
        has_decoder = vae.config.model != "identity" and vae.config.backbone.decoder != "none"
        return Row(
            key,
            run,
            generator.compression_factor,
            mode == "streaming",
            (vae, model),
            latent_kv_bytes(generator, racers.dtype),
            racers.kv_bytes(vae.config.backbone.architecture) if has_decoder else 0.0,
        )

    makers = {
        "deferred": lambda: row("deferred", racers.latent, "deferred"),
        "streaming": lambda: row("streaming", racers.latent, "streaming"),
        "deferred_compiled": lambda: row("deferred_compiled", racers.latent, "deferred"),
        "streaming_compiled": lambda: row("streaming_compiled", racers.latent, "streaming"),
    }
    if racers.identity is not None:
        on_tokens = racers.identity
        makers["identity"] = lambda: row("identity", on_tokens, "streaming")
    return makers


@contextmanager
def compiled_depth_loop(generator: LatentGenerator) -> Iterator[None]:
    """As with `compile=True`, for one run: rows share the weights. What was compiled stays for the next run."""
    model = generator.rq_transformer
    compile_depth_loop(model)
    assert isinstance(model, RQTransformer)
    try:
        yield
    finally:
        model.depth.is_compiled = False


def latent_kv_bytes(generator: LatentGenerator, dtype: torch.dtype) -> float:
    """Bytes of keys and values that the spatial transformer keeps per token of text: one position in K tokens (a flat
    transformer: D)."""
    shape = generator.rq_transformer.config
    width = shape.spatial_dim
    if shape.spatial_backbone is not None:
        architecture = shape.spatial_backbone.architecture
        width = architecture.num_key_value_heads * architecture.head_dim
    positions = shape.codebook_levels if isinstance(generator.rq_transformer, FlatTransformer) else 1
    return 2.0 * shape.spatial_layers * width * positions * dtype.itemsize / generator.compression_factor


def agreement(tokens: list[list[int]], expected: list[list[int]] | None) -> float | None:
    """Share of equal tokens, place by place; a place that one of them lacks is unequal."""
    if expected is None:
        return None
    pairs = [pair for a, b in zip(tokens, expected, strict=True) for pair in zip_longest(a, b)]
    return sum(a == b for a, b in pairs) / len(pairs)
