"""Training of the latent model on the codes of a finished codec."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from data_pipeline import CodeDataset, TokenDataset
from launch.compatibility import check_tokenizer
from launch.config import RunConfig
from launch.latent_model import describe_match, latent_model_config
from launch.paths import codes_directory
from launch.task import Batch, StepOutput, Task
from rqvae.encoder import chunk_documents
from rqvae.flat_transformer import FlatTransformer
from rqvae.latent_model import LatentModel
from rqvae.quantizer import ResidualQuantizer
from rqvae.randomness import Purpose, sample_seeds, uniform
from rqvae.rq_transformer import RQTransformer


def latent_model_class(config: RunConfig) -> type[RQTransformer] | type[FlatTransformer]:
    """The latent model's class, by `latent_model.model`."""
    return FlatTransformer if config.latent_model.model == "flat_transformer" else RQTransformer


class RQTransformerTask(Task):
    """The latent model, on the codes of a finished codec."""

    def open(self, split: str, tokens: Path, codes: Path) -> CodeDataset:
        return CodeDataset(
            TokenDataset(tokens, split), codes, with_latents=self.config.train.stochastic_codes
        )

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
        return latent_model_class(self.config)(latent_model_config(self.config, codes.codec_hash))

    def load_initial_weights(self, model: nn.Module) -> None:
        spatial_backbone = self.config.latent_model.spatial_backbone
        if spatial_backbone is not None and spatial_backbone.pretrained is not None:
            assert isinstance(model, RQTransformer)
            model.load_backbone(spatial_backbone.pretrained)

    def backbone_parameters(self, model: nn.Module) -> Iterator[nn.Parameter]:
        return model.backbone_parameters() if isinstance(model, RQTransformer) else iter(())

    def load_model(self, directory: Path) -> LatentModel:
        return latent_model_class(self.config).from_pretrained(directory)

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
