from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from rqvae import RQVAE, BaseLM, RQVAEConfig
from rqvae.backbone import build_backbone, load_pretrained
from rqvae.cached_decoding import CachedGreedyDecoder
from rqvae.config import ArchitectureConfig
from rqvae.linear_head import LinearHead

Make = Callable[..., Any]
EOS = 1
BACKBONES = Path(__file__).parents[3] / "configs" / "backbones"


# Base LM ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
def test_nats_equal_the_loss_of_transformers(make_base_lm: Make, tokens: Make, model_type: str) -> None:
    model = make_base_lm(model_type=model_type)
    ids = tokens(2, 20)
    out = model(ids, torch.ones_like(ids))
    for row in range(2):
        with_start = F.pad(ids[row : row + 1], (1, 0), value=EOS)
        expected = model.lm(input_ids=with_start, labels=with_start).loss
        assert out.nats[row].mean().item() == pytest.approx(expected.item(), rel=1e-5)
    assert out.loss.item() == pytest.approx(out.nats.mean().item(), rel=1e-5)


def test_the_first_token_of_every_document_is_predicted_from_end_of_text(
    make_base_lm: Make, packed: Any
) -> None:
    model = make_base_lm()
    out = model(packed.input_ids, packed.document_ids)
    first = F.log_softmax(model.lm(input_ids=torch.tensor([[EOS]])).logits[0, 0].double(), dim=-1)
    starts = [(0, 3), (0, 12), (0, 17), (1, 2)]
    for row, place in starts:
        assert packed.document_ids[row, place] != packed.document_ids[row, place - 1]
        expected = -first[packed.input_ids[row, place]].item()
        assert out.nats[row, place].item() == pytest.approx(expected, rel=1e-4)


def test_packed_documents_are_isolated(make_base_lm: Make, packed: Any) -> None:
    model = make_base_lm()
    out = model(packed.input_ids, packed.document_ids)
    real = packed.document_ids > 0
    assert (out.nats[~real] == 0).all()
    assert not out.correct[~real].any()
    assert out.loss.item() == pytest.approx(out.nats[real].mean().item(), rel=1e-5)
    for row in range(2):
        for number in range(1, int(packed.document_ids[row].max()) + 1):
            places = packed.document_ids[row] == number
            ids = packed.input_ids[row][places][None]
            alone = model(ids, torch.ones_like(ids))
            torch.testing.assert_close(alone.nats[0], out.nats[row][places], atol=1e-5, rtol=1e-5)
            assert torch.equal(alone.correct[0], out.correct[row][places])


def test_no_token_sees_itself_or_the_future(make_base_lm: Make, tokens: Make) -> None:
    model = make_base_lm()
    ids = tokens(1, 12)
    before = model(ids, torch.ones_like(ids)).nats
    for place in range(12):
        changed = ids.clone()
        changed[0, place] = 2 + (ids[0, place] - 1) % 95
        after = model(changed, torch.ones_like(ids)).nats
        torch.testing.assert_close(after[:, :place], before[:, :place], atol=1e-5, rtol=0)
        if place < 11:
            assert (after - before)[:, place + 1 :].abs().max() > 1e-3


def test_losses_of_micro_batches_add_up(make_base_lm: Make, packed: Any) -> None:
    model = make_base_lm()
    total = (packed.document_ids > 0).sum()
    parts = [
        model(packed.input_ids[i : i + 1], packed.document_ids[i : i + 1], num_tokens=total).loss
        for i in range(3)
    ]
    torch.testing.assert_close(sum(parts), model(*packed).loss)


