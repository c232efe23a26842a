"""RQTransformer and its flat baseline, with every option: one contract, tested on all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rqvae import FlatTransformer, LatentModel, RQTransformer, RQTransformerConfig, load_latent_model
from rqvae.latent_model import RQTransformerOutput
from rqvae.layers import causal_document_mask
from rqvae.linear_head import LinearHead, is_alone_at_the_top

Make = Callable[..., Any]
SIZES = (16, 8, 4)
FACTOR, VOCAB_SIZE = 4, 97
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # angles of rotary positions, nats and head statistics are fp32

both = pytest.mark.parametrize("model_class", [RQTransformer, FlatTransformer])

TOKENS = {"spatial_input": "tokens", "vocab_size": VOCAB_SIZE}
BOTH = {"spatial_input": "both", "vocab_size": VOCAB_SIZE}
SHARED = {"head": "shared", "codebook_size": 16}
SHARED_EMBEDDING = {"embedding": "shared", "depth_input": "code", "codebook_size": 16}
BACKBONE = {"spatial_backbone": "qwen3"}  # filled in by the fixture
VARIANTS: dict[str, tuple[type[LatentModel], dict[str, Any]]] = {
    "rq": (RQTransformer, {}),
    "rq, shared head": (RQTransformer, SHARED),
    "rq, code before": (RQTransformer, {"depth_input": "code"}),
    "rq, shared embedding": (RQTransformer, SHARED_EMBEDDING),
    "rq, tokens": (RQTransformer, TOKENS),
    "rq, both": (RQTransformer, BOTH),
    "rq, qwen": (RQTransformer, BACKBONE),
    "rq, llama, tokens": (RQTransformer, {"spatial_backbone": "llama", **TOKENS}),
    "flat": (FlatTransformer, {}),
    "flat, shared head": (FlatTransformer, SHARED),
    "flat, shared embedding": (FlatTransformer, {"embedding": "shared", "codebook_size": 16}),
}


def random_codes(*shape: int, seed: int = 0, sizes: tuple[int, ...] = SIZES) -> Tensor:
    """LongTensor [*shape, D]."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(*shape, len(sizes), generator=generator) * torch.tensor(sizes)).long()


def text_of(codes: Tensor) -> Tensor:
    """A text of which every code decides a token: [B, S, D] -> [B, S * K]."""
    places = torch.arange(FACTOR)
    return (2 + 20 * places + codes[..., places % codes.shape[-1]]).flatten(1)


def score(model: LatentModel, codes: Tensor, **arguments: Any) -> RQTransformerOutput:
    """The model on codes and, if it reads tokens, on the text that belongs to them."""
    text = text_of(codes) if model.config.reads_tokens else None
    return model(codes, text, **arguments)


def make_config(**changes: Any) -> RQTransformerConfig:
    values = {
        "spatial_dim": 32,
        "spatial_layers": 2,
        "depth_dim": 32,
        "depth_layers": 1,
        "head_dim": 16,
        "compression_factor": FACTOR,
        "codebook_levels": 3,
        "codebook_size": SIZES,
    }
    return RQTransformerConfig.model_validate(values | changes)


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest, make_latent_model: Make, make_architecture: Make) -> LatentModel:
    model_class, changes = VARIANTS[request.param]
    changes = {"codebook_size": SIZES} | changes
    if kind := changes.get("spatial_backbone"):
        changes["spatial_backbone"] = {"architecture": make_architecture(model_type=kind)}
    return make_latent_model(model_class, **changes)


def test_a_code_influences_what_comes_after_it_and_nothing_else(
    model: LatentModel,
) -> None:
    sizes = model.config.codebook_sizes
    codes = random_codes(1, 5, sizes=sizes)
    before = score(model, codes, return_logits=True).logits
    for place in range(5):
        for level in range(3):
            changed = codes.clone()
            changed[0, place, level] = (codes[0, place, level] + 1) % sizes[level]
            after = score(model, changed, return_logits=True).logits
            for other_place in range(5):
                for other_level in range(3):
                    x, y = after[other_level][0, other_place], before[other_level][0, other_place]
                    if (other_place, other_level) > (place, level):
                        assert (x - y).abs().max() > 1e-4, (place, level, other_place, other_level)
                    else:
                        torch.testing.assert_close(x, y, atol=1e-10, rtol=0)


