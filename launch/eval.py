"""Measure a chain of models on the test split and write `report.json`.

    python launch/eval.py --model runs/tiny/model --data runs/data/python-docs --json runs/tiny/report.json

DIR of `--model` holds `rqvae` and, for what needs them, `rq_transformer` and `base_lm`, as
launch/convert_checkpoint.py writes them; what is not there is named and left out. All likelihoods are over the same
real tokens, end-of-text included, and in the same context: the sample they are packed in, from the start of their
document. The latent model's figure is a bound: NLL(codes) + NLL(tokens | codes).
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data_pipeline import TokenDataset, load_tokenizer
from data_pipeline.progress import Progress
from launch import flops
from launch.compatibility import check_vocabulary
from launch.config import EvaluationConfig, load_config
from launch.environment import describe_environment
from launch.latent_model import latent_model_config
from launch.prompt_lengths import by_prompt_length
from launch.report_data import update_report
from launch.tracking import read_metrics
from rqvae import RQVAE, BaseLM, LatentGenerator, LatentModel, latent_bound, load_codec, load_latent_model
from rqvae.codec import Codec
from rqvae.encoder import chunk_documents
from rqvae.generation import check_pair
from rqvae.quantizer import compute_perplexity

DISTORTION_SAMPLES = 64
"""Samples on which decoding from the first levels only is tried, once per level."""


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, type=Path, help="directory of the exported models")
    parser.add_argument("--data", required=True, type=Path, help="directory of the token shards")
    parser.add_argument("--json", type=Path, help="report to update (default: report.json beside --model)")
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--config", help="run configuration, for its evaluation section")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="with --config")
    args = parser.parse_args(arguments)
    path = args.json or args.model.parent / "report.json"
    try:
        settings = EvaluationConfig()
        if args.config:
            settings = load_config(args.config, overrides=args.overrides).evaluation
        elif args.overrides:
            raise ValueError("overrides need --config")
        update_report(path, evaluate(args.model, args.data, args.split, settings))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    places = f"--model {args.model} --data {args.data} --report {path}"
    print(f"Report: {path}\nNext: python launch/benchmark.py inference {places}")
    return 0


class Models(NamedTuple):
    """What there is to evaluate."""

    codec: Codec
    latent_model: LatentModel | None
    base_lm: BaseLM | None


def load_models(directory: Path, eos_token_id: int, device: torch.device) -> Models:
    """The models of a project; says which of the optional ones are missing."""
    codec = load_codec(directory / "rqvae").to(device)
    latent_model, base_lm = None, None
    if (directory / "rq_transformer").is_dir():
        latent_model = load_latent_model(directory / "rq_transformer").to(device)
    else:
        print(f"no '{directory}/rq_transformer': the bound and the latent generations are left out")
    if (directory / "base_lm").is_dir():
        base_lm = BaseLM.from_pretrained(directory / "base_lm", eos_token_id).to(device)
    else:
        print(f"no '{directory}/base_lm': the base LM's figures are left out")
    return Models(codec, latent_model, base_lm)


def evaluate(model: Path, data: Path, split: str, settings: EvaluationConfig) -> dict[str, Any]:
    """All keys of the report that do not need a stop watch."""
    dataset = TokenDataset(data, split)
    tokenizer = load_tokenizer(data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = load_models(model, dataset.eos_token_id, device)
    check_vocabulary(dataset, models.codec.config.backbone.architecture)
    generator = None
    if models.latent_model is not None:
        check_pair(models.codec, models.latent_model)
        if models.codec.config.sees_future:
            print(
                "codec.resample: reference, original: nothing can be generated or continued with such codes; left out"
            )
        else:
            generator = LatentGenerator(models.codec, models.latent_model, tokenizer)

    num_samples = min(len(dataset), settings.max_samples or len(dataset))
    totals = score(models, dataset, num_samples, settings.batch_size, device)
    tokens, num_bytes = totals["tokens"], totals["bytes"]
    nats = {
        "uniform": tokens * math.log(dataset.vocab_size),
        "unigram": unigram_nats(data, totals["token_counts"]),
        "latent_reconstruction": totals["token_nats"],
    }
    if models.base_lm is not None:
        nats["base_lm"] = totals["base_lm_nats"]
    if models.latent_model is not None:
        nats["latent_codes"] = totals["code_nats"].sum()
        nats["latent_bound"] = nats["latent_codes"] + nats["latent_reconstruction"]
    lengths = {}
    if models.latent_model is not None and generator is not None:
        lengths = by_prompt_length(models.codec, models.latent_model, dataset, device)
    codec = models.codec.config
    bits_per_token = sum(map(math.log2, codec.codebook_sizes)) / codec.compression_factor
    return {
        "evaluation": {
            "split": split,
            "samples": num_samples,
            "tokens": int(tokens),
            "bytes": int(num_bytes),
        },
        "reconstruction": {
            "token_accuracy": float(totals["correct"] / tokens),
            "chunk_accuracy": float(totals["correct_chunks"] / totals["chunks"]),
            "nats_per_token": float(totals["token_nats"] / tokens),
        },
        "bits_per_byte": {name: float(value / math.log(2) / num_bytes) for name, value in nats.items()},
        "nats_per_token": {name: float(value / tokens) for name, value in nats.items()},
        "perplexity": {name: math.exp(min(float(value / tokens), 700.0)) for name, value in nats.items()},
        "codebook": codebook_report(models, totals, dataset, settings.batch_size, device),
        "rate": {"codes_bits_per_token": bits_per_token, "log2_vocabulary": math.log2(dataset.vocab_size)},
        "prompt_lengths": lengths,
        "codec": codec.model_dump(mode="json", exclude={"backbone", "quantizer"}),
        "compute": compute_report(model.parent),
        "samples": {
            "reconstructions": reconstructions(
                models.codec, dataset, tokenizer, settings.num_reconstructions, device
            ),
            "generations": generations(generator, models.base_lm, tokenizer, settings, device),
        },
        "environment": describe_environment(),
    }


@torch.inference_mode()
def score(
    models: Models, dataset: TokenDataset, num_samples: int, batch_size: int, device: torch.device
) -> dict[str, Any]:
    """Sums over the first samples of a split, in fp64."""
    codec = models.codec.config
    levels = codec.codebook_levels
    totals: dict[str, Any] = {
        "code_counts": [np.zeros(size) for size in codec.codebook_sizes],
        "token_counts": np.zeros(
            max(dataset.vocab_size, codec.backbone.architecture.vocab_size), dtype=np.int64
        ),
        "code_nats": np.zeros(levels),
        "distortion": np.zeros(levels),
    }
    sums = dict.fromkeys(
        ("tokens", "bytes", "correct", "chunks", "correct_chunks", "token_nats", "base_lm_nats"), 0.0
    )
    progress = Progress(num_samples, "evaluate", unit="samples")
    for start in range(0, num_samples, batch_size):
        batch = dataset.read(range(start, min(start + batch_size, num_samples)))
        input_ids, documents = batch["input_ids"].to(device), batch["document_ids"].to(device)
        real = documents > 0
        if models.latent_model is None:
            scored = models.codec(input_ids, document_ids=documents)
            codes, token_nats, is_correct = scored.codes, scored.nats, scored.correct
            distortion = scored.distortion
        else:
            bound = latent_bound(models.codec, models.latent_model, input_ids, documents)
            codes, token_nats, is_correct = bound.codes, bound.token_nats, bound.token_correct
            distortion = bound.distortion
            totals["code_nats"] += bound.code_nats.double().sum((0, 1)).cpu().numpy()
        if models.base_lm is not None:
            sums["base_lm_nats"] += float(models.base_lm(input_ids, documents).nats.double().sum())
        real_chunks = chunk_documents(documents, codec.compression_factor) > 0
        hits = (is_correct | ~real).view(*real_chunks.shape, -1).all(-1) & real_chunks
        sums["tokens"] += float(real.sum())
        sums["bytes"] += float(batch["num_bytes"].sum())
        sums["correct"] += float(is_correct.sum())
        sums["chunks"] += float(real_chunks.sum())
        sums["correct_chunks"] += float(hits.sum())
        sums["token_nats"] += float(token_nats.double().sum())
        totals["distortion"] += distortion.double().cpu().numpy()
        real_codes = codes[real_chunks].cpu().numpy()
        for level, counts in enumerate(totals["code_counts"]):
            counts += np.bincount(real_codes[:, level], minlength=len(counts))
        totals["token_counts"] += np.bincount(
            input_ids[real].cpu().numpy(), minlength=len(totals["token_counts"])
        )
        progress.update(len(input_ids))
    progress.close()
    return totals | sums


def unigram_nats(data: Path, test_counts: np.ndarray) -> float:
    """Negative log-likelihood of the counted tokens under the training split's frequencies, add-one smoothed."""
    train = TokenDataset(data, "train")
    counts = np.ones(len(test_counts))
    for start in range(0, len(train), 256):
        batch = train.read(range(start, min(start + 256, len(train))))
        counts += np.bincount(batch["input_ids"][batch["document_ids"] > 0].numpy(), minlength=len(counts))
    # Entries beyond the tokenizer's vocabulary can never occur.
    counts[train.vocab_size :] = 0
    shares = counts / counts.sum()
    seen = test_counts > 0
    return float(-(test_counts[seen] * np.log(shares[seen])).sum())


