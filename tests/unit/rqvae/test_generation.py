"""Generation against a plain reference that knows no cache, no batch and no blocks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rqvae import RQVAE, FlatTransformer, LatentGenerator, LatentModel, RQTransformer

Make = Callable[..., Any]
FACTOR, LEVELS = 4, 3
LENGTHS = [0, 1, FACTOR - 1, FACTOR, FACTOR + 1, 8 * FACTOR + 1]


TOKENS = {"spatial_input": "tokens", "vocab_size": 97}
VARIANTS: dict[str, tuple[torch.dtype, type[LatentModel], dict[str, Any]]] = {
    "fp64": (torch.float64, RQTransformer, {}),
    "fp32": (torch.float32, RQTransformer, {}),
    "flat": (torch.float64, FlatTransformer, {}),
    "tokens": (torch.float64, RQTransformer, {**TOKENS, "seed": 2}),
    "both, on a backbone": (
        torch.float64,
        RQTransformer,
        {**TOKENS, "spatial_input": "both", "spatial_backbone": True, "seed": 2},
    ),
}


@pytest.fixture(scope="module", params=VARIANTS)
def generator(
    request: pytest.FixtureRequest,
    make_codec: Make,
    make_latent_model: Make,
    make_architecture: Make,
    tokenizer: PreTrainedTokenizerFast,
) -> LatentGenerator:
    dtype, model_class, changes = VARIANTS[request.param]
    if "spatial_backbone" in changes:
        changes = changes | {"spatial_backbone": {"architecture": make_architecture()}}
    return LatentGenerator(make_codec(dtype), make_latent_model(model_class, dtype, **changes), tokenizer)


@pytest.fixture(scope="module")
def prompts(tokens: Make) -> list[list[int]]:
    return [tokens(length, seed=length).tolist() for length in LENGTHS]


@torch.no_grad()
def reference(
    codec: RQVAE, latent_model: LatentModel, prompt: list[int], num_latents: int
) -> tuple[Tensor, Tensor]:
    """Greedy codes [S, D] and all their tokens [S * K], everything computed anew for every code."""
    padding = -len(prompt) % FACTOR
    ids = F.pad(torch.tensor([prompt], dtype=torch.long), (padding, 0))
    mask = F.pad(torch.ones(1, len(prompt), dtype=torch.long), (padding, 0))
    codes = codec.encode(ids, mask) if prompt else torch.zeros(1, 0, LEVELS, dtype=torch.long)
    num_prompt = codes.shape[1]
    for _ in range(num_latents):
        codes = torch.cat([codes, torch.zeros(1, 1, LEVELS, dtype=torch.long)], dim=1)
        is_token = torch.cat([mask, torch.ones(1, codes.shape[1] * FACTOR - mask.shape[1])], dim=1).long()
        text = None
        if latent_model.config.reads_tokens:
            text = torch.cat([ids, codec.decode(codes).argmax(-1)[:, ids.shape[1] :]], dim=1)
        for level in range(LEVELS):
            out = latent_model(codes, text, token_document_ids=is_token, return_logits=True)
            codes[0, -1, level] = out.logits[level][0, -1].argmax()
    return codes[0, num_prompt:], codec.decode(codes).argmax(-1)[0, num_prompt * FACTOR :]


def block_of(generator: LatentGenerator, latents: int) -> dict[str, Any]:
    """Decoding so many latents at a time, where the model can."""
    return {} if generator.rq_transformer.config.reads_tokens else {"decode_block": latents}


def end_at(monkeypatch: pytest.MonkeyPatch, generator: LatentGenerator, token_id: int | None) -> None:
    """Make a token the end of text, until the test is over."""
    tokenizer = copy.deepcopy(generator.tokenizer)
    tokenizer.eos_token = None if token_id is None else tokenizer.convert_ids_to_tokens(token_id)
    assert tokenizer.eos_token_id == token_id
    monkeypatch.setattr(generator, "tokenizer", tokenizer)


@pytest.mark.parametrize("index", range(len(LENGTHS)), ids=[f"length {n}" for n in LENGTHS])
def test_greedy_generation_equals_the_reference(
    generator: LatentGenerator, prompts: list[list[int]], index: int
) -> None:
    out = generator.generate_tokens([prompts[index]], 6 * FACTOR, stop_at_end_of_text=False)
    codes, ids = reference(generator.vae, generator.rq_transformer, prompts[index], 6)
    assert torch.equal(out.codes[0], codes)
    assert out.token_ids == [ids.tolist()]
    # All tokens are codes of what was generated; a stuck model would prove little.
    assert codes.unique(dim=0).shape[0] >= 3


def test_greedy_codes_are_the_most_likely_under_teacher_forcing(
    generator: LatentGenerator, prompts: list[list[int]]
) -> None:
    prompt = prompts[3] * 2
    out = generator.generate_tokens([prompt], 10 * FACTOR, stop_at_end_of_text=False)
    prompt_codes = generator.vae.encode(torch.tensor([prompt]))
    all_codes = torch.cat([prompt_codes, out.codes], dim=1)
    text = torch.tensor([prompt + out.token_ids[0]])
    scored = generator.rq_transformer(
        all_codes, text if generator.rq_transformer.config.reads_tokens else None
    )
    assert scored.correct[:, prompt_codes.shape[1] :].all()


def test_a_ragged_batch_equals_its_prompts_alone(
    generator: LatentGenerator, prompts: list[list[int]]
) -> None:
    together = generator.generate_tokens(prompts, 30, stop_at_end_of_text=False)
    for row, prompt in enumerate(prompts):
        alone = generator.generate_tokens([prompt], 30, stop_at_end_of_text=False)
        assert torch.equal(alone.codes[0], together.codes[row]), LENGTHS[row]
        assert alone.token_ids[0] == together.token_ids[row], LENGTHS[row]


@pytest.mark.parametrize("max_new_tokens", [1, 3, 4, 5, 9])
def test_any_number_of_new_tokens(
    generator: LatentGenerator, prompts: list[list[int]], max_new_tokens: int
) -> None:
    full = generator.generate_tokens(prompts, 12, stop_at_end_of_text=False)
    out = generator.generate_tokens(prompts, max_new_tokens, stop_at_end_of_text=False)
    assert out.codes.shape == (len(prompts), math.ceil(max_new_tokens / FACTOR), LEVELS)
    assert out.token_ids == [ids[:max_new_tokens] for ids in full.token_ids]


@pytest.mark.parametrize("block", [1, 2, 3])
def test_decoding_in_blocks_changes_nothing(
    generator: LatentGenerator, prompts: list[list[int]], block: int
) -> None:
    in_one = generator.generate_tokens(prompts, 28, stop_at_end_of_text=False)
    in_blocks = generator.generate_tokens(
        prompts, 28, stop_at_end_of_text=False, **block_of(generator, block)
    )
    assert in_blocks.token_ids == in_one.token_ids
    assert torch.equal(in_blocks.codes, in_one.codes)


def test_texts_stop_before_end_of_text(
    generator: LatentGenerator, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = generator.generate_tokens(prompts, 30, stop_at_end_of_text=False).token_ids
    end = full[0][9]
    end_at(monkeypatch, generator, end)
    out = generator.generate_tokens(prompts, 30).token_ids
    for ids, all_ids in zip(out, full, strict=True):
        assert ids == (all_ids[: all_ids.index(end)] if end in all_ids else all_ids)
    assert len(out[0]) <= 9


def test_generation_stops_when_every_text_has_ended(
    generator: LatentGenerator, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompts[-1]
    full = generator.generate_tokens([prompt], 64, stop_at_end_of_text=False)
    end = full.token_ids[0][10]
    end_at(monkeypatch, generator, end)
    first = full.token_ids[0].index(end)
    out = generator.generate_tokens([prompt], 64, **block_of(generator, 2))
    block = 1 if generator.rq_transformer.config.reads_tokens else 2
    blocks = first // FACTOR // block + 1
    assert out.codes.shape[1] == block * blocks < 16
    assert out.token_ids[0] == full.token_ids[0][:first]
    # An end of text in the prompt ends nothing.
    again = generator.generate_tokens([[*prompt, end, prompt[0], prompt[1], prompt[2]]], 4)
    assert again.codes.shape[1] == 1


def test_a_text_that_ended_waits_for_the_others(
    generator: LatentGenerator, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One text ends in the first of its blocks, the other in a later one and without the first's end again."""
    full = generator.generate_tokens(prompts, 12 * FACTOR, stop_at_end_of_text=False).token_ids
    early, late, end = next(
        (i, j, token)
        for i, first in enumerate(full)
        for token in first[:FACTOR]
        for j, second in enumerate(full)
        if token in second[2 * FACTOR :]
        and token not in second[: 2 * FACTOR]
        and token not in first[(second.index(token) // FACTOR) * FACTOR :]
    )
    end_at(monkeypatch, generator, end)
    out = generator.generate_tokens([prompts[early], prompts[late]], 12 * FACTOR, mode="streaming")
    assert out.token_ids == [full[i][: full[i].index(end)] for i in (early, late)]
    assert out.codes.shape[1] == full[late].index(end) // FACTOR + 1


def test_models_generate_in_evaluation_mode(
    make_codec: Make, make_latent_model: Make, tokenizer: PreTrainedTokenizerFast
) -> None:
    codec, latent_model = make_codec().train(), make_latent_model().train()
    LatentGenerator(codec, latent_model, tokenizer)
    assert not any(module.training for model in (codec, latent_model) for module in model.modules())


@pytest.mark.parametrize("factor", [1, 2, 8])
@pytest.mark.parametrize("sizes", [(16,), (8, 4)], ids=str)
def test_other_shapes_of_codec(
    make_codec: Make,
    make_latent_model: Make,
    tokenizer: PreTrainedTokenizerFast,
    tokens: Make,
    factor: int,
    sizes: tuple[int, ...],
) -> None:
    shape = {"compression_factor": factor, "codebook_levels": len(sizes), "codebook_size": sizes}
    codec, latent_model = make_codec(**shape), make_latent_model(**shape)
    prompt = tokens(2 * factor, seed=3)
    out = LatentGenerator(codec, latent_model, tokenizer).generate_tokens(
        [prompt.tolist()], 4 * factor, stop_at_end_of_text=False
    )
    codes = torch.cat([codec.encode(prompt[None]), out.codes], dim=1)
    assert latent_model(codes).correct[:, 2:].all()
    assert out.token_ids == codec.decode(codes)[:, 2 * factor :].argmax(-1).tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": {"decoder": "none"}},
        {"backbone": {"shared": True}},
        {"quantizer": {"method": "fsq", "fsq_levels": (4, 4)}, "codebook_dim": 2},
        {"encoder_context": "chunk"},
    ],
    ids=str,
)
@pytest.mark.parametrize("block", [1, 3])
def test_other_kinds_of_codec(
    make_codec: Make, make_latent_model: Make, tokenizer: PreTrainedTokenizerFast, tokens: Make,
    changes: dict[str, Any], block: int,
) -> None:  # fmt: skip
    """Streamed in blocks or at the end, the text is that of one pass of the decoder over all codes."""
    codec = make_codec(**changes)
    latent_model = make_latent_model(
        codebook_levels=codec.config.codebook_levels, codebook_size=codec.config.codebook_size
    )
    prompt = tokens(11, seed=4)
    generator = LatentGenerator(codec, latent_model, tokenizer)
    out = generator.generate_tokens(
        [prompt.tolist()], 20, stop_at_end_of_text=False, **block_of(generator, block)
    )
    padded, mask = F.pad(prompt, (1, 0))[None], torch.tensor([[0, *[1] * 11]])
    codes = torch.cat([codec.encode(padded, mask), out.codes], dim=1)
    documents = torch.ones(codes.shape[:2], dtype=torch.long)
    assert out.token_ids == codec.decode(codes, documents)[:, 12:32].argmax(-1).tolist()