def test_packed_documents_are_isolated_and_padding_counts_for_nothing(
    model: LatentModel,
) -> None:
    codes = random_codes(3, 8)
    documents = torch.tensor([[1, 1, 1, 2, 2, 0, 3, 0], [0, 0, 1, 1, 1, 1, 2, 2], [0] * 8])
    out = score(model, codes, document_ids=documents)
    real = documents > 0
    assert (out.nats[~real] == 0).all()
    assert not out.correct[~real].any()
    assert out.loss.item() == pytest.approx(out.nats.sum().item() / (4 * real.sum().item()), rel=1e-5)
    for row in range(2):
        for number in range(1, int(documents[row].max()) + 1):
            places = documents[row] == number
            alone = score(model, codes[row][places][None])
            torch.testing.assert_close(alone.nats[0], out.nats[row][places], **CLOSE)
            assert torch.equal(alone.correct[0], out.correct[row][places])
    others = torch.where(real[..., None], codes, random_codes(3, 8, seed=1))
    torch.testing.assert_close(score(model, others, document_ids=documents).nats, out.nats, **CLOSE)
    assert score(model, codes[2:], document_ids=documents[2:]).loss.item() == 0


def test_logits_nats_and_correct_agree(model: LatentModel) -> None:
    codes = random_codes(2, 6)
    out = score(model, codes, return_logits=True)
    assert score(model, codes).logits is None
    assert [tuple(level.shape) for level in out.logits] == [
        (2, 6, size) for size in model.config.codebook_sizes
    ]
    for i, logits in enumerate(out.logits):
        nats = F.cross_entropy(logits.transpose(1, 2), codes[..., i], reduction="none")
        torch.testing.assert_close(out.nats[..., i].double(), nats, **CLOSE)
        assert torch.equal(out.correct[..., i], logits.argmax(-1) == codes[..., i])
    assert out.loss.item() == pytest.approx(out.nats.sum().item() / (4 * 2 * 6), rel=1e-5)


def test_prefixes_and_batches_change_nothing(model: LatentModel) -> None:
    codes = random_codes(3, 6)
    nats = score(model, codes).nats
    for end in range(1, 6):
        torch.testing.assert_close(score(model, codes[:, :end]).nats, nats[:, :end], **CLOSE)
    torch.testing.assert_close(score(model, codes[1:2]).nats, nats[1:2], **CLOSE)


def test_losses_of_micro_batches_add_up(model: LatentModel) -> None:
    codes = random_codes(4, 6)
    total = torch.tensor(4 * 4 * 6)
    parts = [score(model, part, num_tokens=total).loss for part in codes.split([1, 3])]
    torch.testing.assert_close(sum(parts), score(model, codes).loss)


