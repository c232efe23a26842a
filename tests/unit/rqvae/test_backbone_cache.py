"""The cache of a Hugging Face backbone beside the library's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from rqvae.backbone import build_backbone
from rqvae.backbone_cache import new_backbone_cache
from tests.unit.rqvae.conftest import randomize

Make = Callable[..., Any]


def test_it_holds_what_the_librarys_own_holds(make_architecture: Make, tokens: Make) -> None:
    backbone = build_backbone(make_architecture(), with_embeddings=True).eval()
    randomize(backbone, 0)
    ids = tokens(3, 9)
    ours, theirs = new_backbone_cache(backbone.config, 9), DynamicCache(config=backbone.config)
    addresses = set()
    with torch.inference_mode():
        for part in (slice(0, 4), slice(4, 5), slice(5, 8)):
            states = [
                backbone(input_ids=ids[:, part], past_key_values=cache, use_cache=True).last_hidden_state
                for cache in (ours, theirs)
            ]
            assert torch.equal(*states)
            addresses.add(ours.layers[1].keys.data_ptr())
        assert len(addresses) == 1  # nothing has been copied
        rows = torch.tensor([2, 0])
        for cache in (ours, theirs):
            cache.reorder_cache(rows)
        states = [
            backbone(input_ids=ids[rows, 8:], past_key_values=cache, use_cache=True).last_hidden_state
            for cache in (ours, theirs)
        ]
        assert torch.equal(*states) and len(states[0]) == 2
        with pytest.raises(ValueError, match="the cache holds 9 positions, 10 needed"):
            backbone(input_ids=ids[rows, :1], past_key_values=ours, use_cache=True)
