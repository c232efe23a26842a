"""Measure a chain of models on the test split and write `report.json`.

    python launch/eval.py --model runs/tiny/model --data runs/data/python-docs --json runs/tiny/report.json
    torchrun --nproc-per-node 2 launch/eval.py --model ...    # each rank takes its part

DIR of `--model` holds `rqvae` and, for what needs them, `rq_transformer`, `base_lm` and `identity_codec`, as
launch/convert_checkpoint.py writes them; what is not there is named and left out. All likelihoods are over the same
real tokens, end-of-text included, and in the same context: the sample they are packed in, from the start of their
document. The latent model's figure is a bound: NLL(codes) + NLL(tokens | codes).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data_pipeline import TokenDataset, load_tokenizer
from data_pipeline.code_manifest import Precision
from data_pipeline.errors import EmptySplitError
from launch.brier import brier_report
from launch.calibration import Calibration, calibrate
from launch.codebook_report import codebook_report
from launch.compatibility import check_vocabulary
from launch.compute_report import compute_report
from launch.config import EvaluationConfig, load_measurement
from launch.environment import describe_environment
from launch.intervals import bootstrap
from launch.layout import check_grid
from launch.precision import add_precision
from launch.prompt_lengths import by_prompt_length
from launch.ranks import Ranks, join_ranks, leave_ranks
from launch.report_data import update_report
from launch.sample_quality import quality_report
from launch.sampling import samplers
from launch.scored_models import load_models
from launch.scoring import Scores, score, unigram_nats
from launch.tightening import importance_report
from rqvae import RQVAE, BaseLM, LatentGenerator
from rqvae.codec import Codec
from rqvae.encoder import chunk_documents

SUMS = {
    "latent_bound": ("latent_codes", "latent_reconstruction"),
    "latent_bound_calibrated": ("latent_codes_calibrated", "latent_reconstruction_calibrated"),
    "stochastic_bound": ("stochastic_codes", "stochastic_reconstruction"),
}
"""Rows that are the sum of two others."""


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, type=Path, help="directory of the exported models")
    parser.add_argument("--data", required=True, type=Path, help="directory of the token shards")
    parser.add_argument("--json", type=Path, help="report to update (default: report.json beside --model)")
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--identity-codec", type=Path, help="directory of the identity codec's two models")
    parser.add_argument("--documents", type=Path, help="also write the nats of every document, a JSON a line")
    add_precision(parser)
    parser.add_argument("--config", help="run configuration, for its evaluation section")
    parser.add_argument("overrides", nargs="*", metavar="evaluation.x=value", help="settings over the file's")
    args = parser.parse_args(arguments)
    path = args.json or args.model.parent / "report.json"
    try:
        settings = load_measurement(args.config, args.overrides).evaluation
        ranks, device = join_ranks()
        report = evaluate(
            args.model,
            args.data,
            args.split,
            settings,
            args.identity_codec,
            args.documents,
            ranks,
            device,
            args.precision,
        )
        if ranks.is_first:
            update_report(path, report)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    leave_ranks()
    if ranks.is_first:
        places = f"--model {args.model} --data {args.data} --report {path}"
        print(f"Report: {path}\nNext: python launch/benchmark.py inference {places}")
    return 0


def evaluate(
    model: Path,
    data: Path,
    split: str,
    settings: EvaluationConfig,
    identity: Path | None = None,
    by_document: Path | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008
    device: torch.device | None = None,
    precision: Precision = "fp32",
) -> dict[str, Any]:
    """All keys of the report that do not need a stop watch; every rank must call it.

    Args:
        identity: see `load_models`.
        by_document: file for the nats of every document.
        precision: of the models' weights and arithmetic.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset = TokenDataset(data, split)
    tokenizer = load_tokenizer(data)
    models = load_models(model, dataset.eos_token_id, device, identity, precision)
    check_vocabulary(dataset, models.codec.config.backbone.architecture)
    check_grid(dataset, data, models.codec.config.compression_factor)
    missing = dict(models.missing)
    if not isinstance(models.codec, RQVAE):
        model_name = models.codec.config.model
        if settings.stochastic_codes or settings.importance_documents:
            raise ValueError(
                f"evaluation.stochastic_codes, importance_documents: the {model_name} codec's codes are certain, "
                "there is nothing to draw; leave them off"
            )
        missing["zero_rate, latent_bound_calibrated"] = f"not formed for the {model_name} codec"
    generator = None
    if models.codec.config.sees_future:
        missing["generations"] = (
            "codec.resample: reference, original: nothing can be generated with such codes"
        )
    elif models.latent_model is not None:
        generator = LatentGenerator(models.codec, models.latent_model, tokenizer)
    validation = _validation(data, split, settings, missing)
    calibration = None
    if validation is not None:
        calibration = calibrate(
            models, validation, settings.calibration_samples, settings.batch_size, device, ranks
        )

    num_samples = min(len(dataset), settings.max_samples or len(dataset))
    unigram = unigram_nats(TokenDataset(data, "train"))
    scores = score(models, dataset, num_samples, settings, calibration, unigram, device, ranks)
    rows = samplers(models, tokenizer)
    report = likelihood_report(scores, dataset.vocab_size)
    report["evaluation"] |= {"split": split, "samples": num_samples, "precision": precision}
    codec = models.codec.config
    bits_per_token = sum(map(math.log2, codec.codebook_sizes)) / codec.compression_factor
    report |= {
        "reconstruction": reconstruction_report(scores, report["nats_per_token"]["latent_reconstruction"]),
        "codebook": codebook_report(
            models, scores, dataset, validation, calibration, settings.batch_size, device, ranks
        ),
        "rate": {"codes_bits_per_token": bits_per_token, "log2_vocabulary": math.log2(dataset.vocab_size)},
        "calibration": describe_calibration(calibration),
        "prompt_lengths": {},
        "codec": codec.model_dump(mode="json", exclude={"backbone", "quantizer"}),
        "compute": compute_report(model.parent),
    }
    if generator is not None and models.latent_model is not None:
        report["prompt_lengths"] = by_prompt_length(models.codec, models.latent_model, dataset, device)
    # What is not measured this time is not left from another.
    report |= {"importance": None, "brier_lm": None, "sample_quality": None}
    if models.pair is not None and validation is not None and settings.importance_documents:
        report["importance"] = importance_report(
            models.pair,
            dataset,
            validation,
            settings.importance_documents,
            settings.importance_samples,
            device,
            ranks,
        )
    if rows and settings.brier_documents:
        report["brier_lm"] = brier_report(
            rows, dataset, settings.brier_documents, settings.brier_offsets, ranks
        )
    if rows and settings.quality_samples:
        report["sample_quality"] = quality_report(
            rows, models.base_lm, dataset, settings.quality_samples, settings.max_new_tokens, ranks
        )
    report["samples"] = {
        "reconstructions": reconstructions(
            models.codec, dataset, tokenizer, settings.num_reconstructions, device
        ),
        "generations": generations(generator, models.base_lm, tokenizer, settings, device),
    }
    if ranks.is_first:
        for name, reason in missing.items():
            print(f"left out: {name}: {reason}")
        if by_document is not None:
            write_documents(scores, by_document)
    return report | {"missing": missing, "environment": describe_environment()}


