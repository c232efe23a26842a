"""The tokenizer of a shard directory: trained for it, or copied from a pretrained model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from data_pipeline.config import BPETokenizerConfig, PretrainedTokenizerConfig
from data_pipeline.errors import NotADatasetError, SourceError
from data_pipeline.files import save_once, sha256_file, sha256_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS_TOKEN = "<|endoftext|>"  # noqa: S105
PAD_TOKEN = "<|pad|>"  # noqa: S105


class EncodedDocument(NamedTuple):
    """One document as token ids, the end-of-text token last.

    tokens: [n] int64.
    num_bytes: UTF-8 bytes of the text.
    """

    tokens: NDArray[np.int64]
    num_bytes: int
    text: str
    encoding: Encoding

    def bytes_before(self, position: int) -> int:
        """Bytes of the original text that the tokens before `position` cover.

        By the offsets into the original text, so normalisation does not count; a character that is spread
        over several tokens counts with the first of them.
        """
        if position >= len(self.tokens) - 1:
            return self.num_bytes
        if position == 0:
            return 0
        characters = self.encoding.token_to_chars(position - 1)
        if characters is None:  # a token that the tokenizer added by itself stands for no text
            return self.bytes_before(position - 1)
        return len(self.text[: characters[1]].encode())


class DocumentTokenizer:
    """Turns documents into token ids in batches, on all cores.

    Special tokens that are spelt out in a text are read as plain text, so that only the end of a document is
    an end-of-text token.

    Args:
        directory: written by `save_bpe` or `copy_pretrained`.

    Attributes:
        vocab_size: token ids are below it.
        sha256: hash of everything that decides the ids.
    """

    def __init__(self, directory: Path) -> None:
        # without transformers, which takes seconds to load a large vocabulary, once for every process
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        special = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self.eos_token_id = vocabulary[special["eos_token"]]
        self.pad_token_id = vocabulary[special["pad_token"]]
        self.vocab_size = max(vocabulary.values()) + 1
        self.sha256 = tokenizer_hash(directory, self.eos_token_id, self.pad_token_id)

    def encode(self, texts: list[str]) -> list[EncodedDocument]:
        """All texts, in order."""
        documents = []
        for text, encoding in zip(
            texts, self._tokenizer.encode_batch(texts, add_special_tokens=False), strict=True
        ):
            ids = encoding.ids
            ids.append(self.eos_token_id)
            num_bytes = len(text) if text.isascii() else len(text.encode())
            documents.append(EncodedDocument(np.array(ids, dtype=np.int64), num_bytes, text, encoding))
        return documents


def tokenizer_hash(directory: Path, eos_token_id: int, pad_token_id: int) -> str:
    """Hash of what decides the ids. `tokenizer_config.json` is left out: it names library versions."""
    return sha256_json([sha256_file(directory / "tokenizer.json"), eos_token_id, pad_token_id])


def load_fast_tokenizer(directory: str | Path) -> PreTrainedTokenizerFast:
    """The transformers tokenizer in `directory`, checked to be a fast one with an end and a pad token."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
    except (OSError, ValueError) as error:
        raise SourceError(f"no tokenizer can be loaded from {str(directory)!r}: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise SourceError(
            f"the tokenizer in {str(directory)!r} has no fast version (a tokenizer.json), which is needed"
        )
    return tokenizer


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerFast:
    """The transformers fast tokenizer of a token shard directory; `eos_token_id` and `pad_token_id` are set.

    Raises:
        NotADatasetError: the directory holds no tokenizer.
    """
    folder = Path(directory) / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        raise NotADatasetError(
            f"{directory}: no tokenizer here; build the token shards first: python -m data_pipeline build"
        )
    return load_fast_tokenizer(folder)


def train_bpe(texts: Iterable[str], config: BPETokenizerConfig) -> Tokenizer:
    """A byte-level BPE of exactly `config.vocab_size` entries, a pure function of the texts.

    Raises:
        SourceError: the texts hold too few different words for that many entries.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[EOS_TOKEN, PAD_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise SourceError(
            f"the text gives only {tokenizer.get_vocab_size()} tokens of the tokenizer.vocab_size "
            f"{config.vocab_size} asked for: use more text or a smaller vocabulary"
        )
    return tokenizer


def pretrained_identity(config: PretrainedTokenizerConfig) -> str:
    """Tells one tokenizer from another without loading it: its bytes, or where it has none here its name."""
    path = Path(config.path) / "tokenizer.json"
    return sha256_file(path) if path.is_file() else config.path


def save_bpe(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes a trained tokenizer so that `AutoTokenizer.from_pretrained` loads it."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        clean_up_tokenization_spaces=False,
    )
    save_once(fast.save_pretrained, directory)


def copy_pretrained(config: PretrainedTokenizerConfig, directory: Path) -> None:
    """Copies a pretrained tokenizer, with its end-of-text token settled.

    A tokenizer without a pad token takes the end-of-text token for it: padding is known by `document_ids`,
    never by the id.

    Raises:
        SourceError: nothing to load there, or it has no end-of-text token.
    """
    tokenizer = load_fast_tokenizer(config.path)
    if config.eos_token is not None:
        if config.eos_token not in tokenizer.get_vocab():
            raise SourceError(f"tokenizer.eos_token: {config.eos_token!r} is not a token of {config.path!r}")
        tokenizer.eos_token = config.eos_token
    if tokenizer.eos_token_id is None:
        raise SourceError(
            f"the tokenizer {config.path!r} has no end-of-sequence token: name one in tokenizer.eos_token"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    save_once(tokenizer.save_pretrained, directory)
