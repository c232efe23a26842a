"""The command that generates text."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_pipeline.code_manifest import Precision
from launch import generate
from launch.inference_models import load_generator
from rqvae import RQVAE, RQTransformer, RQTransformerConfig, RQVAEConfig
from tests.unit.rqvae.conftest import VOCAB_SIZE, randomize

ARCHITECTURE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
SHAPE = {"compression_factor": 4, "codebook_levels": 2, "codebook_size": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "model"
    codec = RQVAE(
        RQVAEConfig.model_validate(
            {"backbone": {"architecture": ARCHITECTURE}, "latent_dim": 32, "latent_head_dim": 16, **SHAPE}
        )
    )
    latent_model = RQTransformer(
        RQTransformerConfig(
            spatial_dim=32, spatial_layers=1, depth_dim=32, depth_layers=1, head_dim=16, **SHAPE
        )
    )
    for seed, part in enumerate((codec, latent_model)):
        randomize(part, seed)
    codec.save_pretrained(directory / "rqvae")
    latent_model.save_pretrained(directory / "rq_transformer")
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, VOCAB_SIZE))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(directory / "tokenizer")
    return directory


def run(capsys: pytest.CaptureFixture[str], model: Path, *arguments: str) -> tuple[str, str]:
    assert generate.main(["--model", str(model), *arguments]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


PROMPTS = ["w5 w6", "w7", "", "w8 w9 w10 w11 w12", "w13"]


def test_batches_streams_and_modes_give_the_same_texts(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    common = ("--prompts", str(file), "--max-new-tokens", "9", "--jsonl", "--seed", "3")
    out, err = run(capsys, model, *common)
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS
    texts = [line["text"] for line in lines]
    assert len(set(texts)) == 5
    assert "tokens/s" in err and "first text" not in err and "prompts" not in err
    out, err = run(capsys, model, *common, "--batch-size", "2")
    assert [json.loads(line)["text"] for line in out.splitlines()] == texts
    assert "generate: 5/5 prompts" in err
    assert run(capsys, model, *common, "--mode", "streaming")[0] == run(capsys, model, *common)[0]
    out, err = run(capsys, model, *common, "--stream", "--batch-size", "3")
    joined = [""] * 5
    for line in map(json.loads, out.splitlines()):
        joined[line["row"]] += line["text"]
    assert joined == texts
    assert "first text after" in err
    plain = run(capsys, model, *common[:-3], "--seed", "3")[0]
    assert plain == "".join(f"{prompt}{text}\n\n" for prompt, text in zip(PROMPTS, texts, strict=True))
    assert run(capsys, model, *common[:-3], "--seed", "3", "--stream")[0] == plain


def test_options_reach_the_generator(
    capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = load_generator(model)
    monkeypatch.setattr(sys, "stdin", io.StringIO("w5 w6\nw7\n"))
    out, _ = run(
        capsys,
        model,
        *("--prompts", "-", "--jsonl", "--max-new-tokens", "12", "--min-new-tokens", "3", "--stop", "w9"),
        *("--stop", "w20", "--temperature", "0.9,0.3", "--top-k", "9,4", "--top-p", "0.9", "--best-of", "2"),
        *("--token-temperature", "0.5", "--num-levels", "1", "--seed", "4", "--mode", "deferred"),
    )
    expected = generator.generate(
        ["w5 w6", "w7"],
        12,
        [0.9, 0.3],
        4,
        top_k=[9, 4],
        top_p=0.9,
        min_new_tokens=3,
        stop=["w9", "w20"],
        best_of=2,
        token_temperature=0.5,
        num_levels=1,
    )
    assert [json.loads(line)["text"] for line in out.splitlines()] == expected


def test_bf16_keeps_the_codebooks(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    generator = load_generator(model, "bf16")
    assert {p.dtype for p in generator.rq_transformer.parameters()} == {torch.bfloat16}
    assert generator.vae.quantizer.levels[0].codebook.dtype == torch.float32
    out, _ = run(capsys, model, "--prompt", "w5", "--precision", "bf16", "--max-new-tokens", "8")
    assert out.startswith("w5")


def test_the_report_beside_the_model_is_told(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    report = model.parent / "report.json"
    arguments = ("--prompt", "w5 w6 w7", "--max-new-tokens", "4")
    assert f"quality: not known, there is no {report}; launch/eval.py" in run(capsys, model, *arguments)[1]
    report.write_text(json.dumps({"bits_per_byte": {"latent_bound": 1.75, "base_lm": 1.5}}))
    (model.parent / "rqvae").mkdir()
    (model.parent / "rqvae" / "config.yaml").write_text(yaml.safe_dump({"data": {"sample_length": 6}}))
    try:
        err = run(capsys, model, *arguments)[1]
    finally:
        report.unlink()
        (model.parent / "rqvae" / "config.yaml").unlink()
    assert "quality: at most 1.750 bits per byte (a bound), 1.500 of the base LM" in err
    assert "note: 1 of 1 prompts and their new tokens are longer than the 6 tokens of the training" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "w5", "--temperature", "-1"], "error: temperature, token_temperature: must be finite"),
        (["--prompt", "w5", "--temperature", "1,1,1"], "error: temperature: lists 3 values for 2 levels"),
        (["--prompt", "w5", "--num-levels", "3"], "error: num_levels: 3 of a codec with 2 levels"),
        (["--prompt", "w5", "--stream", "--best-of", "2"], "error: best_of, mode deferred: need the whole"),
        (["--prompt", "w5", "--max-new-tokens", "260"], "error: a prompt of 1 tokens and max_new_tokens=260"),
    ],
)
def test_what_cannot_be_done_is_an_error(
    capsys: pytest.CaptureFixture[str], model: Path, arguments: list[str], message: str
) -> None:
    assert generate.main(["--model", str(model), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_bad_command_lines_and_models(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    cases: list[tuple[list[Any], str]] = [
        ([], "give --prompt or --prompts"),
        (["--prompt", "w5", "--batch-size", "0"], "--batch-size must be 1 or more"),
        (["--prompt", "w5", "--top-k", "1.5"], "invalid int, or a list with commas value: '1.5'"),
    ]
    for arguments, message in cases:
        with pytest.raises(SystemExit):
            generate.main(["--model", str(model), *arguments])
        assert message in capsys.readouterr().err
    assert generate.main(["--model", str(tmp_path), "--prompt", "w5"]) == 2
    assert "has no 'rqvae' (launch/convert_checkpoint.py writes it)" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.inference_mode()
def test_int8_weights_say_nearly_the_same(model: Path, precision: Precision) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed (pip install torchao)")
    exact, rounded = (load_generator(model, precision, int8) for int8 in (False, True))
    linears = [module for module in rounded.rq_transformer.modules() if isinstance(module, torch.nn.Linear)]
    assert linears and all(type(module.weight) is not torch.nn.Parameter for module in linears)  # torchao's
    ids, documents = torch.arange(2, 34)[None], torch.ones(1, 32, dtype=torch.long)
    codes = exact.vae.encode(ids, document_ids=documents)
    nats = [
        generator.vae.decode(codes, documents[:, ::4]).log_softmax(-1).float().mean()
        + generator.rq_transformer(codes, token_document_ids=documents).nats.mean()
        for generator in (exact, rounded)
    ]
    assert nats[0] != nats[1]
    torch.testing.assert_close(nats[1], nats[0], rtol=0.02, atol=0.02)


def test_int8_needs_torchao(
    capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)  # as where it is not installed
    assert generate.main(["--model", str(model), "--prompt", "w5", "--int8"]) == 2
    assert "pip install torchao" in capsys.readouterr().err