@torch.inference_mode()
def codebook_report(
    models: Models, totals: dict[str, Any], dataset: TokenDataset, batch_size: int, device: torch.device
) -> dict[str, Any]:
    """Usage over the whole split by level, and what decoding with the first levels only gives."""
    vae, chunks = models.codec, totals["chunks"]
    levels = []
    hits, seen = np.zeros(vae.config.codebook_levels), 0.0
    for start in range(0, min(DISTORTION_SAMPLES, len(dataset)), batch_size):
        batch = dataset.read(range(start, min(start + batch_size, DISTORTION_SAMPLES, len(dataset))))
        input_ids, token_documents = batch["input_ids"].to(device), batch["document_ids"].to(device)
        codes = vae.encode(input_ids, document_ids=token_documents)
        documents = chunk_documents(token_documents, vae.config.compression_factor)
        real = token_documents > 0
        seen += float(real.sum())
        for level in range(len(hits)):
            predicted = vae.decode(codes[..., : level + 1], documents).argmax(-1)
            hits[level] += float(((predicted == input_ids) & real).sum())
    for level, counts in enumerate(totals["code_counts"]):
        perplexity = float(compute_perplexity(torch.from_numpy(counts)))
        row = {
            "codebook_size": len(counts),
            "perplexity": perplexity,
            "perplexity_normalized": perplexity / min(len(counts), chunks),
            "used_fraction": float((counts > 0).mean()),
            "distortion": float(totals["distortion"][level] / chunks),
            "token_accuracy": float(hits[level] / seen),
        }
        if isinstance(vae, RQVAE):
            row["dead_replaced"] = int(vae.quantizer.level(level).dead_replaced)
        if models.latent_model is not None:
            row["nats_per_code"] = float(totals["code_nats"][level] / chunks)
        levels.append(row)
    return {"levels": levels, "histograms": [histogram(counts) for counts in totals["code_counts"]]}


