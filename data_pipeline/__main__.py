"""Commands on token shards and codes: `python -m data_pipeline {build,deduplicate,verify,inspect,stats} --help`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.config import DataConfig
from data_pipeline.yaml_config import ConfigError, apply_overrides, read_yaml, validate
from rqvae.config import StrictModel

if TYPE_CHECKING:
    from data_pipeline.manifest import Manifest


_GRIDS = (1, 2, 4, 8, 16, 32)


class _DataSection(StrictModel):
    data: DataConfig


def read_data_config(path: str, overrides: Sequence[str]) -> DataConfig:
    """The `data:` section of a run config; its other sections are left to the commands that own them.

    Raises:
        ConfigError: lists all mistakes; an override of another section is one.
    """
    foreign = [override for override in overrides if not override.startswith("data.")]
    if foreign:
        raise ConfigError(
            "command line",
            [
                f"{override!r}: this command reads only the section data; write data.NAME=value"
                for override in foreign
            ],
        )
    values = apply_overrides(read_yaml(path), overrides)
    return validate(_DataSection, {name: values[name] for name in ("data",) if name in values}, path).data


def _summary(manifest: Manifest) -> str:
    lines = [f"{'split':<12}{'samples':>12}{'tokens':>15}{'documents':>12}{'text MB':>10}{'shards':>8}"]
    for name, split in manifest.splits.items():
        lines.append(
            f"{name:<12}{split.samples:>12,}{split.real_tokens:>15,}{split.documents:>12,}"
            f"{split.bytes / 1e6:>10.2f}{len(split.shards):>8}"
        )
    duplicates = manifest.source.description.get("exact_duplicates")
    if isinstance(duplicates, dict) and "removed" in duplicates:
        lines.append(
            f"exact duplicates left out: {duplicates['removed']:,} of {duplicates['documents']:,} documents"
        )
    return "\n".join(lines)


def _run_task(arguments: argparse.Namespace, config: DataConfig, task: Callable[..., None]) -> int:
    """One task of several of the command that was given, and what follows."""
    task(config, arguments.task_index, arguments.num_tasks, num_workers=arguments.num_workers or 1)
    print(
        f"task {arguments.task_index} of {arguments.num_tasks} is done; when all are: "
        f"python -m data_pipeline {arguments.command} --config {arguments.config} --merge"
    )
    return 0


def _build(arguments: argparse.Namespace) -> int:
    from data_pipeline import builder

    config = read_data_config(arguments.config, arguments.overrides)
    if arguments.task_index is not None:
        return _run_task(arguments, config, builder.build_task)
    if arguments.merge:
        manifest = builder.merge(config)
    else:
        manifest = builder.build(config, replace=arguments.replace, num_workers=arguments.num_workers)
    print(_summary(manifest))
    print(f"token shards: {config.directory} (fingerprint {manifest.fingerprint[:16]})")
    print(f"next: deepspeed launch/train.py --config {arguments.config} --stage base_lm")
    return 0


def _deduplicate(arguments: argparse.Namespace) -> int:
    from data_pipeline import builder

    config = read_data_config(arguments.config, arguments.overrides)
    if arguments.task_index is not None:
        return _run_task(arguments, config, builder.deduplicate_task)
    if arguments.merge:
        builder.merge_duplicates(config)
    else:
        builder.deduplicate(config, num_workers=arguments.num_workers)
    print(f"the duplicates are known; next: python -m data_pipeline build --config {arguments.config}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from data_pipeline.verification import verify

    damage = verify(arguments.directory, arguments.num_workers)
    for line in damage:
        print(line)
    if damage:
        print(
            f"{arguments.directory}: {len(damage)} problems; restore the files or build again with --replace"
        )
        return 1
    print(f"{arguments.directory}: every hash, count and sample is as it was written")
    return 0


def _holds_codes(directory: str) -> bool:
    from data_pipeline.code_manifest import CODE_MANIFEST_NAME

    return (Path(directory) / CODE_MANIFEST_NAME).is_file()


def _inspect_codes(arguments: argparse.Namespace) -> int:
    from data_pipeline.code_manifest import load_code_manifest
    from data_pipeline.code_statistics import read_codes
    from data_pipeline.errors import EmptySplitError

    manifest = load_code_manifest(arguments.directory)
    print(json.dumps(manifest.model_dump(mode="json", exclude={"splits"}), indent=2))
    for name, shards in manifest.splits.items():
        print(f"{name:<12}{sum(shard.samples for shard in shards):>12,} samples{len(shards):>8} shards")
    if arguments.split not in manifest.splits:
        raise EmptySplitError(
            f"{arguments.directory}: the split {arguments.split!r} was not encoded; there are: "
            f"{', '.join(manifest.splits)}"
        )
    shown = islice(read_codes(arguments.directory, manifest, arguments.split), arguments.samples)
    for index, codes in enumerate(shown):
        print(f"--- {arguments.split} sample {index}, a latent in brackets")
        print(" ".join(f"[{' '.join(map(str, latent))}]" for latent in codes))
    return 0


def _stats_of_codes(arguments: argparse.Namespace) -> int:
    from data_pipeline.code_manifest import load_code_manifest
    from data_pipeline.code_statistics import level_statistics

    manifest = load_code_manifest(arguments.directory)
    layout = manifest.layout
    bits = sum(math.log2(size) for size in layout.codebook_sizes) / layout.compression_factor
    for split, shards in manifest.splits.items():
        samples = sum(shard.samples for shard in shards)
        print(
            f"{split}: {samples:,} samples, {samples * layout.shape[0]:,} latents of "
            f"K={layout.compression_factor} tokens, padding among them; at most {bits:.3f} bits per token"
        )
        for level, of_level in enumerate(level_statistics(arguments.directory, manifest, split), 1):
            print(
                f"  level {level:>2}  {of_level.used:>8,} of {of_level.size:,} codes used, perplexity "
                f"{of_level.perplexity:,.1f}"
            )
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    if _holds_codes(arguments.directory):
        return _inspect_codes(arguments)
    from data_pipeline.dataset import TokenDataset
    from data_pipeline.manifest import load_manifest
    from data_pipeline.tokenizer import load_tokenizer

    manifest = load_manifest(arguments.directory)
    print(json.dumps(manifest.model_dump(mode="json", exclude={"splits"}), indent=2, ensure_ascii=False))
    print(_summary(manifest))
    dataset = TokenDataset(arguments.directory, arguments.split)
    tokenizer = load_tokenizer(arguments.directory)
    for index in range(min(arguments.samples, len(dataset))):
        batch = dataset.read([index])
        for number in range(1, int(batch["document_ids"].max()) + 1):
            segment = batch["input_ids"][batch["document_ids"] == number]
            print(f"--- {arguments.split} sample {index}, segment {number}, {len(segment)} tokens")
            print(tokenizer.decode(segment))
    return 0


def _stats(arguments: argparse.Namespace) -> int:
    if _holds_codes(arguments.directory):
        return _stats_of_codes(arguments)
    from data_pipeline.manifest import load_manifest
    from data_pipeline.statistics import split_statistics

    for split, entry in load_manifest(arguments.directory).splits.items():
        if not entry.samples:
            continue
        stats = split_statistics(arguments.directory, split)
        print(
            f"{split}: {stats.samples:,} samples, {stats.documents:,} documents, {stats.real_tokens:,} tokens\n"
            f"  bytes per token        {stats.bytes_per_token:.3f}\n"
            f"  padding                {stats.padding_fraction:.2%} of all positions\n"
            f"  tokens per document    {stats.mean_document_tokens:.1f} on average\n"
            f"  segments per document  {stats.segments_per_document:.3f}\n"
            "  padding to expect of another data.document_grid\n    "
            + ", ".join(f"{grid}: {stats.expected_padding(grid):.2%}" for grid in _GRIDS)
            + "\n  documents by length in tokens"
        )
        most = max(stats.length_histogram.values())
        for length, count in stats.length_histogram.items():
            print(f"  {length:>8,} to {2 * length - 1:>9,} {count:>10,} {'#' * round(40 * count / most)}")
    return 0


def _add_work_arguments(parser: argparse.ArgumentParser) -> None:
    """What the commands share that go through the whole source."""
    parser.add_argument("--config", required=True, help="YAML of the run; its section `data` is read")
    parser.add_argument(
        "--num-workers", type=int, default=None, help="processes (default: cores; 1 in a task)"
    )
    parser.add_argument(
        "--task-index", type=int, default=None, help="do only this task's parts of the source (0-based)"
    )
    parser.add_argument("--num-tasks", type=int, default=1, help="how many tasks share the source")
    parser.add_argument("--merge", action="store_true", help="finish once all tasks are done")
    parser.add_argument(
        "overrides", nargs="*", metavar="data.NAME=VALUE", help="overrides of the section `data`"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="text to token shards; does only what is missing")
    _add_work_arguments(build)
    build.add_argument(
        "--replace", action="store_true", help="build anew over shards of another configuration"
    )
    build.set_defaults(run=_build)

    deduplicate = commands.add_parser(
        "deduplicate", help="only find the exact duplicates, in tasks; build does it by itself"
    )
    _add_work_arguments(deduplicate)
    deduplicate.set_defaults(run=_deduplicate)

    verify = commands.add_parser("verify", help="re-hash and re-count everything; exit code 1 on damage")
    verify.add_argument("directory", help="directory of token shards or of codes")
    verify.add_argument("--num-workers", type=int, help="processes (default: one per core for many shards)")
    verify.set_defaults(run=_verify)

    inspect = commands.add_parser("inspect", help="print the manifest and decoded samples, or codes")
    inspect.add_argument("directory", help="directory of token shards or of codes")
    inspect.add_argument("--split", default="train")
    inspect.add_argument("--samples", type=int, default=2, help="samples to decode")
    inspect.set_defaults(run=_inspect)

    stats = commands.add_parser(
        "stats", help="lengths, bytes per token and packing loss of every split; use of every code"
    )
    stats.add_argument("directory", help="directory of token shards or of codes")
    stats.set_defaults(run=_stats)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what is done is kept, and the same command goes on from there", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
