"""Every way of generating gives the same text: streamed, deferred, in any batch, by every kind of model, in fp32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rqvae import RQVAE, FlatTransformer, LatentGenerator, RQTransformer, create_codec, latent_bound
from rqvae.generation import Piece
from rqvae.generation_options import GenerationOptions
from rqvae.sampling import draw, keyed_numbers
from tests.unit.rqvae.conftest import VOCAB_SIZE, randomize

Make = Callable[..., Any]
FACTOR, LEVELS = 4, 3
LENGTHS = [0, 1, FACTOR - 1, FACTOR, 8 * FACTOR]
KINDS = ["rq", "flat", "tokens", "identity", "anchor"]


@pytest.fixture(scope="module")
def make_generator(
    make_codec: Make, make_codec_config: Make, make_latent_model: Make, tokenizer: PreTrainedTokenizerFast
) -> Make:
    def make(kind: str) -> LatentGenerator:
        if kind in ("identity", "anchor"):
            levels = {"identity": FACTOR, "anchor": 2}[kind]
            changes = {"codebook_levels": levels, "codebook_size": None, "codebook_dim": 32}
            codec = create_codec(make_codec_config(model=kind, **changes))
            randomize(codec, seed=0)
            shape = {"codebook_levels": levels, "codebook_size": VOCAB_SIZE + 1}
            return LatentGenerator(codec, make_latent_model(dtype=torch.float32, **shape), tokenizer)
        changes = {"spatial_input": "tokens", "vocab_size": VOCAB_SIZE} if kind == "tokens" else {}
        model_class = FlatTransformer if kind == "flat" else RQTransformer
        model = make_latent_model(model_class, torch.float32, seed=2, **changes)
        return LatentGenerator(make_codec(torch.float32), model, tokenizer)

    return make


@pytest.fixture(scope="module", params=KINDS)
def generator(request: pytest.FixtureRequest, make_generator: Make) -> LatentGenerator:
    return make_generator(request.param)


@pytest.fixture(scope="module")
def rq(make_generator: Make) -> LatentGenerator:
    return make_generator("rq")


@pytest.fixture(scope="module")
def prompts(tokens: Make) -> list[list[int]]:
    return [tokens(length, seed=length).tolist() for length in LENGTHS]


def end_at(monkeypatch: pytest.MonkeyPatch, generator: LatentGenerator, token_id: int) -> None:
    tokenizer = copy.deepcopy(generator.tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token_id)
    monkeypatch.setattr(generator, "tokenizer", tokenizer)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.8, "seed": 2, "top_k": 20, "top_p": 0.9},
    ],
    ids=str,
)
def test_every_way_of_working_gives_the_same(
    generator: LatentGenerator, prompts: list[list[int]], settings: dict[str, Any]
) -> None:
    settings = settings | {"max_new_tokens": 22, "stop_at_end_of_text": False}
    expected = generator.generate_tokens(prompts, **settings)
    others: list[dict[str, Any]] = [{"mode": "streaming"}, {"mode": "streaming", "decode_rows": 2}]
    if not generator.rq_transformer.config.reads_tokens:
        others += [{"mode": "deferred", "decode_block": 4}, {"decode_block": 3, "decode_rows": 3}]
    for other in others:
        out = generator.generate_tokens(prompts, **settings, **other)
        assert out.token_ids == expected.token_ids, other
        assert torch.equal(out.codes, expected.codes), other
    for batch in ([0], [4], [3, 1], [2, 4, 0]):
        part = generator.generate_tokens([prompts[i] for i in batch], row_keys=batch, **settings)
        assert part.token_ids == [expected.token_ids[i] for i in batch], batch
    if settings["temperature"]:
        other_seed = generator.generate_tokens(prompts, **settings | {"seed": 9})
        assert other_seed.token_ids != expected.token_ids


@torch.no_grad()
def sampled_without_caches(
    codec: RQVAE, model: RQTransformer, prompt: Tensor, key: int, num_latents: int, options: GenerationOptions
) -> tuple[Tensor, Tensor]:
    """Codes [S, D] and tokens [S * K] of a prompt of whole chunks, everything computed anew for every code."""
    numbers = keyed_numbers(options.seed, torch.tensor([key]), num_latents, LEVELS + FACTOR)[0]
    levels = options.by_level(LEVELS)
    codes = codec.encode(prompt[None])
    num_prompt = codes.shape[1]
    for position in range(num_latents):
        codes = torch.cat([codes, torch.zeros(1, 1, LEVELS, dtype=torch.long)], dim=1)
        for level in range(LEVELS):
            logits = model(codes, return_logits=True).logits[level][:, -1]
            codes[0, -1, level] = draw(logits, numbers[position, level, None], levels[level])
    logits = codec.decode(codes)[0, num_prompt * FACTOR :]
    tokens = draw(logits, numbers[:, LEVELS:].flatten(), options.of_tokens(LEVELS))
    return codes[0, num_prompt:], tokens


@pytest.mark.parametrize("seed", [0, 5])
def test_sampling_equals_a_reference_without_caches(rq: LatentGenerator, tokens: Make, seed: int) -> None:
    settings: dict[str, Any] = {"temperature": [1.0, 0.7, 0.0], "top_p": 0.95, "token_temperature": 1.3}
    prompt = tokens(8, seed=3)
    out = rq.generate_tokens(
        [[5], prompt.tolist()], 5 * FACTOR, seed=seed, stop_at_end_of_text=False, **settings
    )
    options = GenerationOptions(seed=seed, **settings)
    codes, ids = sampled_without_caches(rq.vae, rq.rq_transformer, prompt, 1, 5, options)
    assert torch.equal(out.codes[1], codes)
    assert out.token_ids[1] == ids.tolist()


def test_a_text_is_streamed_as_it_is_generated(generator: LatentGenerator, prompts: list[list[int]]) -> None:
    texts = [generator.tokenizer.decode(ids) for ids in prompts]
    for settings in ({}, {"temperature": 1.0, "seed": 3}):
        expected = generator.generate(texts, 22, **settings)
        shown = list(generator.stream(texts, 22, **settings))
        assert all(isinstance(piece, Piece) and piece.text for piece in shown)
        assert ["".join(p.text for p in shown if p.row == row) for row in range(len(texts))] == expected
        assert [p.row for p in shown[:5]] == [0, 1, 2, 3, 4]  # chunk by chunk, and not row by row


def test_streams_of_bytes_hold_whole_characters(
    make_codec: Make, make_latent_model: Make, make_architecture: Make
) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    codec = make_codec(torch.float32, architecture=make_architecture(vocab_size=256))
    generator = LatentGenerator(
        codec, make_latent_model(dtype=torch.float32), PreTrainedTokenizerFast(tokenizer_object=inner)
    )
    prompts = ["", "é", "日本語 🎉", "plain text"]
    expected = generator.generate(prompts, 37, 1.0, seed=4)
    shown = list(generator.stream(prompts, 37, 1.0, seed=4))
    assert ["".join(p.text for p in shown if p.row == row) for row in range(4)] == expected
    assert sum(not text.isascii() for text in expected) == 4


def test_stop_strings_end_texts_wherever_they_lie(
    generator: LatentGenerator, prompts: list[list[int]]
) -> None:
    texts = [generator.tokenizer.decode(ids) for ids in prompts]
    full = generator.generate(texts, 32)
    for row, first in ((4, 3), (3, 5), (0, 8)):  # over the end of a chunk, within one
        words = full[row].split()
        stop = " ".join(words[first : first + 2])
        expected = [text.split(stop)[0] for text in full]
        assert expected[row] != full[row]
        assert generator.generate(texts, 32, stop=["nowhere", stop]) == expected
        shown = list(generator.stream(texts, 32, stop=[stop]))
        assert ["".join(p.text for p in shown if p.row == i) for i in range(5)] == expected
        ids = generator.generate_tokens(prompts, 32, stop=[stop]).token_ids[row]
        assert generator.tokenizer.decode(ids) == expected[row] + stop  # with the token that completes it
        late = generator.generate(texts, 32, stop=[stop], min_new_tokens=first + 2)[row]
        assert late.startswith(expected[row] + stop)


@pytest.mark.parametrize("mode", ["auto", "streaming"])
def test_rows_that_end_leave_the_batch(
    generator: LatentGenerator, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    full = generator.generate_tokens(prompts, 40, stop_at_end_of_text=False)
    end = full.token_ids[4][6]
    end_at(monkeypatch, generator, end)
    sizes: list[int] = []
    decode_block = generator.vae.decode_block

    def recorded(codes: Tensor, *arguments: Any) -> Tensor:
        sizes.append(len(codes))
        return decode_block(codes, *arguments)

    monkeypatch.setattr(generator.vae, "decode_block", recorded)
    blocks = (
        {} if generator.rq_transformer.config.reads_tokens or mode == "streaming" else {"decode_block": 2}
    )
    out = generator.generate_tokens(prompts, 40, mode=mode, **blocks)
    lengths = [ids.index(end) if end in ids else 40 for ids in full.token_ids]
    assert out.token_ids == [ids[:length] for ids, length in zip(full.token_ids, lengths, strict=True)]
    step = blocks.get("decode_block", 1)
    # Decodes that every row takes part in: up to the one with its end.
    taken = [min(length // (FACTOR * step) + 1, -(-10 // step)) for length in lengths]
    assert sizes == [sum(count > i for count in taken) for i in range(max(taken))]
    assert sizes[-1] < 5
    for row, count in enumerate(taken):
        inside = min(count * step, out.codes.shape[1])
        assert torch.equal(out.codes[row, :inside], full.codes[row, :inside])
        assert (out.codes[row, inside:] == -1).all()


def test_no_end_of_text_within_the_minimum(
    generator: LatentGenerator, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = generator.generate_tokens(prompts, 32, stop_at_end_of_text=False).token_ids
    end = full[4][5]
    first = full[4].index(end)
    end_at(monkeypatch, generator, end)
    for settings in ({}, {"mode": "streaming"}):
        out = generator.generate_tokens(prompts, 32, min_new_tokens=11, **settings).token_ids
        assert all(len(ids) >= 11 and end not in ids for ids in out)
        assert out[4][:first] == full[4][:first]
    assert len(generator.generate_tokens(prompts, 32).token_ids[4]) == first


def test_early_levels(rq: LatentGenerator, tokens: Make) -> None:
    prompt = tokens(8, seed=1)
    whole = rq.generate_tokens([prompt.tolist()], 20, stop_at_end_of_text=False)
    assert torch.equal(
        rq.generate_tokens([prompt.tolist()], 20, stop_at_end_of_text=False, num_levels=LEVELS).codes,
        whole.codes,
    )
    for mode in ("deferred", "streaming"):
        out = rq.generate_tokens([prompt.tolist()], 20, stop_at_end_of_text=False, num_levels=2, mode=mode)
        assert out.codes.shape == (1, 5, 2)
        assert torch.equal(out.codes[0, 0], whole.codes[0, 0, :2])
        codes = torch.cat([rq.vae.encode(prompt[None])[..., :2], out.codes], dim=1)
        assert out.token_ids[0] == rq.vae.decode(codes)[0, 8:].argmax(-1).tolist()
        assert out.token_ids != whole.token_ids


def test_early_levels_of_one_embedding(make_codec: Make, make_latent_model: Make, tokenizer: Any) -> None:
    latent_model = make_latent_model(RQTransformer, torch.float32, embedding="shared")
    generator = LatentGenerator(make_codec(torch.float32), latent_model, tokenizer)
    out = generator.generate_tokens([[1, 2, 3, 4, 5]], 12, stop_at_end_of_text=False, num_levels=2)
    assert out.codes.shape[2] == 2
    # The levels that are left out read as nothing, not as their first codes.
    weight = latent_model.spatial.join.weight
    before = latent_model.spatial.embed(out.codes)
    with torch.no_grad():
        weight[:, 2 * weight.shape[1] // LEVELS :].zero_()
    assert torch.equal(latent_model.spatial.embed(out.codes), before)


def test_schedules_over_levels(rq: LatentGenerator, tokens: Make) -> None:
    prompts = tokens(6, 8, seed=2)
    settings: dict[str, Any] = {"seed": 1, "stop_at_end_of_text": False}
    for schedule in ({"temperature": [0.0, 0.0, 5.0]}, {"temperature": 5.0, "top_k": [1, 1, 0]}):
        out = rq.generate_tokens(prompts.tolist(), 4, **schedule, **settings)
        correct = rq.rq_transformer(torch.cat([rq.vae.encode(prompts), out.codes], dim=1)).correct[:, -1]
        assert correct[:, :2].all() and not correct[:, 2].all()
    greedy = rq.generate_tokens(prompts.tolist(), 24, stop_at_end_of_text=False)
    assert rq.generate_tokens(prompts.tolist(), 24, 2.0, top_k=1, **settings).token_ids == greedy.token_ids
    with pytest.raises(ValueError, match=r"top_p: lists 2 values for 3 levels"):
        rq.generate(["w5"], top_p=[0.5, 0.5])


@pytest.mark.parametrize("kind", ["rq", "identity"])
def test_the_best_of_several_is_the_likeliest(make_generator: Make, tokens: Make, kind: str) -> None:
    generator = make_generator(kind)
    prompts = tokens(3, 8, seed=4)
    settings: dict[str, Any] = {"temperature": 1.0, "seed": 6, "stop_at_end_of_text": False}
    best = generator.generate_tokens(prompts.tolist(), 16, best_of=4, **settings)
    assert best.codes.shape[0] == 3
    for row, prompt in enumerate(prompts):
        candidates = [
            generator.generate_tokens([prompt.tolist()], 16, row_keys=[row + (i << 40)], **settings)
            for i in range(4)
        ]
        scores = []
        for candidate in candidates:
            codes = torch.cat([generator.vae.encode(prompt[None]), candidate.codes], dim=1)
            nats = generator.rq_transformer(codes).nats[:, 2:].sum()
            log_p = torch.zeros(())
            if kind == "rq":
                drawn = torch.tensor(candidate.token_ids[0])
                logits = generator.vae.decode(codes)[0, 8:]
                log_p = logits.log_softmax(-1).gather(1, drawn[:, None]).sum()
            scores.append(float(log_p - nats))
        assert len({round(score, 3) for score in scores}) == 4
        assert best.token_ids[row] == candidates[scores.index(max(scores))].token_ids[0]


def test_the_likeliest_counts_up_to_the_end(rq: LatentGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of different lengths are compared by latent, and what lies behind their ends does not count."""
    settings: dict[str, Any] = {"temperature": 1.0, "seed": 2}
    end_at(monkeypatch, rq, rq.generate_tokens([[7]], 30, **settings).token_ids[0][2])
    best = {
        block: rq.generate_tokens([[7], [8, 9]], 30, best_of=6, decode_block=block, **settings).token_ids
        for block in (1, 5, 8)
    }
    assert best[1] == best[5] == best[8]