def test_a_tokenizer_without_end_of_text(
    generator: LatentGenerator, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generator.generate_tokens(prompts, 9, stop_at_end_of_text=False).token_ids
    end_at(monkeypatch, generator, None)
    assert generator.generate_tokens(prompts, 9).token_ids == expected


def test_the_seed_decides_the_sample(generator: LatentGenerator, prompts: list[list[int]]) -> None:
    def draw(seed: int, temperature: float = 1.0) -> Tensor:
        torch.manual_seed(torch.seed() % 2**32)  # the global state must not matter
        return generator.generate_tokens(prompts, 20, temperature, seed, stop_at_end_of_text=False).codes

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert torch.equal(draw(0, 0.0), draw(1, 0.0))
    assert torch.equal(draw(0, 1e-4), draw(1, 0.0))  # a low temperature is nearly greedy


def test_texts_in_and_out(generator: LatentGenerator, prompts: list[list[int]]) -> None:
    texts = [generator.tokenizer.decode(ids) for ids in prompts]
    out = generator.generate(texts, max_new_tokens=7)
    expected = generator.generate_tokens(prompts, 7).token_ids
    assert out == [generator.tokenizer.decode(ids) for ids in expected]
    assert any(out)


def test_bf16_models_generate(
    make_codec: Make,
    make_latent_model: Make,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
) -> None:
    models = make_codec(torch.float32).bfloat16(), make_latent_model(dtype=torch.bfloat16)
    generator = LatentGenerator(*models, tokenizer)
    out = generator.generate_tokens(prompts, 9, stop_at_end_of_text=False)
    assert [len(ids) for ids in out.token_ids] == [9] * len(prompts)
    again = generator.generate_tokens(prompts, 9, stop_at_end_of_text=False)
    assert torch.equal(again.codes, out.codes)


def test_timing_covers_the_parts(generator: LatentGenerator, prompts: list[list[int]]) -> None:
    timing = generator.generate_tokens(prompts, 8).timing
    assert all(seconds > 0 for seconds in timing)


def test_bad_calls_are_errors(generator: LatentGenerator) -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        generator.generate_tokens([], 4)
    with pytest.raises(ValueError, match="max_new_tokens: 0 is not at least 1"):
        generator.generate_tokens([[3]], 0)


def test_the_codes_of_another_codec_are_refused(
    make_codec: Make, make_latent_model: Make, tokenizer: PreTrainedTokenizerFast
) -> None:
    codec = make_codec(torch.float32)
    own = make_latent_model(dtype=torch.float32, codec_hash=codec.codec_hash())
    LatentGenerator(codec, own, tokenizer)
    other = make_codec(torch.float32, seed=5)
    with pytest.raises(ValueError, match="trained on codes of codec") as caught:
        LatentGenerator(other, own, tokenizer)
    assert codec.codec_hash()[:12] in str(caught.value)
    assert other.codec_hash()[:12] in str(caught.value)
