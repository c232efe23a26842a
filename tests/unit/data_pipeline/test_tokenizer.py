from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_pipeline import load_tokenizer
from data_pipeline.config import BPETokenizerConfig, PretrainedTokenizerConfig
from data_pipeline.errors import NotADatasetError, SourceError
from data_pipeline.tokenizer import DocumentTokenizer, copy_pretrained, save_bpe, train_bpe

TEXTS = ["the shape of the tensor is the shape of the matrix"] * 20 + ["déjà vu naïve 模型 🙂"] * 5


def save(directory: Path, vocab_size: int = 280) -> DocumentTokenizer:
    save_bpe(train_bpe(TEXTS, BPETokenizerConfig(vocab_size=vocab_size)), directory)
    return DocumentTokenizer(directory)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> DocumentTokenizer:
    return save(tmp_path_factory.mktemp("tokenizer") / "bpe")


def test_training_is_deterministic_and_loads_with_transformers(tmp_path: Path) -> None:
    one, other = save(tmp_path / "one"), save(tmp_path / "other")
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "other/tokenizer.json").read_bytes()
    assert one.sha256 == other.sha256
    loaded = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert (loaded.eos_token, loaded.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert (loaded.eos_token_id, loaded.pad_token_id) == (0, 1)
    assert len(loaded) == one.vocab_size == 280
    text = "A naïve  模型,\n\twith 🙂 and  spaces "
    assert loaded.decode(loaded(text)["input_ids"]) == text


def test_every_document_ends_in_one_end_of_text_token(tokenizer: DocumentTokenizer) -> None:
    text = "it says <|endoftext|> and <|pad|>"
    (document,) = tokenizer.encode([text])
    assert document.tokens[-1] == tokenizer.eos_token_id
    assert not {0, 1} & set(document.tokens[:-1].tolist())
    assert document.num_bytes == len(text)


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("abthe é模🙂\n\u0301ﬁ́ "), max_size=60))
@pytest.mark.parametrize("normalise", [False, True])
def test_bytes_before_adds_up_to_the_original_text(
    tokenizers_by_normaliser: dict[bool, DocumentTokenizer], normalise: bool, text: str
) -> None:
    (document,) = tokenizers_by_normaliser[normalise].encode([text])
    boundaries = [document.bytes_before(position) for position in range(len(document.tokens) + 1)]
    assert boundaries == sorted(boundaries)
    assert boundaries[0] == 0
    assert boundaries[-1] == boundaries[-2] == document.num_bytes == len(text.encode())


@pytest.fixture(scope="module")
def tokenizers_by_normaliser(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, DocumentTokenizer]:
    """Byte-level BPE without merges that make characters whole; with and without NFC."""
    found = {}
    for normalise in (False, True):
        directory = tmp_path_factory.mktemp("normalise") / "tokenizer"
        trained = train_bpe(TEXTS, BPETokenizerConfig(vocab_size=270))
        if normalise:
            trained.normalizer = normalizers.NFC()
        save_bpe(trained, directory)
        found[normalise] = DocumentTokenizer(directory)
    return found


def test_bytes_of_a_character_of_several_tokens_count_with_the_first(tokenizer: DocumentTokenizer) -> None:
    (document,) = tokenizer.encode(["a" + "ﷺ"])  # three bytes that no merge joins
    assert [document.bytes_before(position) for position in range(6)] == [0, 1, 4, 4, 4, 4]


def test_too_little_text_for_the_vocabulary_is_refused() -> None:
    with pytest.raises(SourceError, match="smaller vocabulary"):
        train_bpe(["a few words"], BPETokenizerConfig(vocab_size=4096))


def word_tokenizer(directory: Path, **special: str) -> None:
    raw = Tokenizer(
        models.WordLevel({"<unk>": 0, "</s>": 1, "<pad>": 2, "a": 3, "<eod>": 4}, unk_token="<unk>")
    )
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.decoder = decoders.WordPiece()
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(directory)


def test_a_pretrained_tokenizer_is_copied_with_its_special_tokens_settled(tmp_path: Path) -> None:
    word_tokenizer(tmp_path / "source", eos_token="</s>", pad_token="<pad>")
    copy_pretrained(PretrainedTokenizerConfig(path=str(tmp_path / "source")), tmp_path / "copy")
    copied = DocumentTokenizer(tmp_path / "copy")
    assert (copied.eos_token_id, copied.pad_token_id, copied.vocab_size) == (1, 2, 5)
    assert copied.encode(["a"])[0].tokens.tolist() == [3, 1]

    config = PretrainedTokenizerConfig(path=str(tmp_path / "source"), eos_token="<eod>")
    copy_pretrained(config, tmp_path / "other")
    other = DocumentTokenizer(tmp_path / "other")
    assert other.eos_token_id == 4
    assert other.sha256 != copied.sha256


def test_without_a_pad_token_the_end_of_text_token_pads(tmp_path: Path) -> None:
    word_tokenizer(tmp_path / "source", eos_token="</s>")
    copy_pretrained(PretrainedTokenizerConfig(path=str(tmp_path / "source")), tmp_path / "copy")
    assert DocumentTokenizer(tmp_path / "copy").pad_token_id == 1


def test_unusable_pretrained_tokenizers_are_refused(tmp_path: Path) -> None:
    word_tokenizer(tmp_path / "source")
    with pytest.raises(SourceError, match=r"name one in tokenizer\.eos_token"):
        copy_pretrained(PretrainedTokenizerConfig(path=str(tmp_path / "source")), tmp_path / "copy")
    with pytest.raises(SourceError, match="'<end>' is not a token"):
        config = PretrainedTokenizerConfig(path=str(tmp_path / "source"), eos_token="<end>")
        copy_pretrained(config, tmp_path / "copy")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="no tokenizer can be loaded"):
        copy_pretrained(PretrainedTokenizerConfig(path=str(tmp_path / "empty")), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_truncation_and_padding_of_the_source_do_not_apply(tmp_path: Path) -> None:
    save(tmp_path / "bpe")
    path = tmp_path / "bpe/tokenizer.json"
    values = json.loads(path.read_text())
    values["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(values))
    assert len(DocumentTokenizer(tmp_path / "bpe").encode(["z" * 50])[0].tokens) == 51


def test_the_tokenizer_of_a_dataset(built: Path, tmp_path: Path) -> None:
    assert load_tokenizer(built).eos_token_id == 0
    with pytest.raises(NotADatasetError, match="no tokenizer here"):
        load_tokenizer(tmp_path)