def test_samples_are_scored_without_loss(rq: LatentGenerator, tokens: Make) -> None:
    """What is generated from a prompt of whole chunks can be scored as text again."""
    prompt = tokens(8, seed=5)
    out = rq.generate_tokens([prompt.tolist()], 8, stop_at_end_of_text=False)
    ids = torch.tensor([prompt.tolist() + out.token_ids[0]])
    assert torch.isfinite(latent_bound(rq.vae, rq.rq_transformer, ids, torch.ones_like(ids)).token_nats).all()


def test_what_the_models_cannot_do_is_an_error(make_generator: Make, rq: LatentGenerator) -> None:
    for settings, kind, message in (
        (
            {"mode": "deferred"},
            "tokens",
            r"mode deferred.*reads tokens .spatial_input: tokens.*use mode auto",
        ),
        ({"decode_block": 4}, "tokens", "mode deferred, decode_block: this latent model reads tokens"),
        ({"num_levels": 1}, "identity", "num_levels: the codes of the identity codec are tokens"),
        ({"num_levels": 1}, "anchor", "num_levels: the codes of the anchor codec are tokens"),
        ({"num_levels": 2}, "flat", "num_levels: a FlatTransformer reads the codes of all levels"),
        ({"num_levels": 4}, "rq", "num_levels: 4 of a codec with 3 levels"),
        ({"row_keys": [1, 2]}, "rq", "row_keys: 2 of them for 1 prompts"),
        ({"max_new_tokens": 300}, "rq", "a prompt of 1 tokens and max_new_tokens=300 need more than 256"),
    ):
        with pytest.raises(ValueError, match=message):
            make_generator(kind).generate(["w5"], **settings)
    for settings in ({"best_of": 2, "temperature": 1.0}, {"mode": "deferred"}):
        with pytest.raises(ValueError, match="need the whole text before any is shown; use generate"):
            rq.stream(["w5"], **settings)
    with pytest.raises(ValueError, match="at least one prompt"):
        rq.stream([])
    with pytest.raises(ValueError, match="give a list of texts, not one text"):
        rq.stream("w5 w6")
    with pytest.raises(TypeError, match="top_q"):
        rq.generate(["w5"], top_q=1)


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.slow),  # the compiler takes a minute
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_a_compiled_depth_loop_gives_the_same(
    make_codec: Make,
    make_latent_model: Make,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    device: str,
) -> None:
    results = []
    for compile in (False, True):
        codec, model = make_codec(torch.float32), make_latent_model(dtype=torch.float32, depth_layers=1)
        generator = LatentGenerator(codec.to(device), model.to(device), tokenizer, compile)
        results.append(
            [
                generator.generate_tokens(prompts, 20, temperature, stop_at_end_of_text=False)
                for temperature in (0.0, 1.0)
            ]
        )
    for expected, out in zip(*results, strict=True):
        assert torch.equal(out.codes, expected.codes)
        assert out.token_ids == expected.token_ids


def test_without_a_compiler_or_a_depth_loop_nothing_is_compiled(
    make_codec: Make,
    make_latent_model: Make,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="a FlatTransformer has no depth loop"):
        LatentGenerator(make_codec(), make_latent_model(FlatTransformer), tokenizer, compile=True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="there is no 'no-such-compiler'; install g"):
        LatentGenerator(make_codec(), make_latent_model(), tokenizer, compile=True)