def test_an_untrained_model_is_as_good_as_chance_and_learns(
    make_architecture: Callable[..., ArchitectureConfig], tokens: Make
) -> None:
    torch.manual_seed(0)
    model = BaseLM(make_architecture(), EOS)
    ids = tokens(4, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = model(ids, torch.ones_like(ids)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(97), abs=0.3)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
def test_saved_as_a_plain_hugging_face_directory(
    make_base_lm: Make, tokens: Make, tmp_path: Path, tied: bool, model_type: str
) -> None:
    model = make_base_lm(torch.float32, tie_word_embeddings=tied, model_type=model_type)
    assert (model.lm.lm_head.weight is model.lm.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied

    ids = tokens(2, 12)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    with_start = F.pad(ids, (1, 0), value=EOS)
    logits = plain(input_ids=with_start).logits[:, :-1]
    expected = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    loaded = BaseLM.from_pretrained(tmp_path, EOS)
    for candidate in (model, loaded):
        actual = candidate(ids, torch.ones_like(ids)).nats
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert not loaded.training
    assert isinstance(loaded.lm.lm_head, LinearHead)
    assert (loaded.lm.lm_head.weight is loaded.lm.model.embed_tokens.weight) == tied


def test_a_saved_model_generates_with_a_cache_by_default(make_base_lm: Make, tmp_path: Path) -> None:
    make_base_lm(torch.float32).save_pretrained(tmp_path)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path)
    out = lm.generate(torch.tensor([[3, 4]]), max_new_tokens=2, pad_token_id=0, return_dict_in_generate=True)
    assert out.past_key_values is not None


@pytest.mark.parametrize("tied", [True, False])
def test_training_keeps_a_tied_head_tied(make_base_lm: Make, tokens: Make, tied: bool) -> None:
    model = make_base_lm(tie_word_embeddings=tied).train()
    ids = tokens(2, 12)
    model(ids, torch.ones_like(ids)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    head, embeddings = model.lm.lm_head.weight, model.lm.model.embed_tokens.weight
    assert torch.equal(head, embeddings) == tied


# Backbones ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_lm_directory(make_base_lm: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base_lm")
    make_base_lm(torch.float32).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("tied", [True, False])
def test_a_codec_takes_over_a_base_lm(
    make_base_lm: Make, make_architecture: Make, make_codec_config: Make, tmp_path: Path, tied: bool
) -> None:
    base_lm = make_base_lm(torch.float32, tie_word_embeddings=tied)
    base_lm.save_pretrained(tmp_path)
    codec = RQVAE(make_codec_config(architecture=make_architecture(tie_word_embeddings=tied)))
    codec.load_backbone(str(tmp_path))
    expected = base_lm.lm.model.state_dict()
    assert codec.encoder.backbone.state_dict().keys() == expected.keys()
    assert codec.decoder.backbone.state_dict().keys() == expected.keys() - {"embed_tokens.weight"}
    for part in (codec.encoder, codec.decoder):
        for name, tensor in part.backbone.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
    assert torch.equal(codec.decoder.head.weight, base_lm.lm.lm_head.weight)
    taken = {id(p) for p in codec.backbone_parameters()}
    names = {name for name, p in codec.named_parameters() if id(p) in taken}
    prefixes = ("encoder.backbone.", "decoder.backbone.", "decoder.head.")
    assert names == {name for name, _ in codec.named_parameters() if name.startswith(prefixes)}


@pytest.mark.parametrize("file_order", [("a", "b"), ("b", "a")])
def test_an_untied_head_is_preferred_whatever_the_order_of_files(
    make_architecture: Make, tmp_path: Path, base_lm_directory: Path, file_order: tuple[str, str]
) -> None:
    tensors = load_file(base_lm_directory / "model.safetensors")
    head_weight = torch.randn(97, 32)
    save_file(tensors, tmp_path / f"{file_order[0]}.safetensors")
    save_file({"lm_head.weight": head_weight}, tmp_path / f"{file_order[1]}.safetensors")
    head = LinearHead(32, 97)
    load_pretrained(str(tmp_path), build_backbone(make_architecture(), with_embeddings=True), head)
    assert torch.equal(head.weight, head_weight)


def load_into(architecture: ArchitectureConfig, directory: Path) -> None:
    backbone = build_backbone(architecture, with_embeddings=True)
    load_pretrained(str(directory), backbone, LinearHead(architecture.hidden_size, architecture.vocab_size))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": 1}, ["layers.1.mlp.up_proj.weight: unexpected"]),
        ({"num_hidden_layers": 3}, ["layers.2.mlp.up_proj.weight: missing"]),
        ({"intermediate_size": 48}, ["layers.0.mlp.up_proj.weight: (64, 32), expected (48, 32)"]),
        (
            {"vocab_size": 101},
            ["embed_tokens.weight: (97, 32), expected (101, 32)"],
        ),
        ({"model_type": "llama"}, ["layers.0.self_attn.q_norm.weight: unexpected"]),
    ],
    ids=str,
)
def test_a_backbone_that_does_not_fit_is_a_clear_error(
    make_architecture: Make, base_lm_directory: Path, changes: dict[str, Any], expected: list[str]
) -> None:
    load_into(make_architecture(), base_lm_directory)
    with pytest.raises(ValueError, match=r"does not fit the backbone's architecture") as caught:
        load_into(make_architecture(**changes), base_lm_directory)
    for line in expected:
        assert line in str(caught.value)


def test_a_missing_tensor_is_named(make_architecture: Make, base_lm_directory: Path, tmp_path: Path) -> None:
    tensors = load_file(base_lm_directory / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"  norm.weight: missing"):
        load_into(make_architecture(), tmp_path)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight or embed_tokens.weight: missing"):
        load_into(make_architecture(), tmp_path)


def test_facts_that_no_shape_shows_are_compared(make_architecture: Make, base_lm_directory: Path) -> None:
    changed = make_architecture(rope_theta=1e4, rms_norm_eps=1e-5)
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_into(changed, base_lm_directory)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["rms_norm_eps", "rope_parameters"]


def test_rotary_frequencies_of_old_checkpoints_are_passed_over(
    make_architecture: Make, base_lm_directory: Path, tmp_path: Path
) -> None:
    tensors = load_file(base_lm_directory / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / "m.safetensors")
    load_into(make_architecture(), tmp_path)