def histogram(counts: np.ndarray, num_bins: int = 256) -> list[float]:
    """Counts from the most used code to the least, in at most `num_bins` bins of neighbours (their mean)."""
    return [float(part.mean()) for part in np.array_split(np.sort(counts)[::-1], min(num_bins, len(counts)))]


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


def compute_report(project: Path) -> dict[str, Any]:
    """Tokens, FLOPs and seconds of training, by stage, from the run directories beside the models."""
    report: dict[str, Any] = {}
    for stage in ("base_lm", "rqvae", "rq_transformer"):
        run = project / stage
        if not (run / "config.yaml").is_file():
            continue
        config = load_config(run / "config.yaml")
        train, length = config.train, config.data.sample_length
        records = read_metrics(run / "metrics.jsonl")
        steps = max((record["step"] for record in records), default=0)
        tokens_per_step = train.global_batch_size * length
        if stage == "base_lm":
            architecture = config.codec.backbone.architecture
            total = 3 * steps * (flops.backbone(architecture, length / 2) + flops.head(architecture))
        elif stage == "rqvae":
            codec = flops.codec(config.codec, length)
            frozen = min(steps, train.frozen_steps)
            total = frozen * codec.train_frozen + (steps - frozen) * codec.train_full
        else:
            factor = config.codec.compression_factor
            name = "RQTransformer" if config.latent_model.model == "rq_transformer" else "FlatTransformer"
            forward = flops.latent_model(name, latent_model_config(config), length / factor)
            total = 3 * steps * forward / factor
        report[stage] = {
            "steps": steps,
            "train_tokens": steps * tokens_per_step,
            "train_flops": total * tokens_per_step,
            "wall_s": max((record.get("time_s", 0.0) for record in records), default=0.0),
        }
    return report


if __name__ == "__main__":
    sys.exit(main())
