"""Data and model must mean the same by a token id: checked where they meet, before anything is trained."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from data_pipeline import TokenDataset
from rqvae.backbone import PretrainedLM
from rqvae.config import ArchitectureConfig


def check_vocabulary(dataset: TokenDataset, architecture: ArchitectureConfig) -> None:
    """Every token id of the data has an embedding.

    Raises:
        ValueError: the data have more entries than the model.
    """
    if dataset.vocab_size > architecture.vocab_size:
        raise ValueError(
            f"the tokenizer of the token shards in '{dataset.directory}' has {dataset.vocab_size} entries, the "
            f"backbone {architecture.vocab_size} embeddings (codec.backbone.architecture.vocab_size). Build the "
            "shards with the backbone's tokenizer, or choose an architecture with a larger vocabulary"
        )


def check_tokenizer(data_directory: str | Path, source: str) -> None:
    """The tokens of the data have the ids that the pretrained model was trained with.

    Vocabularies are compared, not files, which differ with library versions. The model's may be larger. A model
    without a tokenizer passes.

    Args:
        data_directory: directory of the token shards.
        source: see `PretrainedLM`.

    Raises:
        ValueError: a token has another id in the model, or none.
    """
    theirs = PretrainedLM(source).vocabulary()
    if theirs is None:
        return
    ours = Tokenizer.from_file(str(Path(data_directory) / "tokenizer" / "tokenizer.json")).get_vocab()
    differing = sorted((index, token) for token, index in ours.items() if theirs.get(token) != index)
    if not differing:
        return
    index, token = differing[0]
    there = f"there it has id {theirs[token]}" if token in theirs else "which is not a token there"
    raise ValueError(
        f"the token shards in '{data_directory}' were made with another tokenizer than that of the pretrained "
        f"backbone '{source}': {len(differing)} of {len(ours)} tokens differ, the first being id {index}, "
        f"{token!r}, {there}. Build shards with data.tokenizer={{kind: pretrained, path: DIRECTORY}} of that "
        "model (launch/convert_checkpoint.py --to huggingface writes one from a GGUF file), or set "
        "codec.backbone.pretrained to a model with the data's tokenizer"
    )