def _validation(
    data: Path, split: str, settings: EvaluationConfig, missing: dict[str, str]
) -> TokenDataset | None:
    """The split that temperatures are fitted on, which is never the one reported."""
    reason = "evaluation.calibration_samples is 0"
    if split == "validation":
        reason = "the validation split is what is reported"
    elif settings.calibration_samples:
        try:
            return TokenDataset(data, "validation")
        except EmptySplitError as error:
            reason = str(error)
    missing["calibrated rows and zero_rate"] = reason
    return None


def reconstruction_report(scores: Scores, nats_per_token: float) -> dict[str, float]:
    """Tokens given their codes; of an RQ-VAE also given its latents, not quantized, which tells what the resampling
    loses from what the codebooks lose."""
    tokens = scores.tokens.sum()
    report = {
        "token_accuracy": float(scores.sums["correct"] / tokens),
        "chunk_accuracy": float(scores.sums["correct_chunks"] / scores.sums["chunks"]),
        "nats_per_token": nats_per_token,
    }
    if "continuous_correct" in scores.sums:
        report["continuous_token_accuracy"] = float(scores.sums["continuous_correct"] / tokens)
        report["continuous_nats_per_token"] = float(scores.sums["continuous_nats"] / tokens)
    return report


def likelihood_report(scores: Scores, vocab_size: int) -> dict[str, Any]:
    """Every row in bits per byte, nats per token and perplexity, with intervals over documents."""
    tokens, num_bytes, nats = scores.by_document()
    nats["uniform"] = tokens * math.log(vocab_size)
    for name, parts in SUMS.items():
        if all(part in nats for part in parts):
            nats[name] = sum((nats[part] for part in parts), np.zeros(len(tokens)))
    all_tokens, all_bytes = tokens.sum(), num_bytes.sum()
    per_token = {name: float(values.sum() / all_tokens) for name, values in nats.items()}
    names = list(nats)
    interval = {
        name: bootstrap(np.stack([nats[name], num_bytes], axis=1), lambda s: s[:, 0] / s[:, 1] / math.log(2))
        for name in names
    }
    return {
        "evaluation": {"documents": len(tokens), "tokens": int(all_tokens), "bytes": int(all_bytes)},
        "bits_per_byte": {
            name: float(values.sum() / math.log(2) / all_bytes) for name, values in nats.items()
        },
        "bits_per_byte_intervals": interval,
        "nats_per_token": per_token,
        "perplexity": {name: math.exp(min(value, 700.0)) for name, value in per_token.items()},
    }


