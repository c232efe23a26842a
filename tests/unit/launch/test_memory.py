"""The closed forms of memory against what autograd keeps and what DeepSpeed allocates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from launch import memory
from launch.config import TrainConfig
from launch.engine import recompute_activations
from rqvae import RQVAE, FlatTransformer, RQTransformer
from rqvae.config import ArchitectureConfig, RQTransformerConfig, RQVAEConfig

LENGTH = 64


def kept_bytes(model: nn.Module, call: Callable[[], object]) -> int:
    """Bytes that autograd keeps for the backward pass, weights and constants aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # an address may not be used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        alive.append(call())  # type: ignore[arg-type]
    return sum(kept.values())


def architecture(model_type: str) -> ArchitectureConfig:
    return ArchitectureConfig(
        model_type=model_type,  # type: ignore[arg-type]
        vocab_size=64,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )


@pytest.mark.parametrize("is_trained", [True, False], ids=["full", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
def test_activations_of_the_codec(model_type: str, dtype: torch.dtype, is_trained: bool) -> None:
    config = RQVAEConfig.model_validate(
        {
            "backbone": {"architecture": architecture(model_type)},
            "codebook_levels": 2,
            "codebook_size": 16,
            "codebook_dim": 8,
            "latent_dim": 64,
            "latent_head_dim": 32,
            "num_latent_layers": 2,
        }
    )
    model = RQVAE(config).to(dtype)
    for parameter in model.backbone_parameters():
        parameter.requires_grad_(is_trained)
    ids = torch.randint(64, (2, LENGTH))
    measured = kept_bytes(model, lambda: model(ids, quantize=False))
    expected = 2 * LENGTH * memory.codec(config, LENGTH, dtype.itemsize, is_trained, recompute=False)
    assert expected == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("is_trained", [True, False], ids=["full", "frozen"])
def test_recomputation_keeps_less_and_changes_nothing(is_trained: bool) -> None:
    config = RQVAEConfig.model_validate(
        {
            "backbone": {"architecture": architecture("qwen3")},
            "latent_dim": 64,
            "latent_head_dim": 32,
            "codebook_size": 16,
        }
    )
    ids = torch.randint(64, (2, LENGTH))
    gradients, kept = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = RQVAE(config).train()
        for parameter in model.backbone_parameters():
            parameter.requires_grad_(is_trained)
        if recompute:
            recompute_activations(model)
        kept.append(kept_bytes(model, lambda model=model: model(ids)))  # type: ignore[misc]
        model(ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    assert gradients[0].keys() == gradients[1].keys()
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("model_class", [RQTransformer, FlatTransformer])
def test_activations_of_the_latent_model(
    model_class: type[RQTransformer] | type[FlatTransformer],
) -> None:
    config = RQTransformerConfig(
        spatial_dim=64,
        spatial_layers=3,
        depth_dim=32,
        depth_layers=2,
        head_dim=32,
        compression_factor=4,
        codebook_levels=4,
        codebook_size=16,
    )
    model = model_class(config)
    codes = torch.randint(16, (2, LENGTH // 4, 4))
    measured = kept_bytes(model, lambda: model(codes))
    expected = 2 * LENGTH * memory.latent_model(model_class.__name__, config, LENGTH, 4, recompute=False)
    assert expected == pytest.approx(measured, rel=0.15)


def test_model_states_by_zero_stage() -> None:
    model = nn.Sequential(nn.Linear(100, 50), nn.Linear(50, 7, bias=False))
    model[0].requires_grad_(False)
    total, trained = 5050 + 350, 350

    def states(stage: int, width: int, **changes: object) -> memory.Memory:
        train = TrainConfig.model_validate({"zero_stage": stage, "param_persistence_threshold": 0} | changes)
        return memory.memory(memory.Parameters.of(model, train, 2), train, width, 0.0, 0.0)

    assert states(0, 4).states == 4 * total + (4 + 8) * trained
    assert states(1, 2).states == 2 * total + 4 * trained + 12 * trained / 2
    assert states(2, 2).states == 2 * total + (4 + 12) * trained / 2
    assert states(3, 2).states == 2 * total / 2 + (4 + 12) * trained / 2
    assert states(3, 4).states == 4 * total / 2 + (4 + 12) * trained / 2
    assert states(3, 2).gathered == states(3, 2).prefetched == 2 * total
    limited = states(3, 2, communication={"prefetch_bucket_size": 100, "max_live_parameters": 5200})
    assert (limited.gathered, limited.prefetched) == (2 * 5200, 2 * 5050)  # a module comes whole
    alone = memory.Parameters.of(model, TrainConfig(), 1)
    assert memory.memory(alone, TrainConfig(), 2, 0.0, 0.0).gathered == 0
    assert states(3, 2, communication={"reduce_bucket_size": 300}).bucket == 2 * 300
    assert states(3, 2).reduction == 2 * trained
    assert states(3, 2, param_persistence_threshold=400).weights == 2 * (total / 2 + 350 + 50)
    offloaded = states(3, 2, offload_optimizer="cpu", offload_param="cpu")
    assert offloaded.states == 0
    assert offloaded.host == states(3, 2).states


def test_soft_targets_by_what_autograd_keeps_more() -> None:
    config = RQTransformerConfig(
        spatial_dim=32,
        spatial_layers=1,
        depth_dim=32,
        depth_layers=1,
        head_dim=32,
        compression_factor=4,
        codebook_levels=4,
        codebook_size=256,
    )
    model = RQTransformer(config)
    codes = torch.randint(256, (2, LENGTH // 4, 4))
    targets = [torch.rand(2, LENGTH // 4, 256).softmax(-1) for _ in range(4)]
    more = kept_bytes(model, lambda: model(codes, soft_targets=targets)) - kept_bytes(
        model, lambda: model(codes)
    )
    # Without soft targets the gradients of the heads' weights are formed, and kept, in the forward pass.
    more += sum(model.head(level).weight.nbytes for level in range(4))
    assert memory.soft_targets(config) * 2 * LENGTH == pytest.approx(more, rel=0.15)
