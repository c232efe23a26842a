"""The stages: which task trains what, and how a checkpoint becomes its model again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from data_pipeline import TokenDataset
from launch.codec_tasks import AnchorCodecTask, RQVAETask
from launch.compatibility import check_vocabulary
from launch.config import RunConfig
from launch.joint_task import JointTask
from launch.latent_task import RQTransformerTask
from launch.loading import open_tokens
from launch.shards import ShardedState
from launch.task import Batch, StepOutput, Task, token_metrics, token_sums
from rqvae.backbone import BaseLM


class BaseLMTask(Task):
    """The plain autoregressive model."""

    weights_prefix = "lm."

    def open(self, split: str, tokens: Path, codes: Path) -> TokenDataset:
        return open_tokens(self.config, split, tokens)

    def check_part(self, dataset: TokenDataset) -> None:  # type: ignore[override]
        check_vocabulary(dataset, self.config.codec.backbone.architecture)

    def create_model(self) -> BaseLM:
        return BaseLM(self.config.codec.backbone.architecture, self.any_part().eos_token_id)

    def load_model(self, directory: Path) -> BaseLM:
        return BaseLM.from_pretrained(directory, self.any_part().eos_token_id)

    def forward(self, model: nn.Module, batch: Batch, num_tokens: Tensor, step: int) -> StepOutput:
        out = model(batch["input_ids"], batch["document_ids"], num_tokens=num_tokens)
        return StepOutput(out.loss, token_sums(out.nats, out.correct, batch["document_ids"] > 0))

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {"loss": float(sums["nats"] / sums["tokens"].clamp(min=1))} | token_metrics(sums)


TASKS: dict[str, type[Task]] = {
    "base_lm": BaseLMTask,
    "rqvae": RQVAETask,
    "rq_transformer": RQTransformerTask,
    "joint": JointTask,
}


def create_task(config: RunConfig) -> Task:
    """The task of a configuration with a stage chosen."""
    assert config.stage is not None
    return codec_task(config) if config.stage == "rqvae" else TASKS[config.stage](config)


def codec_task(config: RunConfig) -> RQVAETask:
    """The task of the stage rqvae, for the kind of codec of a configuration."""
    return (AnchorCodecTask if config.codec.model == "anchor" else RQVAETask)(config)


def check_fits(targets: Mapping[str, Tensor], state: ShardedState, source: Path) -> None:
    """A checkpoint has the tensors of a model and no others.

    Raises:
        ValueError: names everything that does not fit.
    """
    names = set(state.names())
    missing, unexpected = sorted(targets.keys() - names), sorted(names - targets.keys())
    if missing or unexpected:
        raise ValueError(f"'{source}' does not fit the model: missing {missing}, unexpected {unexpected}")


def load_state(model: nn.Module, state: ShardedState, source: Path) -> None:
    """Load a checkpoint's parameters and buffers, one at a time.

    Raises:
        ValueError: they do not fit.
    """
    targets = model.state_dict()
    check_fits(targets, state, source)
    with torch.no_grad():
        for name, tensor in state.items():
            if targets[name].shape != tensor.shape:
                raise ValueError(
                    f"'{source}' does not fit the model: '{name}' is {tuple(tensor.shape)}, "
                    f"expected {tuple(targets[name].shape)}"
                )
            targets[name].copy_(tensor)
