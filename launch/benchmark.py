"""Measure speed and memory, side by side in one run on an idle machine.

    python launch/benchmark.py inference --model runs/tiny/model --data runs/data/python-docs \\
        --report runs/tiny/report.json
    python launch/benchmark.py inference --random configs/benchmarks/qwen3_0.6b.yaml --html runs/race.html
    python launch/benchmark.py quantizer
    python launch/benchmark.py loss
    python launch/benchmark.py latent
    python launch/benchmark.py loader
    python launch/benchmark.py build
    python launch/benchmark.py training --config configs/tiny.yaml

The rows of a table take turns, so that a slow moment of the machine hits all of them. Medians of all turns after a
warm-up. `--json F` writes the figures and the environment to F.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from launch import race_command
from launch.benchmark_build import BuildShape, benchmark_build, print_build
from launch.benchmark_latent import Grid, benchmark_latent, print_latent
from launch.benchmark_loader import SHAPE, benchmark_loader, print_loader
from launch.benchmark_loss import FULL, TIMED, LossShape, benchmark_loss, print_loss
from launch.benchmark_quantizer import SHAPES, Shape, benchmark_quantizer, print_quantizer
from launch.benchmark_training import benchmark_training, print_training
from launch.loader_rows import LoaderShape
from launch.race_command import AXES, names_of
from launch.race_page import write_race
from launch.race_rows import NAMES
from launch.race_table import print_run
from launch.report_data import update_report


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    inference = commands.add_parser("inference", help="latent decoding against autoregressive decoding")
    add_inference_arguments(inference)
    quantizer = commands.add_parser("quantizer", help="residual quantizer against vector-quantize-pytorch")
    quantizer.add_argument("--shape", type=int, nargs=4, metavar=("DIM", "C", "D", "N"), help="only this one")
    loss = commands.add_parser("loss", help="the head's cross-entropy against full logits")
    sizes = ("VOCABULARY", "HIDDEN", "TOKENS")
    loss.add_argument("--timed", type=int, nargs=3, metavar=sizes, default=TIMED, help="to compare time at")
    loss.add_argument("--full", type=int, nargs=3, metavar=sizes, default=FULL, help="to measure memory at")
    latent = commands.add_parser("latent", help="RQ-transformer against the flat transformer")
    latent.add_argument("--tokens", type=int, nargs="+", default=Grid().tokens, help="T, tokens per sample")
    latent.add_argument("--levels", type=int, nargs="+", default=Grid().levels, help="D, codes per position")
    loader = commands.add_parser(
        "loader", help="reading samples against webdataset, litdata and mosaicml-streaming"
    )
    loader.add_argument("--samples", type=int, default=SHAPE.samples, help="in the data set")
    loader.add_argument("--length", type=int, default=SHAPE.length, help="T, tokens per sample")
    loader.add_argument("--batch", type=int, default=SHAPE.batch, help="samples per batch")
    loader.add_argument("--workers", type=int, default=2, help="beside a single process")
    build = commands.add_parser("build", help="text to token shards against datatrove and datasets.map")
    build.add_argument("--mib", type=float, default=BuildShape().mib, help="text to tokenize")
    build.add_argument("--workers", type=int, default=BuildShape().workers, help="processes, and files")
    build.add_argument("--vocabulary", type=int, default=BuildShape().vocabulary, help="tokens of the BPE")
    training = commands.add_parser(
        "training", help="ZeRO-3 beside ZeRO-1 and DDP on one job; data must be built"
    )
    training.add_argument("--config", required=True, help="run configuration")
    training.add_argument("--stage", default="base_lm", choices=("base_lm", "rqvae", "rq_transformer"))
    training.add_argument("--ranks", type=int, default=2, help="processes on this machine")
    training.add_argument("--steps", type=int, default=30, help="per row")
    training.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings over the file's")
    for command in (quantizer, loss, latent, loader, build):
        command.add_argument("--repeats", type=int, default=5, help="turns of every row")
    for command in (inference, quantizer, loss, latent, loader, build, training):
        command.add_argument("--json", type=Path, help="file to write the result to")
    args = parser.parse_args(arguments)
    try:
        if args.command == "inference":
            result = race_command.run(args)
            print_run(result)
        elif args.command == "quantizer":
            shapes = (Shape(*args.shape),) if args.shape else SHAPES
            result = benchmark_quantizer(shapes, args.repeats)
            print_quantizer(result)
        elif args.command == "loss":
            result = benchmark_loss(LossShape(*args.timed), LossShape(*args.full), args.repeats)
            print_loss(result)
        elif args.command == "loader":
            shape = LoaderShape(args.samples, args.length, args.batch)
            result = benchmark_loader(shape, args.workers, args.repeats)
            print_loader(result)
        elif args.command == "build":
            result = benchmark_build(BuildShape(args.mib, args.workers, args.vocabulary), args.repeats)
            print_build(result)
        elif args.command == "training":
            result = benchmark_training(args.config, args.stage, args.ranks, args.steps, args.overrides)
            print_training(result)
        else:
            result = benchmark_latent(Grid(tuple(args.tokens), tuple(args.levels)), args.repeats)
            print_latent(result)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.command == "inference" and args.report:
        update_report(args.report, {"speed": result.pop("speed")})
        print(f"Report: {args.report}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")
        print(f"Result: {args.json}")
    if args.command == "inference":
        if args.html:
            print(f"Page: {write_race(result, args.html)}")
        print(race_command.next_steps(args))
    return 0


def add_inference_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `inference`, but for `--json`, which every benchmark has."""
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument("--model", type=Path, help="directory of the exported models")
    models.add_argument(
        "--random", metavar="CONFIG", help="random weights of this configuration's shapes: speed only"
    )
    parser.add_argument("--data", type=Path, help="token shards, for the prompts; with --model")
    parser.add_argument("--config", help="run configuration with a benchmark section; with --model")
    parser.add_argument("--report", type=Path, help="report.json whose `speed` is to be set; with --model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32, random bfloat16")
    parser.add_argument("--rows", type=names_of(NAMES), default=list(NAMES), metavar="ROW,...",
                        help=f"what races, of: {', '.join(NAMES)} (default: all)")  # fmt: skip
    parser.add_argument("--axis", type=names_of(AXES), default=[], metavar="AXIS,...",
                        help=f"further tables around the centre, along: {', '.join(AXES)}")  # fmt: skip
    parser.add_argument(
        "--assistant", type=Path, help="draft model: a directory; with --random an architecture's YAML file"
    )
    parser.add_argument(
        "--identity", type=Path, help="models on tokens as codes (default: identity_codec in --model)"
    )
    parser.add_argument("--html", type=Path, help="page to write the tables to")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=value", help="settings over the file's or the defaults"
    )


if __name__ == "__main__":
    sys.exit(main())
