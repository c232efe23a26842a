"""Training of codec and latent model together, on the bound itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from launch.codec_tasks import RQVAETask
from launch.latent_model import latent_model_config
from launch.latent_task import latent_model_class
from launch.task import Batch, StepOutput
from rqvae.joint import JointOutput, RQVAEWithPrior
from rqvae.loading import load_latent_model
from rqvae.quantizer import ResidualQuantizer
from rqvae.randomness import sample_seeds
from rqvae.rq_vae import RQVAE


class JointTask(RQVAETask):
    """The codec with its latent model as prior: phases, quantization and data as those of the codec alone."""

    def create_model(self) -> RQVAEWithPrior:  # type: ignore[override]
        # The latent model gets the hash of its codec when that is finished.
        prior = latent_model_class(self.config)(latent_model_config(self.config))
        return RQVAEWithPrior(RQVAE(self.config.codec), prior)

    def load_model(self, directory: Path) -> RQVAEWithPrior:  # type: ignore[override]
        return RQVAEWithPrior(
            RQVAE.from_pretrained(directory / "rqvae"), load_latent_model(directory / "rq_transformer")
        )

    def load_initial_weights(self, model: RQVAEWithPrior) -> None:  # type: ignore[override]
        super().load_initial_weights(model.codec)

    def backbone_parameters(self, model: RQVAEWithPrior) -> Iterator[nn.Parameter]:  # type: ignore[override]
        return model.codec.backbone_parameters()

    def reconstructing_head(self, model: RQVAEWithPrior) -> nn.Module:  # type: ignore[override]
        return model.codec.decoder.head

    def quantizer(self, model: RQVAEWithPrior) -> ResidualQuantizer:  # type: ignore[override]
        return model.codec.quantizer

    def latents(self, engine: nn.Module, input_ids: Tensor, document_ids: Tensor) -> Tensor:
        return engine(input_ids, document_ids=document_ids, quantize=False).codec.latents

    def rate_weight(self, step: int) -> float:
        """Of the divergence at a step: rises linearly from 0 when quantization begins."""
        train = self.config.train
        since = step - train.quantizer_warmup_steps
        return train.rate_weight * min(1.0, (since + 1) / max(1, train.rate_warmup_steps))

    def forward(self, model: nn.Module, batch: Batch, num_tokens: Tensor, step: int) -> StepOutput:
        documents = batch["document_ids"]
        out: JointOutput = model(
            batch["input_ids"],
            document_ids=documents,
            num_tokens=num_tokens,
            quantize=step >= self.config.train.quantizer_warmup_steps,
            seeds=sample_seeds(self.config.seed, step, batch["sample_index"]),
            rate_weight=self.rate_weight(step),
            free_nats=self.config.train.free_nats,
        )
        sums = self._sums(out.codec, documents, num_tokens)
        is_quantized = out.codec.codes is not None
        sums["level_divergences"] = out.level_divergences.double()
        sums["quantized_tokens"] = (documents > 0).double().sum() * is_quantized
        sums["quantized_nats"] = sums["nats"] * is_quantized
        sums["rate"] = out.codec.rate_loss.detach().double() * num_tokens
        return StepOutput(out.loss, sums)

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        metrics = super().metrics(sums)
        # The first steps of a window may have been continuous.
        tokens, chunks = sums["quantized_tokens"].clamp(min=1), sums["quantized_chunks"].clamp(min=1)
        metrics["loss"] += float(sums["rate"] / sums["tokens"].clamp(min=1))
        if sums["quantized_tokens"] > 0:
            divergence = sums["level_divergences"].sum()
            metrics["divergence_per_token"] = float(divergence / tokens)
            metrics["bound"] = float((sums["quantized_nats"] + divergence) / tokens)
            for level, nats in enumerate(sums["level_divergences"].tolist()):
                metrics[f"codes/divergence_{level}"] = nats / float(chunks)
        return metrics
