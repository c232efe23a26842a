"""Samples beside what the codec makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from launch.config import load_config
from launch.reconstructions import predictions_of, reconstruction
from rqvae import RQVAE

NANO = Path(__file__).parents[2] / "integration/nano.yaml"


def test_predictions_are_the_most_likely_tokens_of_every_pass() -> None:
    torch.manual_seed(0)
    codec = RQVAE(load_config(NANO).codec).eval()
    ids = torch.randint(320, (3, 64))
    with torch.no_grad(), predictions_of(codec.decoder.head) as found:
        out = codec(ids)
    expected = codec.decode(out.codes).argmax(-1)
    assert torch.equal(found[0].view(3, 64), expected)
    assert torch.equal((expected == ids), out.correct)
    codec(ids)
    with predictions_of(None) as nothing:
        codec(ids)
    assert len(found) == 1  # nobody looks any more
    assert nothing == []


def test_wrong_tokens_are_marked() -> None:
    words = {"a": 0, "b": 1, "c": 2, "d": 3}
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a"))
    )
    found = reconstruction(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 3, 2, 0]), tokenizer)
    assert found.text.split() == ["a", "b", "c", "d"]
    assert found.marked == "a[b|d]c[d|a]"
    assert (found.num_tokens, found.num_wrong) == (4, 2)
    right = reconstruction(torch.tensor([2, 1]), torch.tensor([2, 1]), tokenizer)
    assert right.marked == right.text