@both
def test_an_untrained_model_is_as_good_as_chance_and_learns(model_class: type[RQTransformer]) -> None:
    torch.manual_seed(0)
    model = model_class(make_config())
    codes = random_codes(4, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = model(codes)
    for level, size in enumerate(SIZES):
        assert first.nats[..., level].mean().item() == pytest.approx(math.log(size), abs=0.15)
    assert first.loss.item() == pytest.approx(math.log(math.prod(SIZES)) / 4, abs=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        model(codes).loss.backward()
        optimizer.step()
    assert model(codes).loss.item() < 0.4 * first.loss.item()


def test_every_parameter_gets_a_gradient_and_checkpointing_does_not_change_it(model: LatentModel) -> None:
    model.train()
    codes = random_codes(2, 6)
    # The first chunk begins and the last one ends with places that hold no token.
    documents = torch.ones(2, 6 * FACTOR, dtype=torch.long)
    documents[:, :2], documents[:, -1:] = 0, 0
    gradients = []
    for checkpointing in (False, True):
        for name, module in model.named_modules():
            if name.endswith("block"):
                module.gradient_checkpointing = checkpointing
        model.zero_grad()
        score(model, codes, token_document_ids=documents).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-9, rtol=1e-6)


def test_levels_have_embeddings_of_their_own(make_latent_model: Make) -> None:
    embedding = make_latent_model(codebook_size=SIZES).spatial.embedding
    tables = embedding.table.weight.split(SIZES)
    codes = random_codes(2, 5)
    expected = torch.stack([table[codes[..., i]] for i, table in enumerate(tables)], dim=-2)
    assert torch.equal(embedding(codes), expected)
    assert torch.equal(embedding(codes[..., :2]), expected[..., :2, :])
    for level in range(3):
        assert torch.equal(embedding.level(codes[..., level], level), expected[..., level, :])


@pytest.mark.parametrize("num_prompt", [0, 3])
def test_steps_with_caches_equal_teacher_forcing(model: LatentModel, num_prompt: int) -> None:
    """In a batch of prompts of three latents, of one, and of none."""
    codes = random_codes(3, 6)
    documents = torch.ones(3, 6, dtype=torch.long)
    if num_prompt:
        documents[1, : num_prompt - 1], documents[2, :num_prompt] = 0, 0
    token_documents = documents.repeat_interleave(FACTOR, dim=1)
    if num_prompt:
        token_documents[0, :1], token_documents[1, : num_prompt * FACTOR - 2] = 0, 0
    expected = score(model, codes, token_document_ids=token_documents, return_logits=True).logits
    text = text_of(codes) if model.config.reads_tokens else None
    end = num_prompt * FACTOR
    with torch.no_grad():
        steps = model.begin(
            codes[:, :num_prompt],
            documents[:, :num_prompt],
            6 - num_prompt,
            None if text is None else text[:, :end],
            token_documents[:, :end],
        )
        for place in range(num_prompt, 6):

            def choose(logits: Tensor, level: int, place: int = place) -> Tensor:
                torch.testing.assert_close(logits, expected[level][:, place], **CLOSE)
                return codes[:, place, level]

            assert torch.equal(steps.draw(choose), codes[:, place])
            if place < 5:
                tokens = None if text is None else text[:, place * FACTOR : (place + 1) * FACTOR]
                steps.append(codes[:, place], tokens)


def test_the_context_of_a_position_is_made_of_whole_positions_before(make_latent_model: Make) -> None:
    spatial = make_latent_model(codebook_size=SIZES).spatial
    codes, documents = random_codes(1, 6), torch.ones(1, 6, dtype=torch.long)
    inputs = torch.cat([spatial.start.expand(1, 1, -1), spatial.embed(codes)[:, :-1]], dim=1)
    expected = spatial.block(inputs, torch.arange(6)[None], causal_document_mask(documents, documents))
    torch.testing.assert_close(spatial(codes, documents), expected, **CLOSE)


@both
@pytest.mark.parametrize("changes", [{"codebook_levels": 1, "codebook_size": 16}, {"depth_dim": 64}], ids=str)
def test_other_shapes(model_class: type[RQTransformer], changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = make_config(**changes)
    codes = random_codes(2, 3)[..., : config.codebook_levels]
    assert model_class(config)(codes).nats.shape == codes.shape


@both
def test_codes_with_another_number_of_levels_are_an_error(model_class: type[RQTransformer]) -> None:
    with pytest.raises(ValueError, match="codes have 2 levels, the model has 3"):
        model_class(make_config())(random_codes(2, 3)[..., :2])


@pytest.mark.parametrize("changes", [TOKENS, BOTH], ids=["tokens", "both"])
def test_what_stands_in_an_absent_place_does_not_matter(
    make_latent_model: Make, changes: dict[str, Any]
) -> None:
    model = make_latent_model(codebook_size=SIZES, **changes)
    codes = random_codes(1, 4)
    text = text_of(codes)
    documents = torch.tensor([[0, 1, 1, 1] + [1, 1, 0, 0] + [2] * 4 + [0] * 4])
    out = model(codes, text, token_document_ids=documents)
    other = torch.where(documents > 0, text, 96)
    torch.testing.assert_close(model(codes, other, token_document_ids=documents).nats, out.nats, **CLOSE)
    full = model(codes, text, document_ids=torch.tensor([[1, 1, 2, 0]]))
    assert torch.equal(out.nats[:, 0], full.nats[:, 0])  # nothing has been read yet
    assert (out.nats[:, 1] - full.nats[:, 1]).abs().max() > 1e-3
    assert torch.equal(out.nats[:, 2:], full.nats[:, 2:])  # another document, padding
    changed = text.clone()
    changed[0, 2] += 1
    assert (model(codes, changed, token_document_ids=documents).nats - out.nats)[:, 1].abs().max() > 1e-3


def test_text_is_refused_or_demanded(make_latent_model: Make) -> None:
    codes = random_codes(1, 2)
    for model in (RQTransformer(make_config()), FlatTransformer(make_config())):
        with pytest.raises(ValueError, match="without input_ids"):
            model(codes, input_ids=text_of(codes))
    model = RQTransformer(make_config(**TOKENS))
    with pytest.raises(ValueError, match=r"reads tokens .spatial_input: tokens.; give input_ids"):
        model(codes)
    with pytest.raises(ValueError, match="give input_ids"):
        model.begin(codes, torch.ones(1, 2, dtype=torch.long), 1)
    with pytest.raises(ValueError, match="not both"):
        documents = torch.ones(1, 2, dtype=torch.long)
        model(codes, text_of(codes), document_ids=documents, token_document_ids=documents)


def test_a_flat_transformer_refuses_what_it_has_not(make_architecture: Make) -> None:
    for changes in (TOKENS, {"spatial_backbone": {"architecture": make_architecture()}}):
        with pytest.raises(ValueError, match="reads codes only and has no spatial_backbone"):
            FlatTransformer(make_config(**changes))


def test_a_shared_head_is_one_matrix(make_latent_model: Make) -> None:
    for model_class in (RQTransformer, FlatTransformer):
        own, shared = make_latent_model(model_class), make_latent_model(model_class, head="shared")
        heads = {name for name, _ in own.named_parameters() if "heads" in name}
        assert {n for n, _ in shared.named_parameters()} == {n for n, _ in own.named_parameters()} - {
            name for name in heads if not name.endswith("heads.0.weight")
        }
        assert len(heads) == 3


def test_a_tie_is_not_counted_as_right() -> None:
    """In bf16 many logits are equal; a model that says the same of all codes is right about none."""
    logits = torch.tensor([[1.0, 1.0, 0.0], [1.0, 2.0, 0.0], [-torch.inf, 0.0, -torch.inf]])
    labels, before = torch.tensor([[0], [1], [1]]), logits.clone()
    assert is_alone_at_the_top(logits, labels, logits.gather(1, labels)).tolist() == [False, True, True]
    assert torch.equal(logits, before)
    head = LinearHead(8, 11)
    torch.nn.init.zeros_(head.weight)
    out = head(torch.randn(5, 8), torch.arange(5))
    assert not out.correct.any()
    assert out.nats.tolist() == pytest.approx([math.log(11)] * 5)


def test_soft_targets_change_the_loss_and_nothing_else(model: LatentModel) -> None:
    sizes = model.config.codebook_sizes
    codes = random_codes(2, 4, sizes=sizes)
    documents = torch.tensor([[1, 1, 2, 0], [1, 1, 1, 1]])

    def gradients(**arguments: Any) -> tuple[RQTransformerOutput, list[Tensor]]:
        out = score(model, codes, document_ids=documents, **arguments)
        return out, list(torch.autograd.grad(out.loss, list(model.parameters()), allow_unused=True))

    hard, hard_gradients = gradients(return_logits=True)
    one_hot = [F.one_hot(codes[..., level], size).double() for level, size in enumerate(sizes)]
    same, same_gradients = gradients(soft_targets=one_hot)
    torch.testing.assert_close(same.loss, hard.loss, **CLOSE)
    for expected, actual in zip(hard_gradients, same_gradients, strict=True):
        if expected is not None:
            torch.testing.assert_close(actual, expected, **CLOSE)
    generator = torch.Generator().manual_seed(0)
    soft = [torch.randn(2, 4, size, generator=generator).softmax(-1) for size in sizes]
    out, _ = gradients(soft_targets=soft)
    losses = [
        F.cross_entropy(logits[documents > 0], targets[documents > 0].to(logits.dtype), reduction="sum")
        for logits, targets in zip(hard.logits or [], soft, strict=True)
    ]
    assert out.loss.item() == pytest.approx(sum(losses).item() / (7 * FACTOR), rel=1e-5)
    for result in (same, out):
        torch.testing.assert_close(result.nats, hard.nats, **CLOSE)
        assert torch.equal(result.correct, hard.correct)


def test_any_latent_model_comes_back_from_its_directory(model: LatentModel, tmp_path: Path) -> None:
    model.float().save_pretrained(tmp_path)
    again = load_latent_model(tmp_path)
    assert type(again) is type(model)
    assert again.config == model.config
    assert not again.training
    codes = random_codes(1, 4)
    assert torch.equal(score(again, codes).nats, score(model, codes).nats)
    with pytest.raises(ValueError, match="holds a"):
        (FlatTransformer if isinstance(model, RQTransformer) else RQTransformer).from_pretrained(tmp_path)


def test_a_directory_of_something_else_is_refused(make_codec: Make, tmp_path: Path) -> None:
    make_codec(torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a RQVAE, not a latent model"):
        load_latent_model(tmp_path)
    with pytest.raises(ValueError, match="not a model directory"):
        load_latent_model(tmp_path / "nothing")


def test_a_model_saved_before_the_options_existed_loads(tmp_path: Path) -> None:
    model = RQTransformer(make_config())
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for name in ("head", "embedding", "spatial_input", "spatial_backbone", "vocab_size"):
        del content["config"][name]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert load_latent_model(tmp_path).config == model.config


@pytest.mark.parametrize("changes", [{}, TOKENS], ids=["codes", "tokens"])
def test_a_spatial_backbone_starts_from_a_causal_lm(
    make_architecture: Make, make_base_lm: Make, tmp_path: Path, changes: dict[str, Any]
) -> None:
    make_base_lm(torch.float32).save_pretrained(tmp_path / "lm")
    lm = make_base_lm(torch.float32).lm.model
    backbone = {"architecture": make_architecture(), "pretrained": str(tmp_path / "lm")}
    model = RQTransformer(make_config(spatial_backbone=backbone, **changes))
    assert model.config.spatial_backbone is not None
    assert model.config.spatial_backbone.pretrained is None
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.load_backbone(str(tmp_path / "lm"))
    loaded = {id(p) for p in model.backbone_parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in loaded:
            source = lm.get_parameter(name.removeprefix("spatial.block.backbone."))
            assert torch.equal(parameter, source), name
        else:
            assert torch.equal(parameter, before[name]), name
    assert len(loaded) == sum(1 for _ in lm.parameters()) - (not changes)  # embeddings only if it reads
    model.save_pretrained(tmp_path / "model")
    assert 'pretrained": null' in (tmp_path / "model/config.json").read_text()


def test_without_a_spatial_backbone_there_is_nothing_to_load(tmp_path: Path) -> None:
    model = RQTransformer(make_config())
    assert list(model.backbone_parameters()) == []
    with pytest.raises(ValueError, match="no spatial_backbone"):
        model.load_backbone(str(tmp_path))


def test_the_depth_transformer_reads_the_sum_or_the_code_before() -> None:
    """With no attention in between, level 2 depends on the code of level 0 through the sum only."""
    codes = torch.tensor([[3, 7, 0], [5, 7, 0]])
    for depth_input, sees_it in (("sum", True), ("code", False)):
        model = RQTransformer(make_config(depth_input=depth_input, codebook_size=16)).eval()
        for layer in model.depth.block.layers:
            layer.attention.out_proj.weight.data.zero_()
        first, second = model.depth.hidden_states(torch.zeros(2, 32), codes)[:, 2]
        assert torch.equal(first, second) is not sees_it


def test_codes_enter_at_the_scale_of_what_they_are_added_to() -> None:
    model = RQTransformer(make_config(codebook_size=64, codebook_levels=8))
    codes = torch.randint(64, (500, 8))
    for embedding in (model.spatial.embedding, model.depth.embedding):
        assert embedding is not None
        assert 0.8 < embedding(codes).sum(-2).std() < 1.2


def test_a_shared_embedding_tells_places_apart_but_not_what_codes_mean() -> None:
    model = RQTransformer(make_config(**SHARED_EMBEDDING))
    assert len(model.depth.embedding.table.weight) == 16
    codes = random_codes(1, 4, sizes=(16, 16, 16))
    assert torch.equal(
        model.depth.embedding.level(codes[..., 0], 0), model.depth.embedding.level(codes[..., 0], 2)
    )
    swapped = codes[..., [1, 0, 2]]
    assert not torch.allclose(model.spatial.embed(codes), model.spatial.embed(swapped))
