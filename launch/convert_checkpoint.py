"""Turn a training checkpoint into a model directory.

    python launch/convert_checkpoint.py runs/tiny/rqvae runs/tiny/model/rqvae --to safetensors

SRC is a run directory (its newest complete checkpoint is taken) or one checkpoint in it. The result loads with
`from_pretrained`; a base LM becomes a plain Hugging Face directory. The tokenizer is written beside it.

    python launch/convert_checkpoint.py MODEL.gguf runs/pretrained/NAME --to huggingface

makes a Hugging Face directory, weights in fp32 and tokenizer, of a GGUF file of a Llama or Qwen3 model.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer

from data_pipeline import load_tokenizer
from launch import checkpoints, tasks
from launch.config import load_config
from launch.shards import ShardedState
from rqvae.backbone import BaseLM, load_pretrained
from rqvae.gguf_file import GGUFModel


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="run directory, checkpoint or GGUF file")
    parser.add_argument("destination", type=Path, metavar="DST", help="directory to create")
    parser.add_argument(
        "--to", required=True, choices=["safetensors", "huggingface"], help="format of the result"
    )
    args = parser.parse_args(arguments)
    try:
        {"safetensors": to_safetensors, "huggingface": to_huggingface}[args.to](args.source, args.destination)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Model: {args.destination}")
    return 0


def to_safetensors(source: Path, destination: Path) -> None:
    """Consolidate a checkpoint into a model directory and check what was written.

    Raises:
        ValueError: no complete checkpoint, or the destination exists with other content.
    """
    run_directory, checkpoint = locate(source)
    refuse_filled(destination)
    config = load_config(run_directory / "config.yaml")
    task = tasks.TASKS[config.stage](config)  # type: ignore[index]
    model = task.create_model()
    tasks.load_state(model, ShardedState(checkpoint), checkpoint.directory)
    partial = destination.with_name(destination.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)  # type: ignore[operator]
    verify(model, task.load_model(partial))
    # The destination comes last: where it is, all is there.
    load_tokenizer(config.data.directory).save_pretrained(destination.parent / "tokenizer")
    partial.replace(destination)


def to_huggingface(source: Path, destination: Path) -> None:
    """Write weights and tokenizer of a GGUF file in Hugging Face layout.

    Raises:
        ValueError: it is no such file, something in it does not fit, or the destination is not empty.
    """
    if source.suffix != ".gguf":
        raise ValueError(
            f"--to huggingface converts a *.gguf file, which '{source}' is not; use --to safetensors"
        )
    refuse_filled(destination)
    gguf = GGUFModel(source)
    model = BaseLM(gguf.architecture, eos_token_id=0)
    load_pretrained(str(source), model.lm.model, model.lm.lm_head)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # transformers takes one special token for another here.
    for name, token in gguf.special_tokens().items():
        setattr(tokenizer, name, token)
    if tokenizer.get_vocab() != {token: index for index, token in enumerate(gguf.tokens())}:
        raise ValueError(
            f"transformers rebuilds the tokenizer of '{source}' with other ids than are in the file"
        )
    partial = destination.with_name(destination.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    verify(model, BaseLM.from_pretrained(partial, eos_token_id=0))
    tokenizer.save_pretrained(partial)
    partial.replace(destination)


def refuse_filled(destination: Path) -> None:
    """Never write over anything."""
    if destination.exists() and any(destination.iterdir()):
        raise ValueError(f"'{destination}' is not empty; remove it or choose another directory")


def locate(source: Path) -> tuple[Path, checkpoints.Checkpoint]:
    """The run directory and the checkpoint that `source` means.

    Raises:
        ValueError: it is neither, or nothing in it is complete.
    """
    if (source / "config.yaml").is_file():
        return source, checkpoints.require_newest(source / "checkpoints")
    run_directory = source.parent.parent
    if not (run_directory / "config.yaml").is_file():
        raise ValueError(f"'{source}' is neither a run directory nor a checkpoint in one")
    for checkpoint in checkpoints.find_complete(source.parent):
        if checkpoint.directory == source:
            return run_directory, checkpoint
    raise ValueError(
        f"'{source}' is not a complete checkpoint; the newest complete one is found by naming "
        f"'{run_directory}' instead"
    )


def verify(written: nn.Module, read: nn.Module) -> None:
    """Every tensor reads back as it was written."""
    expected = written.state_dict()
    for name, tensor in read.state_dict().items():
        if not torch.equal(tensor, expected[name]):
            raise RuntimeError(f"'{name}' reads back with other values than were written; is the disk sound?")


if __name__ == "__main__":
    sys.exit(main())
