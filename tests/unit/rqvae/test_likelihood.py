from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rqvae import latent_bound
from rqvae.encoder import chunk_documents

Make = Callable[..., Any]


def test_the_terms_are_those_of_the_two_models(
    make_codec: Make, make_latent_model: Make, packed: Any
) -> None:
    codec, latent_model = make_codec(), make_latent_model()
    bound = latent_bound(codec, latent_model, *packed)
    real = packed.document_ids > 0
    chunks = chunk_documents(packed.document_ids, 4)
    codes = codec.encode(packed.input_ids, document_ids=packed.document_ids)
    assert torch.equal(bound.codes, codes)
    token_nats = F.cross_entropy(
        codec.decode(codes, chunks).transpose(1, 2), packed.input_ids, reduction="none"
    )
    torch.testing.assert_close(bound.token_nats.double(), token_nats * real, atol=1e-5, rtol=1e-5)
    logits = latent_model(codes, document_ids=chunks, return_logits=True).logits
    for level in range(3):
        code_nats = F.cross_entropy(logits[level].transpose(1, 2), codes[..., level], reduction="none")
        torch.testing.assert_close(
            bound.code_nats[..., level].double(), code_nats * (chunks > 0), atol=1e-5, rtol=1e-5
        )
    assert not bound.token_correct[~real].any()
    assert not bound.code_nats.requires_grad
    assert not bound.token_nats.requires_grad


@pytest.mark.parametrize("spatial_input", ["codes", "tokens", "both"])
def test_packing_changes_no_document_s_likelihood(
    make_codec: Make, make_latent_model: Make, packed: Any, spatial_input: str
) -> None:
    vocabulary = None if spatial_input == "codes" else 97
    codec = make_codec()
    latent_model = make_latent_model(spatial_input=spatial_input, vocab_size=vocabulary)
    whole = latent_bound(codec, latent_model, *packed)
    for row in range(2):
        for number in range(1, int(packed.document_ids[row].max()) + 1):
            places = (packed.document_ids[row] == number).nonzero().flatten()
            start, end = int(places[0]) // 4 * 4, -(-(int(places[-1]) + 1) // 4) * 4
            ids, documents = (t[row : row + 1, start:end] for t in packed)
            alone = latent_bound(codec, latent_model, ids, (documents == number).long())
            torch.testing.assert_close(
                alone.code_nats[0], whole.code_nats[row, start // 4 : end // 4], atol=1e-5, rtol=1e-5
            )
            torch.testing.assert_close(
                alone.token_nats[0], whole.token_nats[row, start:end], atol=1e-5, rtol=1e-5
            )


def test_the_bound_is_not_below_the_exact_likelihood(
    make_codec: Make, make_architecture: Make, make_latent_model: Make
) -> None:
    """With 3 codes and 2 latents all 9 code sequences can be summed up, over all 25 texts of 2 tokens."""
    shape = {"compression_factor": 1, "codebook_levels": 1, "codebook_size": 3}
    codec = make_codec(**shape, seed=3)
    latent_model = make_latent_model(**shape)
    texts = torch.tensor(list(itertools.product(range(90, 95), repeat=2)))
    sequences = torch.tensor(list(itertools.product(range(3), repeat=2)))[..., None]
    prior = -latent_model(sequences).nats.double().sum((1, 2))  # [9]
    assert prior.logsumexp(0).item() == pytest.approx(0, abs=1e-5)
    log_probabilities = codec.decode(sequences).log_softmax(-1)  # [9, 2, V]
    given_codes = sum(log_probabilities[:, place, texts[:, place]] for place in range(2))  # [9, 25]
    exact = -(prior[:, None] + given_codes).logsumexp(0)
    bound = latent_bound(codec, latent_model, texts, torch.ones_like(texts))
    total = bound.code_nats.sum((1, 2)).double() + bound.token_nats.sum(1).double()
    assert (total >= exact - 1e-5).all()
    assert (total - exact).max() > 0.1  # and it is a bound, not the likelihood