def test_a_damaged_file_is_named(make_architecture: Make, base_lm_directory: Path, tmp_path: Path) -> None:
    content = (base_lm_directory / "model.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"m\.safetensors' is damaged"):
        load_into(make_architecture(), tmp_path)


def test_a_base_lm_from_something_else_is_a_clear_error(
    make_codec: Make, base_lm_directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    make_codec(torch.float32).save_pretrained(tmp_path / "codec")
    (tmp_path / "empty").mkdir()
    for name in ("missing", "codec", "empty"):
        with pytest.raises(ValueError, match=f"{name}' holds no causal language model"):
            BaseLM.from_pretrained(tmp_path / name, EOS)
    tensors = load_file(base_lm_directory / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "empty" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "empty/config.json").write_text((base_lm_directory / "config.json").read_text())
    with pytest.raises(ValueError, match=r"not complete, it lacks: model\.norm\.weight"):
        BaseLM.from_pretrained(tmp_path / "empty", EOS)
    GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1)).save_pretrained(
        tmp_path / "gpt"
    )
    with pytest.raises(ValueError, match="type gpt2; use one of qwen3, llama"):
        BaseLM.from_pretrained(tmp_path / "gpt", EOS)


def test_a_directory_without_weights(make_architecture: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \*\.safetensors files"):
        load_into(make_architecture(), tmp_path)


def test_a_source_that_is_neither_directory_nor_on_the_hub(
    make_architecture: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source in (str(tmp_path / "nothing"), "nobody/nothing"):
        with pytest.raises(ValueError, match="is not a directory, and fetching it from the hub failed"):
            load_pretrained(source, build_backbone(make_architecture(), True), None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3_0.6b", 596_049_920),
        ("qwen3_1.7b", 1_720_574_976),
        ("qwen3_4b", 4_022_468_096),
        ("qwen3_8b", 8_190_735_360),
        ("smollm2_135m", 134_515_008),
    ],
)
def test_parameter_counts(name: str, expected: int, make_codec_config: Make) -> None:
    architecture = ArchitectureConfig.model_validate(yaml.safe_load((BACKBONES / f"{name}.yaml").read_text()))
    config: RQVAEConfig = make_codec_config(
        architecture=architecture, latent_dim=512, latent_head_dim=64, num_latent_layers=2, codebook_dim=16
    )
    shared_config = config.model_copy(
        update={"backbone": config.backbone.model_copy(update={"shared": True})}
    )
    with torch.device("meta"):
        base_lm, codec, shared = BaseLM(architecture, EOS), RQVAE(config), RQVAE(shared_config)

    def count(parameters: Any) -> int:
        return sum(p.numel() for p in {id(p): p for p in parameters}.values())

    assert count(base_lm.parameters()) == expected
    # The codec: twice the layers, embeddings once, a head of its own, and the new layers.
    hidden, table = architecture.hidden_size, architecture.vocab_size * architecture.hidden_size
    layers = count(base_lm.lm.model.parameters()) - table
    assert count(codec.backbone_parameters()) == 2 * layers + 2 * table
    latent, dim, factor, mlp = 512, 16, 4, 1408  # 8/3 * 512, rounded up to a multiple of 64
    refinement = 2 * (4 * latent**2 + 3 * latent * mlp + 2 * latent) + latent
    # The encoder reads token embeddings beside the backbone's states: twice the width, and a norm.
    encoder = 3 * hidden + factor * 2 * hidden * latent + latent + refinement + latent * dim + dim
    decoder = dim * latent + latent + refinement + latent * factor * hidden + factor * hidden
    assert count(codec.parameters()) == 2 * layers + 2 * table + encoder + decoder
    # One set of weights for both: the base LM as it is, tied or not, and the new layers.
    assert count(shared.backbone_parameters()) == expected
    assert count(shared.parameters()) == expected + encoder + decoder


# Lean cached decoding -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"model_type": "llama"}, {"tie_word_embeddings": False}, {"num_key_value_heads": 2, "head_dim": 8}],
    ids=str,
)
@pytest.mark.parametrize("prompt_length", [1, 9])
def test_the_lean_loop_generates_what_transformers_generates(
    make_base_lm: Make, tokens: Make, changes: dict[str, Any], prompt_length: int
) -> None:
    lm = make_base_lm(torch.float32, **changes).lm
    with torch.no_grad():  # so that the layers and not the embeddings decide, and the text varies
        for parameter in lm.model.layers.parameters():
            parameter.mul_(2 if parameter.dim() == 2 else 1)
    prompt: Tensor = tokens(3, prompt_length)
    expected = lm.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=20,
        min_new_tokens=20,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
    )[:, prompt_length:]
    decoder = CachedGreedyDecoder(lm, max_length=prompt_length + 20)
    assert torch.equal(decoder.generate(prompt, 20), expected)
    assert torch.equal(decoder.generate(prompt[:1], 20), expected[:1])  # the decoder can be used again
    assert expected.unique().numel() > 5
