"""Parameter groups, their learning rates, and the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from launch.config import TrainConfig

if TYPE_CHECKING:  # it picks its accelerator on import, which `launch.engine` prepares
    import deepspeed

    from launch.task import Phase

# Their order is that of the groups in checkpoints.
_KINDS = ("_no_decay", "", "_muon")


def learning_rate_factor(train: TrainConfig, step: int) -> float:
    """Learning rate over its peak at a step: linear warm-up, then the schedule."""
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    low = train.min_learning_rate_ratio
    if train.schedule == "constant":
        return 1.0
    if train.schedule == "cosine":
        done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    decay_steps = max(1, round(train.wsd_decay_fraction * train.steps))
    return low + (1 - low) * min(1.0, (train.steps - step) / decay_steps)


def parameter_groups(
    model: nn.Module, backbone: Iterable[nn.Parameter], train: TrainConfig
) -> list[dict[str, Any]]:
    """Groups of all trainable parameters: backbone or new, with or without weight decay, by Muon or AdamW.

    Matrices decay; norms, biases, embeddings and single vectors do not. Muon takes the weights of `nn.Linear`: no
    output head is one.
    """
    backbone_ids = {id(parameter) for parameter in backbone}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    hidden = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    by_muon = hidden if train.optimizer == "muon" else set()
    groups: dict[tuple[bool, int], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Under ZeRO-3 a parameter may be in parts already, with its shape kept aside.
            decays = (
                len(getattr(parameter, "ds_shape", parameter.shape)) > 1 and id(parameter) not in embeddings
            )
            kind = "_muon" if id(parameter) in by_muon else "" if decays else "_no_decay"
            groups.setdefault((id(parameter) in backbone_ids, _KINDS.index(kind)), []).append(parameter)
    return [
        {
            "name": ("backbone" if is_backbone else "new") + _KINDS[kind],
            "params": parameters,
            "weight_decay": 0.0 if _KINDS[kind] == "_no_decay" else train.weight_decay,
        }
        for (is_backbone, kind), parameters in sorted(groups.items())
    ]


def create_optimizer(groups: list[dict[str, Any]], train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, on the CPU for an offloaded state, or Muon with it."""
    adam = {"lr": train.learning_rate, "betas": (train.beta1, train.beta2)}
    adam_class: Any
    if train.offload_optimizer == "none":
        adam_class, options = torch.optim.AdamW, {"fused": True}
    else:
        # It updates the fp32 shards where they are, with vector instructions and without a copy to the GPU.
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        adam_class, options = DeepSpeedCPUAdam, {"adamw_mode": True}
    if train.optimizer == "adamw":
        return adam_class(groups, **adam, **options)
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for group in groups:
        group["use_muon"] = group["name"].endswith("_muon")
        group |= (
            {"lr": train.muon_learning_rate, "momentum": train.muon_momentum} if group["use_muon"] else adam
        )
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]  # DeepSpeed reads it off the parameters
    return MuonWithAuxAdam(groups, adam_optimizer=adam_class, adam_optimizer_kwargs=options)


def set_learning_rates(
    engine: deepspeed.DeepSpeedEngine, train: TrainConfig, step: int, phase: Phase
) -> dict[str, float]:
    """Set every group's learning rate for `step`, a pure function of it.

    Returns:
        For the log: `learning_rate`, that of AdamW for new layers, and `learning_rate/GROUP` of every group.
    """
    factor = learning_rate_factor(train, step)
    for group in engine.optimizer.param_groups:
        peak = train.muon_learning_rate if group["name"].endswith("_muon") else train.learning_rate
        group["lr"] = peak * factor
        if group["name"].startswith("backbone"):
            group["lr"] *= 0.0 if phase.freezes_backbone else train.backbone_learning_rate_ratio
            # Adam's moments of the backbone start at zero when it is unfrozen.
            if phase.start and step < phase.start + train.switch_warmup_steps:
                group["lr"] *= (step + 1 - phase.start) / train.switch_warmup_steps
    rates = {f"learning_rate/{group['name']}": float(group["lr"]) for group in engine.optimizer.param_groups}
    return {"learning_rate": train.learning_rate * factor, **rates}
