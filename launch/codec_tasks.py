"""Training of the codecs: `RQVAE`, and `AnchorCodec`, whose codes are tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from data_pipeline import MixtureDataset, TokenDataset
from launch.compatibility import check_tokenizer, check_vocabulary
from launch.loading import open_tokens
from launch.task import Batch, Dataset, Phase, StepOutput, Task, token_metrics, token_sums
from rqvae.anchor_codec import AnchorCodec
from rqvae.codebook import compute_perplexity
from rqvae.encoder import chunk_documents
from rqvae.quantizer import INITIALISATION_VECTORS_PER_CODE, ResidualQuantizer
from rqvae.randomness import sample_seeds
from rqvae.rq_vae import RQVAE, RQVAEOutput


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

    def quantizer(self, model: nn.Module) -> ResidualQuantizer:
        """The codec's quantizer."""
        return model.quantizer  # type: ignore[return-value]

    def latents(self, engine: nn.Module, input_ids: Tensor, document_ids: Tensor) -> Tensor:
        """What the codebooks are to be initialised from: [B, S, codebook_dim]."""
        return engine(input_ids, document_ids=document_ids, quantize=False).latents

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
        quantizer = self.quantizer(engine.module)  # type: ignore[arg-type]
        device = quantizer.levels[0].codebook.device
        engine.eval()
        vectors = []
        with torch.no_grad():
            for batch_index in range(rank * num_batches, (rank + 1) * num_batches):
                places = torch.arange(batch_index * size, (batch_index + 1) * size)
                batch = dataset.read(samples[places.clamp(max=num_samples - 1)].numpy())
                documents = batch["document_ids"].masked_fill((places >= num_samples)[:, None], 0).to(device)
                latents = self.latents(engine, batch["input_ids"].to(device), documents)
                vectors.append(latents[chunk_documents(documents, self.config.codec.compression_factor) > 0])
        engine.train()
        quantizer.initialize(torch.cat(vectors), self.config.seed)

    def forward(self, model: nn.Module, batch: Batch, num_tokens: Tensor, step: int) -> StepOutput:
        documents = batch["document_ids"]
        out = self._score(model, batch, num_tokens, step)
        return StepOutput(out.loss, self._sums(out, documents, num_tokens))

    def _sums(self, out: RQVAEOutput, documents: Tensor, num_tokens: Tensor) -> dict[str, Tensor]:
        real = documents > 0
        sums = token_sums(out.nats, out.correct, real)
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
        return sums

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
            self.quantizer(model).update_codebook_ema(step, self.config.seed)

    def after_skipped_step(self, model: RQVAE) -> None:  # type: ignore[override]
        self.quantizer(model).discard_pending()

    def begins_new_loss(self, step: int) -> bool:
        return step == self.config.train.quantizer_warmup_steps

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        chunks = sums["chunks"].clamp(min=1)
        # The first steps of a window may have been continuous.
        quantized = sums["quantized_chunks"].clamp(min=1)
        metrics = token_metrics(sums)
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
        is_quantized = step > self.config.train.quantizer_warmup_steps
        return self.quantizer(model).usage_metrics() if is_quantized else {}


class AnchorCodecTask(RQVAETask):
    """The codec whose codes are tokens: a decoder that fills in the others."""

    def create_model(self) -> AnchorCodec:
        return AnchorCodec(self.config.codec)

    def load_model(self, directory: Path) -> AnchorCodec:
        return AnchorCodec.from_pretrained(directory)

    def reconstructing_head(self, model: AnchorCodec) -> nn.Module:  # type: ignore[override]
        return model.head

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
