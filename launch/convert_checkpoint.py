"""Turn a training checkpoint, or a foreign one, into something that can be used.

    python launch/convert_checkpoint.py runs/tiny/rqvae runs/tiny/model/rqvae --to safetensors

SRC is a run directory (its newest complete checkpoint is taken) or one checkpoint in it. The result loads with
`from_pretrained`; a base LM becomes a plain Hugging Face directory. The tokenizer is written beside it. Tensors pass
through one by one, so a model larger than the memory can be converted.

    python launch/convert_checkpoint.py runs/tiny/joint runs/tiny/model --to safetensors

makes two models of the stage joint, `rqvae` and `rq_transformer` in DST.

    python launch/convert_checkpoint.py runs/tiny/rqvae runs/tiny/universal --to universal

makes DeepSpeed's universal checkpoint, with what that leaves out in `not_universal.safetensors`. DeepSpeed's own
program does it, and needs the memory that is printed at the end. (Training resumes on another number of ranks
without it.)

    python launch/convert_checkpoint.py MODEL.gguf runs/pretrained/NAME --to huggingface

makes a Hugging Face directory, weights in fp32 and tokenizer, of a GGUF file of a Llama or Qwen3 model. With a
directory in that layout, or a hub id, for MODEL it is a copy: `model/base_lm` of a project whose backbone is
pretrained, which evaluation and benchmark compare with.

    python launch/convert_checkpoint.py rq_vae_final.pt DST --to safetensors --config CONFIG

makes a codec of a checkpoint of charleslow/rq_vae, if it can be expressed exactly; CONFIG says which (`codec`).

To start a run from a converted model: `stages.STAGE.initial_weights=DST`.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from data_pipeline import load_tokenizer
from launch import checkpoints, tasks
from launch.config import load_config
from launch.reference_checkpoint import check_config, convert_reference, read_reference
from launch.safetensors_files import verify_tensors, write_tensors
from launch.shards import ShardedState
from rqvae import RQVAE
from rqvae.backbone import BaseLM, PretrainedLM, load_pretrained
from rqvae.gguf_file import GGUFModel
from rqvae.joint import RQVAEWithPrior
from rqvae.loading import load_codec
from rqvae.persistence import save_config


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="run directory, checkpoint, GGUF file or reference .pt"
    )
    parser.add_argument("destination", type=Path, metavar="DST", help="directory to create")
    parser.add_argument(
        "--to",
        required=True,
        choices=["safetensors", "huggingface", "universal"],
        help="format of the result",
    )
    parser.add_argument("--config", type=Path, help="run configuration, for a .pt of charleslow/rq_vae only")
    args = parser.parse_args(arguments)
    try:
        if (args.source.suffix == ".pt") != (args.config is not None):
            raise ValueError("--config is needed for a .pt file, and for nothing else")
        if args.config is not None:
            from_reference(args.source, args.destination, args.config)
        else:
            {"safetensors": to_safetensors, "huggingface": to_huggingface, "universal": to_universal}[
                args.to
            ](args.source, args.destination)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Model: {args.destination}")
    return 0


def to_safetensors(source: Path, destination: Path) -> None:
    """Consolidate a checkpoint into a model directory and check what was written.

    Raises:
        ValueError: no complete checkpoint, or it does not fit its configuration.
    """
    run_directory, checkpoint = locate(source)
    config = load_config(run_directory / "config.yaml")
    task = tasks.create_task(config)
    with torch.device("meta"):
        model = task.create_model()
    state = ShardedState(checkpoint)
    tasks.check_fits(model.state_dict(), state, checkpoint.directory)
    if isinstance(model, RQVAEWithPrior):
        write_joint(model, state, destination)
        load_tokenizer(config.data.directory).save_pretrained(destination / "tokenizer")
        return
    refuse_filled(destination)
    partial = empty_partial(destination)
    write_model(model, state.tensor, partial)
    # The destination comes last: where it is, all is there.
    load_tokenizer(config.data.directory).save_pretrained(destination.parent / "tokenizer")
    partial.replace(destination)


def write_joint(model: RQVAEWithPrior, state: ShardedState, destination: Path) -> None:
    """Write codec and latent model of the stage joint as directories of their own, the latent model with the hash of
    its codec.

    Raises:
        ValueError: one of them is there already.
    """
    parts = {"rqvae": (model.codec, "codec."), "rq_transformer": (model.prior, "prior.")}
    for name in parts:
        refuse_filled(destination / name)
    for name, (part, prefix) in parts.items():
        if name == "rq_transformer":
            codec_hash = load_codec(destination / "rqvae").codec_hash()
            model.prior.config = model.prior.config.model_copy(update={"codec_hash": codec_hash})
        partial = empty_partial(destination / name)
        write_model(part, _with_prefix(state, prefix), partial)
        partial.replace(destination / name)


def _with_prefix(state: ShardedState, prefix: str) -> Callable[[str], Tensor]:
    return lambda name: state.tensor(prefix + name)


def from_reference(source: Path, destination: Path, config_path: Path) -> None:
    """Make a codec of a reference checkpoint.

    Raises:
        ValueError: the file is refused, or cannot be expressed exactly; lists why.
    """
    reference_config, reference_state = read_reference(source)
    refuse_filled(destination)
    codec = load_config(config_path).codec
    check_config(source, reference_config, reference_state, codec)
    with torch.device("meta"):
        model = RQVAE(codec)
    state = convert_reference(source, reference_state, model.state_dict())
    partial = empty_partial(destination)
    write_model(model, state.__getitem__, partial)
    partial.replace(destination)


def write_model(model: nn.Module, read: Callable[[str], Tensor], directory: Path) -> None:
    """What `model.save_pretrained` would write, with tensors from `read`, one at a time; then read back.

    Args:
        model: on the meta device.
        read: gives the tensor of a name in the model's state dictionary.
    """
    directory.mkdir(parents=True)
    prefix = "lm." if isinstance(model, BaseLM) else ""
    unique: dict[int, str] = {}  # tied weights are written once, under their first name
    for name, tensor in model.state_dict(keep_vars=True).items():
        unique.setdefault(id(tensor), name)
    like = {name.removeprefix(prefix): model.state_dict()[name] for name in unique.values()}

    def read_prefixed(name: str) -> Tensor:
        return read(prefix + name)

    write_tensors(directory, like, read_prefixed)
    verify_tensors(directory, like, read_prefixed)
    if isinstance(model, BaseLM):
        model.lm.config.architectures = [type(model.lm).__name__]
        model.lm.config.dtype = torch.float32
        model.lm.config.save_pretrained(directory)
        model.lm.generation_config.save_pretrained(directory)
    else:
        save_config(model, model.config, directory)  # type: ignore[arg-type]


def to_universal(source: Path, destination: Path) -> None:
    """Make DeepSpeed's universal checkpoint of a ZeRO checkpoint.

    Raises:
        ValueError: no complete checkpoint, or one of ZeRO stage 0, which needs no conversion.
    """
    from deepspeed.checkpoint import ds_to_universal

    refuse_filled(destination)
    _, checkpoint = locate(source)
    if checkpoint.zero_stage == 0:
        raise ValueError(f"'{checkpoint.directory}' was written with zero_stage 0, which is whole already")
    partial = empty_partial(destination)
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(checkpoint.directory),
            output_folder=str(partial),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
    state = ShardedState(checkpoint)
    rest = {
        name: state.tensor(name).contiguous().clone() for name in state.names() if name not in state.shapes
    }
    save_file(rest, partial / "not_universal.safetensors")
    for name, shape in state.shapes.items():
        content = torch.load(partial / "zero" / name / "fp32.pt", mmap=True, weights_only=True)
        saved = content["param"] if isinstance(content, dict) else content  # a bare tensor under ZeRO-3
        if not torch.equal(saved.view(shape), state.tensor(name)):
            raise RuntimeError(f"'{name}' reads back with other values than were converted")
    partial.replace(destination)
    usages = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(f"Peak memory of a process: {max(usages) / 2**20:.2f} GiB")


def to_huggingface(source: Path, destination: Path) -> None:
    """Write weights and tokenizer of a GGUF file, or of a model in that layout, in Hugging Face layout.

    Raises:
        ValueError: it is no such model, something in it does not fit, or the destination is not empty.
    """
    refuse_filled(destination)
    if source.suffix != ".gguf":
        copy_huggingface(source, destination)
        return
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
    partial = empty_partial(destination)
    model.save_pretrained(partial)
    verify(model, BaseLM.from_pretrained(partial, eos_token_id=0))
    tokenizer.save_pretrained(partial)
    partial.replace(destination)


def copy_huggingface(source: Path, destination: Path) -> None:
    """Copy a pretrained model, from its directory or the hub, once it is known to load.

    Raises:
        ValueError: there is none, or it is of no kind that a backbone may be.
    """
    pretrained = PretrainedLM(str(source))
    partial = empty_partial(destination)
    partial.mkdir(parents=True)
    for file in sorted(pretrained.path.iterdir()):
        if file.suffix in (".safetensors", ".json"):
            shutil.copyfile(file, partial / file.name)  # the hub's cache has links
    BaseLM.from_pretrained(partial, eos_token_id=0)
    partial.replace(destination)


def refuse_filled(destination: Path) -> None:
    """Never write over anything."""
    if destination.exists() and any(destination.iterdir()):
        raise ValueError(f"'{destination}' is not empty; remove it or choose another directory")


def empty_partial(destination: Path) -> Path:
    """Where the result is made before it is moved to its place; nothing is there yet."""
    partial = destination.with_name(destination.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    return partial


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
