"""What a stage of training has to say for itself; the stages are in `launch/tasks.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from data_pipeline import CodeDataset, MixtureDataset, TokenDataset
from launch.config import RunConfig
from launch.layout import check_layout
from launch.loading import reading_directories
from launch.paths import source_directories
from rqvae.persistence import load_tensors

Batch = Mapping[str, Tensor]
Part = TokenDataset | CodeDataset
Dataset = Part | MixtureDataset


@dataclass(frozen=True)
class Phase:
    """Steps [start, end) of a stage in which the same parameters are trained."""

    name: str
    start: int
    end: int

    @property
    def freezes_backbone(self) -> bool:
        """Pretrained weights stay as they are."""
        return self.name == "frozen"


class StepOutput(NamedTuple):
    """Result of a forward pass on one micro-batch."""

    loss: Tensor
    sums: dict[str, Tensor]
    """Sums over the micro-batch, fp64, to be added up over micro-batches, steps and ranks."""


class Task(ABC):
    """One stage of training."""

    weights_prefix = ""
    """What the names of a model directory's tensors lack of those of the model."""

    def __init__(self, config: RunConfig):
        self.config = config

    @abstractmethod
    def open(self, split: str, tokens: Path, codes: Path) -> Part:
        """The split of one source of data."""

    def dataset(self, split: str) -> Dataset:
        """The data of a split: the one source, or the mixture of all."""
        parts = {
            name: self.open(split, tokens, codes)
            for name, (tokens, codes) in reading_directories(self.config).items()
        }
        weights = {source.name: source.weight for source in self.config.data.mixture}
        return MixtureDataset(parts, weights) if weights else next(iter(parts.values()))

    def any_part(self) -> Part:
        """The training split of the first source, for what all have in common."""
        return self.open("train", *next(iter(source_directories(self.config).values())))

    def check_data(self, dataset: Dataset) -> None:
        """Refuse data that do not belong to the model, before it is built.

        Raises:
            ValueError: says what does not fit and what to do.
        """
        for part in dataset.parts.values() if isinstance(dataset, MixtureDataset) else [dataset]:
            tokens = part.token_dataset if isinstance(part, CodeDataset) else part
            check_layout(tokens, tokens.directory, self.config)
            self.check_part(part)

    def check_part(self, dataset: Part) -> None:
        """`check_data` of one source."""

    def notes(self) -> list[str]:
        """Lines to be said at the start of training."""
        return []

    @abstractmethod
    def create_model(self) -> nn.Module:
        """The model with random weights, seeded by the caller."""

    def load_initial_weights(self, model: nn.Module) -> None:
        """Load the pretrained weights that the run starts from."""

    def initialize(self, model: nn.Module) -> None:
        """Load what the run starts from: `train.initial_weights` if given, else pretrained backbones.

        Raises:
            ValueError: the directory holds no model of this kind and shape.
        """
        source = self.config.train.initial_weights
        if source is None:
            self.load_initial_weights(model)
            return
        if not any(Path(source).glob("*.safetensors")):
            raise ValueError(
                f"train.initial_weights: no safetensors in '{source}'; launch/convert_checkpoint.py writes them"
            )
        load_tensors(model, Path(source), prefix=self.weights_prefix)

    @abstractmethod
    def load_model(self, directory: Path) -> nn.Module:
        """The finished model from its directory."""

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch, num_tokens: Tensor, step: int) -> StepOutput:
        """Score a micro-batch. `num_tokens` is the denominator of the loss."""

    @abstractmethod
    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics from sums joined over all ranks."""

    def phases(self) -> list[Phase]:
        """The phases, in order, without gaps."""
        return [Phase("full", 0, self.config.train.steps)]

    def frozen_parameters(self, model: nn.Module, phase: Phase) -> Iterator[nn.Parameter]:
        """Parameters that keep their values in a phase, while gradients flow through them."""
        return self.backbone_parameters(model) if phase.freezes_backbone else iter(())

    def set_phase(self, model: nn.Module, phase: Phase) -> None:
        """Freeze them, before the engine is built. Never on a live engine: ZeRO-3 would go wrong silently."""
        for parameter in self.frozen_parameters(model, phase):
            parameter.requires_grad_(False)

    def backbone_parameters(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """Parameters that started from pretrained weights."""
        return iter(())

    def reconstructing_head(self, model: nn.Module) -> nn.Module | None:
        """The output head over all positions of the input's own tokens, if the model reconstructs them."""
        return None

    def before_step(self, engine: nn.Module, dataset: Dataset, step: int, rank: int, world_size: int) -> None:
        """Called by all ranks before the forward pass of a step; `engine` is the model under DeepSpeed."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called by all ranks after the optimizer step."""

    def after_skipped_step(self, model: nn.Module) -> None:
        """Called by all ranks instead of `after_step` when the weights were left as they are."""

    def begins_new_loss(self, step: int) -> bool:
        """The loss of `step` does not compare with that of the steps before."""
        return False

    def state_metrics(self, model: nn.Module, step: int) -> dict[str, float]:
        """Metrics that are read off the model after `step` steps."""
        return {}


def token_sums(nats: Tensor, correct: Tensor, real: Tensor) -> dict[str, Tensor]:
    """Sums that `token_metrics` is made from; all [B, T]."""
    return {"nats": nats.double().sum(), "correct": correct.double().sum(), "tokens": real.double().sum()}


def token_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Likelihood and accuracy per real token."""
    tokens = sums["tokens"].clamp(min=1)
    return {
        "nats_per_token": float(sums["nats"] / tokens),
        "token_accuracy": float(sums["correct"] / tokens),
    }
