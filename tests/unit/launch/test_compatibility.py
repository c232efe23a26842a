"""Data of another tokenizer than the pretrained model's are refused before training."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from data_pipeline import DataConfig, TokenDataset, build, load_tokenizer
from launch import train
from launch.compatibility import check_tokenizer, check_vocabulary
from launch.convert_checkpoint import main as convert
from rqvae import BaseLM
from rqvae.config import ArchitectureConfig
from tests.integration.conftest import write_corpus
from tests.unit.gguf_writing import write_gguf

ARCHITECTURE = ArchitectureConfig(
    model_type="llama",
    vocab_size=300,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards with a vocabulary of 300."""
    root = tmp_path_factory.mktemp("data")
    write_corpus(root / "documents.jsonl", 100)
    config = DataConfig.model_validate(
        {
            "directory": str(root / "shards"),
            "source": {"kind": "jsonl", "paths": str(root / "documents.jsonl")},
            "tokenizer": {"kind": "bpe", "vocab_size": 300},
            "sample_length": 64,
            "validation_fraction": 0.1,
            "test_fraction": 0.1,
        }
    )
    build(config, num_workers=1)
    return root / "shards"


def other_tokenizer(data: Path, directory: Path, first: str, second: str) -> None:
    """The data's tokenizer with two ids exchanged."""
    content = json.loads((data / "tokenizer/tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(content))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A pretrained model without a tokenizer."""
    torch.manual_seed(0)
    BaseLM(ARCHITECTURE, 0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_vocabulary_that_does_not_fit(data: Path) -> None:
    dataset = TokenDataset(data, "train")
    check_vocabulary(dataset, ARCHITECTURE)
    with pytest.raises(ValueError, match="has 300 entries, the backbone 299 embeddings"):
        check_vocabulary(dataset, ARCHITECTURE.model_copy(update={"vocab_size": 299}))


@pytest.mark.parametrize("place", ["model", "tokenizer"], ids=["in the model's directory", "beside it"])
def test_tokenizers_are_compared_by_vocabulary(data: Path, model: Path, place: str) -> None:
    check_tokenizer(data, str(model))  # no tokenizer, nothing to compare
    directory = model.parent / place
    shutil.copytree(data / "tokenizer", directory, dirs_exist_ok=True)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_tokens(["a larger vocabulary"])
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    check_tokenizer(data, str(model))  # other bytes, the same ids
    other_tokenizer(data, directory, "e", "t")
    with pytest.raises(ValueError, match="2 of 300 tokens differ") as caught:
        check_tokenizer(data, str(model))
    for name in (str(data), str(model), "'e'"):
        assert name in str(caught.value)


def vocabulary_of(data: Path) -> tuple[list[str], list[str]]:
    content = json.loads((data / "tokenizer/tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    return sorted(vocabulary, key=vocabulary.__getitem__), [" ".join(m) for m in content["model"]["merges"]]


def test_a_gguf_file_brings_its_vocabulary(data: Path, tmp_path: Path) -> None:
    tokens, merges = vocabulary_of(data)
    lm = BaseLM(ARCHITECTURE, 0).lm
    write_gguf(tmp_path / "same.gguf", ARCHITECTURE, lm.state_dict(), tokens, merges)
    check_tokenizer(data, str(tmp_path / "same.gguf"))
    tokens[40] = "elsewhere"
    write_gguf(tmp_path / "other.gguf", ARCHITECTURE, lm.state_dict(), tokens, merges)
    with pytest.raises(
        ValueError, match=r"1 of 300 tokens differ, the first being id 40, .*not a token there"
    ):
        check_tokenizer(data, str(tmp_path / "other.gguf"))


def test_a_gguf_file_becomes_a_directory_with_model_and_tokenizer(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    lm = BaseLM(ARCHITECTURE, 0).eval().lm
    write_gguf(tmp_path / "m.gguf", ARCHITECTURE, lm.state_dict(), *vocabulary_of(data))
    destination = tmp_path / "converted"
    assert convert([str(tmp_path / "m.gguf"), str(destination), "--to", "huggingface"]) == 0
    loaded = BaseLM.from_pretrained(destination, 0)
    ids = torch.randint(300, (1, 12))
    assert torch.equal(loaded.lm(ids).logits, lm(ids).logits)
    check_tokenizer(data, str(destination))

    # Token shards can be built with it, and hold the same ids.
    ours = load_tokenizer(data)
    config = DataConfig.model_validate(
        {
            "directory": str(tmp_path / "shards"),
            "source": {"kind": "jsonl", "paths": str(data.parent / "documents.jsonl")},
            "tokenizer": {"kind": "pretrained", "path": str(destination)},
            "sample_length": 64,
        }
    )
    build(config, num_workers=1)
    theirs = load_tokenizer(tmp_path / "shards")
    text = "The old harbour follows a map, in 2024."
    assert theirs(text)["input_ids"] == ours(text)["input_ids"]
    assert (theirs.eos_token, theirs.bos_token) == ("<|endoftext|>", "<|pad|>")  # ids 0 and 1 in the file

    assert convert([str(tmp_path / "m.gguf"), str(destination), "--to", "huggingface"]) == 2
    assert "is not empty" in capsys.readouterr().err
    # A directory in that layout is copied, as the model that the others are compared with.
    assert convert([str(destination), str(tmp_path / "base_lm"), "--to", "huggingface"]) == 0
    assert torch.equal(BaseLM.from_pretrained(tmp_path / "base_lm", 0).lm(ids).logits, lm(ids).logits)
    (tmp_path / "base_lm/model.safetensors").unlink()
    assert convert([str(tmp_path / "base_lm"), str(tmp_path / "x"), "--to", "huggingface"]) == 2
    assert "no *.safetensors files" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_training_does_not_begin(
    data: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other_tokenizer(data, model, "e", "t")
    config = {
        "name": "refused",
        "run_root": str(tmp_path / "runs"),
        "data": {
            "directory": str(data),
            "sample_length": 64,
            "tokenizer": {"kind": "bpe", "vocab_size": 300},
        },
        "codec": {"backbone": {"architecture": ARCHITECTURE.model_dump(), "pretrained": str(model)}},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    monkeypatch.setattr(train, "start_process_group", lambda: (0, 1, torch.device("cpu")))
    arguments = ["--config", str(tmp_path / "run.yaml"), "--stage", "rqvae"]
    assert train.main(arguments) == 2
    assert "2 of 300 tokens differ" in capsys.readouterr().err
    # Nothing but what says so.
    assert {path.name for path in (tmp_path / "runs/refused/rqvae").iterdir()} == {"LOCK", "STATUS"}
    assert "2 of 300 tokens differ" in (tmp_path / "runs/refused/rqvae/STATUS").read_text()
    assert train.main([*arguments, "codec.backbone.architecture.vocab_size=299"]) == 2
    assert sys.modules["torch"].distributed.is_initialized() is False