def describe_calibration(calibration: Calibration | None) -> dict[str, Any]:
    """The fitted temperatures."""
    if calibration is None:
        return {}
    return {
        "split": "validation",
        "samples": calibration.samples,
        "prior_temperatures": calibration.prior,
        "decoder_temperature": calibration.decoder,
        "base_lm_temperature": calibration.base_lm,
        "zero_rate_temperature": calibration.zero_rate,
    }


def write_documents(scores: Scores, path: Path) -> None:
    """A JSON line per document of the split: document, tokens, bytes, nats by row."""
    tokens, num_bytes, nats = scores.by_document()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for i, document in enumerate(np.unique(scores.documents).tolist()):
            row = {"document": document, "tokens": int(tokens[i]), "bytes": int(num_bytes[i])}
            row["nats"] = {name: float(values[i]) for name, values in nats.items()}
            file.write(json.dumps(row) + "\n")


@torch.inference_mode()
def reconstructions(
    vae: Codec, dataset: TokenDataset, tokenizer: PreTrainedTokenizerBase, count: int, device: torch.device
) -> list[dict[str, Any]]:
    """The first samples of the split, token by token beside what the codec makes of them."""
    shown = []
    for index in range(min(count, len(dataset))):
        batch = dataset.read([index])
        input_ids, documents = batch["input_ids"].to(device), batch["document_ids"].to(device)
        codes = vae.encode(input_ids, document_ids=documents)
        predicted = vae.decode(codes, chunk_documents(documents, vae.config.compression_factor)).argmax(-1)
        real = documents[0] > 0
        pairs = zip(input_ids[0, real].tolist(), predicted[0, real].tolist(), strict=True)
        shown.append({"tokens": [[tokenizer.decode([a]), tokenizer.decode([b]), a == b] for a, b in pairs]})
    return shown


def generations(
    generator: LatentGenerator | None,
    base_lm: BaseLM | None,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationConfig,
    device: torch.device,
) -> list[dict[str, str]]:
    """Continuations by the latent model and by the base LM, whichever there are, sampled at temperature 1."""
    if generator is None and base_lm is None:
        return []
    prompts = list(settings.prompts)
    shown = [{"prompt": prompt} for prompt in prompts]
    if generator is not None:
        latent = generator.generate(prompts, max_new_tokens=settings.max_new_tokens, temperature=1.0, seed=0)
        for row, text in zip(shown, latent, strict=True):
            row["latent"] = text
    torch.manual_seed(0)
    for row in shown:
        if base_lm is None:
            break
        ids = [base_lm.eos_token_id, *tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]]
        prompt_ids: Tensor = torch.tensor([ids], device=device)
        out = base_lm.lm.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            max_new_tokens=settings.max_new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            eos_token_id=base_lm.eos_token_id,
            pad_token_id=base_lm.eos_token_id,
        )
        row["base_lm"] = str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))
    return shown


if __name__ == "__main__":
    sys.exit(main())
