"""What each stage trains: its model, data, loss and metrics. The loop itself is in `launch/train.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_pipeline import CodeDataset, MixtureDataset, TokenDataset
from launch.compatibility import check_tokenizer, check_vocabulary
from launch.config import RunConfig
from launch.latent_model import describe_match, latent_model_config
from launch.loading import open_tokens, reading_directories
from launch.paths import codes_directory, source_directories
from launch.shards import ShardedState
from rqvae.anchor_codec import AnchorCodec
from rqvae.backbone import BaseLM
from rqvae.encoder import chunk_documents
from rqvae.flat_transformer import FlatTransformer
from rqvae.latent_model import LatentModel
from rqvae.persistence import load_tensors
from rqvae.quantizer import INITIALISATION_VECTORS_PER_CODE, ResidualQuantizer, compute_perplexity
from rqvae.randomness import Purpose, sample_seeds, uniform
from rqvae.rq_transformer import RQTransformer
from rqvae.rq_vae import RQVAE, RQVAEOutput

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


def _token_sums(nats: Tensor, correct: Tensor, real: Tensor) -> dict[str, Tensor]:
    return {"nats": nats.double().sum(), "correct": correct.double().sum(), "tokens": real.double().sum()}


def _token_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    tokens = sums["tokens"].clamp(min=1)
    return {
        "nats_per_token": float(sums["nats"] / tokens),
        "token_accuracy": float(sums["correct"] / tokens),
    }


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
        return StepOutput(out.loss, _token_sums(out.nats, out.correct, batch["document_ids"] > 0))

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {"loss": float(sums["nats"] / sums["tokens"].clamp(min=1))} | _token_metrics(sums)


class RQVAETask(Task):
    """The codec: frozen-backbone warm-up, then everything."""

    def open(self, split: str, tokens: Path, codes: Path) -> TokenDataset:
        return open_tokens(self.config, split, tokens)

    def check_part(self, dataset: TokenDataset) -> None:  # type: ignore[override]
        backbone = self.config.codec.backbone
        check_vocabulary(dataset, backbone.architecture)
        if backbone.pretrained is not None:
            check_tokenizer(dataset.directory, backbone.pretrained)

    def create_model(self) -> RQVAE | AnchorCodec:
        return RQVAE(self.config.codec)

    def load_model(self, directory: Path) -> RQVAE | AnchorCodec:
        return RQVAE.from_pretrained(directory)

    def load_initial_weights(self, model: RQVAE | AnchorCodec) -> None:  # type: ignore[override]
        if self.config.codec.backbone.pretrained is not None:
            model.load_backbone(self.config.codec.backbone.pretrained)

    def phases(self) -> list[Phase]:
        train = self.config.train
        phases = [Phase("frozen", 0, train.frozen_steps), Phase("full", train.frozen_steps, train.steps)]
        return [phase for phase in phases if phase.start < phase.end]

    def backbone_parameters(self, model: RQVAE | AnchorCodec) -> Iterator[nn.Parameter]:  # type: ignore[override]
        return model.backbone_parameters()

    def reconstructing_head(self, model: RQVAE) -> nn.Module:  # type: ignore[override]
        return model.decoder.head

    def before_step(
        self,
        engine: nn.Module,
        dataset: Dataset,
        step: int,
        rank: int,
        world_size: int,
    ) -> None:
        """Initialise the codebooks by k-means when quantization begins."""
        train = self.config.train
        if step != train.quantizer_warmup_steps:
            return
        vectors_per_sample = dataset.sample_length // self.config.codec.compression_factor
        wanted = INITIALISATION_VECTORS_PER_CODE * max(self.config.codec.codebook_sizes)
        num_samples = min(-(-wanted // vectors_per_sample), len(dataset))
        # Every rank reads a stretch of one list of samples, so that the joined vectors are the same, in the same
        # order, on any number of ranks. What is read beyond the list, for even batches, counts for nothing.
        size = train.micro_batch_size
        num_batches = -(-num_samples // (size * world_size))
        generator = torch.Generator().manual_seed(self.config.seed)
        # Drawn with replacement: there may be more samples than fit a permutation.
        if isinstance(dataset, MixtureDataset):
            samples = dataset.draw(num_samples, generator)
        else:
            samples = torch.randint(len(dataset), (num_samples,), generator=generator)
        quantizer: ResidualQuantizer = engine.module.quantizer  # type: ignore[union-attr,assignment]
        device = quantizer.levels[0].codebook.device
        engine.eval()
        vectors = []
        with torch.no_grad():
            for batch_index in range(rank * num_batches, (rank + 1) * num_batches):
                places = torch.arange(batch_index * size, (batch_index + 1) * size)
                batch = dataset.read(samples[places.clamp(max=num_samples - 1)].numpy())
                documents = batch["document_ids"].masked_fill((places >= num_samples)[:, None], 0).to(device)
                out = engine(batch["input_ids"].to(device), document_ids=documents, quantize=False)
                vectors.append(
                    out.latents[chunk_documents(documents, self.config.codec.compression_factor) > 0]
                )
        engine.train()
        quantizer.initialize(torch.cat(vectors), self.config.seed)

    def forward(self, model: nn.Module, batch: Batch, num_tokens: Tensor, step: int) -> StepOutput:
        documents = batch["document_ids"]
        out = self._score(model, batch, num_tokens, step)
        real = documents > 0
        sums = _token_sums(out.nats, out.correct, real)
        factor = self.config.codec.compression_factor
        real_chunks = chunk_documents(documents, factor) > 0
        chunk_hits = (out.correct | ~real).view(*real_chunks.shape, factor).all(-1) & real_chunks
        sums |= {
            "chunks": real_chunks.double().sum(),
            "correct_chunks": chunk_hits.double().sum(),
            "commitment": out.commitment_loss.detach().double() * num_tokens / factor,
            "quantized_chunks": real_chunks.double().sum() * (out.codes is not None),
        }
        if out.codes is not None:
            sums["distortion"] = out.distortion.double()
            sums["code_counts"] = torch.stack(
                [
                    torch.bincount(codes, minlength=max(self.config.codec.codebook_sizes)).double()
                    for codes in out.codes[real_chunks].unbind(-1)
                ]
            )
        return StepOutput(out.loss, sums)

    def _score(self, model: nn.Module, batch: Batch, num_tokens: Tensor, step: int) -> RQVAEOutput:
        return model(
            batch["input_ids"],
            document_ids=batch["document_ids"],
            num_tokens=num_tokens,
            quantize=step >= self.config.train.quantizer_warmup_steps,
            seeds=sample_seeds(self.config.seed, step, batch["sample_index"]),
        )

    def after_step(self, model: RQVAE, step: int) -> None:  # type: ignore[override]
        if step >= self.config.train.quantizer_warmup_steps:
            model.quantizer.update_codebook_ema(step, self.config.seed)

    def after_skipped_step(self, model: RQVAE) -> None:  # type: ignore[override]
        model.quantizer.discard_pending()

    def begins_new_loss(self, step: int) -> bool:
        return step == self.config.train.quantizer_warmup_steps

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        chunks = sums["chunks"].clamp(min=1)
        # The first steps of a window may have been continuous.
        quantized = sums["quantized_chunks"].clamp(min=1)
        metrics = _token_metrics(sums)
        commitment = float(sums["commitment"] / quantized)
        metrics = {
            "loss": metrics["nats_per_token"] + self.config.codec.quantizer.commitment_weight * commitment,
            **metrics,
            "chunk_accuracy": float(sums["correct_chunks"] / chunks),
            "commitment_loss": commitment,
        }
        if "distortion" in sums:
            # Perplexity over all that was summed up: over one batch it is capped by the vectors in it.
            perplexity = compute_perplexity(sums["code_counts"])
            for level in range(len(perplexity)):
                metrics[f"codebook/distortion_{level}"] = float(sums["distortion"][level] / quantized)
                metrics[f"codebook/window_perplexity_{level}"] = float(perplexity[level])
        return metrics

    def state_metrics(self, model: RQVAE, step: int) -> dict[str, float]:  # type: ignore[override]
        # Before quantization begins, codebooks are what they were made with and mean nothing.
        return model.quantizer.usage_metrics() if step > self.config.train.quantizer_warmup_steps else {}


class AnchorCodecTask(RQVAETask):
    """The codec whose codes are tokens: a decoder that fills in the others."""

    def create_model(self) -> AnchorCodec:
        return AnchorCodec(self.config.codec)

    def load_model(self, directory: Path) -> AnchorCodec:
        return AnchorCodec.from_pretrained(directory)

    def before_step(self, engine: nn.Module, dataset: Dataset, step: int, rank: int, world_size: int) -> None:
        pass  # there are no codebooks

    def _score(self, model: nn.Module, batch: Batch, num_tokens: Tensor, step: int) -> RQVAEOutput:
        return model(batch["input_ids"], document_ids=batch["document_ids"], num_tokens=num_tokens)

    def after_step(self, model: nn.Module, step: int) -> None:
        pass

    def after_skipped_step(self, model: nn.Module) -> None:
        pass

    def begins_new_loss(self, step: int) -> bool:
        return False

    def state_metrics(self, model: nn.Module, step: int) -> dict[str, float]:
        return {}


class RQTransformerTask(Task):
    """The latent model, on the codes of a finished codec."""

    def open(self, split: str, tokens: Path, codes: Path) -> CodeDataset:
        return CodeDataset(
            TokenDataset(tokens, split), codes, with_latents=self.config.train.stochastic_codes
        )

    @property
    def _model_class(self) -> type[RQTransformer] | type[FlatTransformer]:
        return RQTransformer if self.config.latent_model.model == "rq_transformer" else FlatTransformer

    def check_part(self, dataset: CodeDataset) -> None:  # type: ignore[override]
        if self.config.train.stochastic_codes and self._quantizer.codec_hash != dataset.codec_hash:
            raise ValueError(
                f"'{codes_directory(self.config)}/quantizer' is not of the codec that made the codes beside it; "
                "remove the directory and run launch/precompute_codes.py --latents again"
            )
        spatial = self.config.latent_model.spatial_backbone
        if self.config.latent_model.reads_tokens and spatial is not None and spatial.pretrained is not None:
            check_tokenizer(dataset.token_dataset.directory, spatial.pretrained)

    def notes(self) -> list[str]:
        match = describe_match(self.config)
        return [] if match is None else [match]

    def create_model(self) -> LatentModel:
        codes = self.any_part()
        assert isinstance(codes, CodeDataset)
        codec = self.config.codec
        made_by = (codes.compression_factor, tuple(codes.codebook_sizes))
        if made_by != (codec.compression_factor, codec.codebook_sizes):
            raise ValueError(
                f"codes in '{codes_directory(self.config)}' have K, C = {made_by}; this configuration has "
                f"{(codec.compression_factor, codec.codebook_sizes)}. Use the configuration of their codec"
            )
        return self._model_class(latent_model_config(self.config, codes.codec_hash))

    def load_initial_weights(self, model: nn.Module) -> None:
        spatial_backbone = self.config.latent_model.spatial_backbone
        if spatial_backbone is not None and spatial_backbone.pretrained is not None:
            assert isinstance(model, RQTransformer)
            model.load_backbone(spatial_backbone.pretrained)

    def backbone_parameters(self, model: nn.Module) -> Iterator[nn.Parameter]:
        return model.backbone_parameters() if isinstance(model, RQTransformer) else iter(())

    def load_model(self, directory: Path) -> LatentModel:
        return self._model_class.from_pretrained(directory)

    def forward(self, model: nn.Module, batch: Batch, num_tokens: Tensor, step: int) -> StepOutput:
        documents = chunk_documents(batch["document_ids"], self.config.codec.compression_factor)
        codes, soft_targets = self._codes(model, batch, step)
        out = model(
            codes,
            batch["input_ids"] if self.config.latent_model.reads_tokens else None,
            token_document_ids=batch["document_ids"],
            num_tokens=num_tokens,
            soft_targets=soft_targets,
        )
        real = documents > 0
        return StepOutput(
            out.loss,
            {
                "tokens": (batch["document_ids"] > 0).double().sum(),
                "chunks": real.double().sum(),
                "level_nats": out.nats.double().sum((0, 1)),
                "level_correct": out.correct.double().sum((0, 1)),
            },
        )

    def _codes(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, list[Tensor] | None]:
        """What to predict: the codes on disk or, in training with stochastic codes, a draw and what it is from."""
        if not self.config.train.stochastic_codes or not model.training:
            return batch["codes"], None
        seeds = sample_seeds(self.config.seed, step, batch["sample_index"])
        numbers = uniform(seeds, Purpose.CODES, *batch["codes"].shape[1:])
        return self._quantizer.to(numbers.device).sample(batch["latents"], numbers, with_soft_targets=True)

    @cached_property
    def _quantizer(self) -> ResidualQuantizer:
        """The one that made the codes, at this run's temperature."""
        directory = codes_directory(self.config) / "quantizer"
        if not directory.is_dir():
            raise ValueError(f"'{directory}' is missing; run launch/precompute_codes.py --latents again")
        quantizer = ResidualQuantizer.from_pretrained(directory)
        temperature = self.config.codec.quantizer.code_temperature
        quantizer.config = quantizer.config.model_copy(update={"code_temperature": temperature})
        return quantizer

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        chunks = sums["chunks"].clamp(min=1)
        nats_per_token = float(sums["level_nats"].sum() / sums["tokens"].clamp(min=1))
        metrics = {"loss": nats_per_token, "nats_per_token": nats_per_token}
        for level in range(len(sums["level_nats"])):
            metrics[f"codes/nats_{level}"] = float(sums["level_nats"][level] / chunks)
            metrics[f"codes/accuracy_{level}"] = float(sums["level_correct"][level] / chunks)
        return metrics


TASKS: dict[str, type[Task]] = {
    "base_lm": BaseLMTask,
    "rqvae": RQVAETask,
    "rq_transformer": RQTransformerTask,
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
