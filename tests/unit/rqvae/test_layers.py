from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rqvae.layers import TransformerBlock, causal_document_mask, positions_in_documents
from rqvae.resample import Downsample, Upsample

DOCUMENTS = torch.tensor([[0, 1, 1, 2, 2, 2, 0, 0], [5, 5, 5, 5, 0, 6, 6, 6]])


def make_block(**changes: object) -> TransformerBlock:
    torch.manual_seed(0)
    values = {"dim": 32, "num_layers": 2, "head_dim": 16, "mlp_ratio": 2.0, "rope_theta": 1e4}
    block = TransformerBlock(**values | changes).double()  # type: ignore[arg-type]
    for parameter in block.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return block.eval()


def test_positions_count_from_the_start_of_every_document() -> None:
    assert positions_in_documents(DOCUMENTS).tolist() == [[0, 0, 1, 0, 1, 2, 0, 1], [0, 1, 2, 3, 0, 0, 1, 2]]
    assert positions_in_documents(DOCUMENTS[:, :0]).shape == (2, 0)


def test_mask_allows_earlier_elements_of_the_same_document_and_nothing_else() -> None:
    mask = causal_document_mask(DOCUMENTS, DOCUMENTS)
    assert mask.shape == (2, 1, 8, 8)
    for row, documents in enumerate(DOCUMENTS.tolist()):
        for query in range(8):
            for key in range(8):
                allowed = key <= query and documents[key] == documents[query]
                assert bool(mask[row, 0, query, key]) == allowed


def test_mask_of_the_last_queries_is_the_end_of_the_full_mask() -> None:
    full = causal_document_mask(DOCUMENTS, DOCUMENTS)
    assert torch.equal(causal_document_mask(DOCUMENTS[:, -3:], DOCUMENTS), full[:, :, -3:])


def test_attention_depends_on_relative_positions_only() -> None:
    block = make_block()
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    positions = torch.arange(6)[None]
    shifted = block(x, positions + 17)
    # Angles are formed in fp32, hence the tolerance.
    torch.testing.assert_close(block(x, positions), shifted, atol=1e-4, rtol=0)
    assert not torch.allclose(block(x, positions), block(x, positions * 2), atol=1e-2)


def test_block_without_mask_is_causal() -> None:
    block = make_block()
    x = torch.randn(1, 6, 32, dtype=torch.float64)
    before = block(x, torch.arange(6)[None])
    changed = x.clone()
    changed[:, 3] = torch.randn(32)
    after = block(changed, torch.arange(6)[None])
    torch.testing.assert_close(before[:, :3], after[:, :3], atol=1e-12, rtol=0)
    assert ((before - after)[:, 3:].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("sizes", [[8], [1] * 8, [3, 1, 4], [2, 6]])
def test_cached_block_equals_one_pass(sizes: list[int]) -> None:
    block = make_block()
    x = torch.randn(2, 8, 32, dtype=torch.float64)
    positions = positions_in_documents(DOCUMENTS)
    expected = block(x, positions, causal_document_mask(DOCUMENTS, DOCUMENTS))
    cache = block.new_cache(2, 8, x)
    parts, start = [], 0
    for size in sizes:
        end = start + size
        mask = causal_document_mask(DOCUMENTS[:, start:end], DOCUMENTS[:, :end])
        parts.append(block(x[:, start:end], positions[:, start:end], mask, cache))
        start = end
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-12, rtol=0)


def test_cache_without_mask_equals_one_pass_and_can_be_reused() -> None:
    block = make_block()
    cache = block.new_cache(2, 5, torch.zeros((), dtype=torch.float64))
    positions = torch.arange(5)[None]
    for _ in range(2):
        x = torch.randn(2, 5, 32, dtype=torch.float64)
        cache.reset()
        parts = [block(x[:, :2], positions[:, :2], None, cache)]
        parts += [block(x[:, i : i + 1], positions[:, i : i + 1], None, cache) for i in range(2, 5)]
        torch.testing.assert_close(torch.cat(parts, dim=1), block(x, positions), atol=1e-12, rtol=0)


def test_cache_refuses_what_it_would_compute_wrongly() -> None:
    block = make_block()
    x = torch.randn(1, 2, 32, dtype=torch.float64)
    cache = block.new_cache(1, 3, x)
    block(x, torch.arange(2)[None], None, cache)
    with pytest.raises(ValueError, match="needs a mask"):
        block(x, torch.arange(2, 4)[None], None, cache)
    with pytest.raises(ValueError, match="holds 3 positions, 4 needed"):
        documents = torch.ones(1, 4, dtype=torch.long)
        block(x, torch.arange(2, 4)[None], causal_document_mask(documents[:, :2], documents), cache)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    block = make_block().train()
    x = torch.randn(2, 8, 32, dtype=torch.float64, requires_grad=True)
    mask = causal_document_mask(DOCUMENTS, DOCUMENTS)
    gradients = []
    for checkpointing in (False, True):
        block.gradient_checkpointing = checkpointing
        block.zero_grad()
        x.grad = None
        block(x, positions_in_documents(DOCUMENTS), mask).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in block.parameters())])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_resampling_is_the_strided_convolution(factor: int) -> None:
    torch.manual_seed(0)
    down, up = Downsample(6, 5, factor).double(), Upsample(5, 6, factor).double()
    x = torch.randn(2, 8, 6, dtype=torch.float64)
    kernel = down.proj.weight.view(5, factor, 6).transpose(1, 2)
    expected = F.conv1d(x.transpose(1, 2), kernel, down.proj.bias, stride=factor).transpose(1, 2)
    latents = down(x)
    torch.testing.assert_close(latents, expected)
    kernel = up.proj.weight.view(factor, 6, 5).permute(2, 1, 0)
    expected = F.conv_transpose1d(latents.transpose(1, 2), kernel, stride=factor).transpose(1, 2)
    torch.testing.assert_close(up(latents), expected + up.proj.bias.view(factor, 6).repeat(8 // factor, 1))
