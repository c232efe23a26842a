"""The whole chain, from text to report, as a user would type it.

    python launch/demo.py [--config configs/tiny.yaml] [--ranks 2] [a.b=value ...]

Every step is a command of its own and is printed before it runs. A step is skipped when what it reads and what it
wrote are, by content, what they were when it finished; training that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from launch import run_status
from launch.config import RunConfig, load_config
from launch.paths import codes_directory, model_directory, project_directory, run_directory
from launch.report_data import read_report

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Step:
    """One command of the chain."""

    name: str
    command: list[str]
    inputs: list[Path]
    """Files and directories that the result depends on."""
    outputs: list[Path]
    threads: int | None = None
    """OMP_NUM_THREADS of each process; None leaves it alone."""
    run_directory: Path | None = None
    """Of training, whose STATUS has the last word: `deepspeed` exits with 0 when a signal ended its lower process."""


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status of the first step that failed, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/tiny.yaml")
    parser.add_argument("--ranks", type=int, default=2, help="processes that train together")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    args = parser.parse_args(arguments)
    overrides = ["name=demo", *args.overrides]
    try:
        config = load_config(args.config, overrides=overrides)
        if not only(args.overrides, "data.directory="):
            # The demo keeps everything in one place.
            overrides.append(f"data.directory={project_directory(config) / 'data'}")
            config = load_config(args.config, overrides=overrides)
        if config.codec.model == "identity":
            raise ValueError(
                "codec.model: identity has no codec stages, so it is not run as a demo; start it as the head of "
                "configs/sweeps/identity.yaml says"
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    project = project_directory(config)
    steps = chain(config, args.config, overrides, args.ranks)
    started = time.monotonic()
    for number, step in enumerate(steps, 1):
        record = project / "demo" / f"{step.name}.json"
        if is_done(step, record):
            print(f"[{number}/{len(steps)}] {step.name}: done already", flush=True)
            continue
        print(f"[{number}/{len(steps)}] {step.name}: {shlex.join(step.command)}", flush=True)
        if not was_interrupted(step, record):
            remove_outputs(step, project)
        mark(step, record, finished=False)
        begin = time.monotonic()
        status = run(step)
        if status != 0:
            print(
                f"error: {step.name} ended with status {status}; start the demo again to go on from here",
                file=sys.stderr,
            )
            return status
        mark(step, record, finished=True, seconds=time.monotonic() - begin)
        print(f"    {time.monotonic() - begin:.0f} s", flush=True)
    summarise(project, steps, time.monotonic() - started)
    return 0


def chain(config: RunConfig, path: str, overrides: list[str], ranks: int) -> list[Step]:
    """All steps in order."""
    project, models, codes = project_directory(config), model_directory(config), codes_directory(config)
    data = Path(config.data.directory)
    report = project / "report.json"
    manifest = data / "manifest.json"
    python = sys.executable
    with_config = ["--config", path]
    of_models = ["--model", str(models), "--data", str(data)]
    threads = max(1, (os.cpu_count() or 1) // ranks)

    def train(stage: str, inputs: list[Path], *extra: str) -> list[Step]:
        directory = run_directory(config, stage)  # type: ignore[arg-type]
        launcher = str(Path(python).with_name("deepspeed"))
        # A free port, so that another job on this machine does not get in the way.
        command = [launcher, "--num_accelerators", str(ranks), "--master_port", str(free_port())]
        command += ["launch/train.py", *with_config, "--stage", stage, *overrides, *extra]
        convert = [python, "launch/convert_checkpoint.py", str(directory), str(models / stage)]
        return [
            Step(
                f"train-{stage}",
                command,
                [Path(path), manifest, *inputs],
                [directory / "checkpoints", directory / "metrics.jsonl"],
                threads,
                directory,
            ),
            Step(
                f"convert-{stage}",
                [*convert, "--to", "safetensors"],
                [directory / "checkpoints"],
                [models / stage, models / "tokenizer"],
            ),
        ]

    metrics = [project / stage / "metrics.jsonl" for stage in ("base_lm", "rqvae", "rq_transformer")]
    return [
        Step(
            "build-data",
            [python, "-m", "data_pipeline", "build", *with_config, *only(overrides, "data.")],
            [Path(path)],
            [manifest],
        ),
        *train("base_lm", []),
        *train("rqvae", [models / "base_lm"], f"codec.backbone.pretrained={models / 'base_lm'}"),
        Step(
            "precompute-codes",
            [
                python,
                "launch/precompute_codes.py",
                *with_config,
                "--checkpoint",
                str(models / "rqvae"),
                *(["--latents"] if config.for_stage("rq_transformer").train.stochastic_codes else []),
                *overrides,
            ],
            [manifest, models / "rqvae"],
            [codes],
        ),
        *train("rq_transformer", [codes]),
        Step(
            "evaluate",
            [*[python, "launch/eval.py"], *of_models, "--json", str(report), *with_config, *overrides],
            [Path(path), manifest, models],
            [],
        ),
        Step(
            "benchmark",
            [
                *[python, "launch/benchmark.py", "inference", "--rows", "generate,lean,deferred,streaming"],
                *[*of_models, "--report", str(report), *with_config, *overrides],
            ],
            [Path(path), manifest, models],
            [],
        ),
        Step(
            "generate",
            [python, "launch/generate.py", "--model", str(models), "--prompt", config.evaluation.prompts[0]],
            [models],
            [],
        ),
        Step(
            "report",
            [python, "launch/report.py", str(project)],
            [report, *metrics],
            [project / "report.html"],
        ),
    ]


def only(overrides: list[str], prefix: str) -> list[str]:
    """The overrides of one section."""
    return [override for override in overrides if override.startswith(prefix)]


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def remove_outputs(step: Step, project: Path) -> None:
    """Remove what the step made from other inputs. Shared data stays: its build knows what it can keep."""
    for output in step.outputs:
        path = REPOSITORY / output
        if not path.is_relative_to(REPOSITORY / project):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def run(step: Step) -> int:
    """Run the command from the repository; returns its exit status, or 1 if training does not say it is done."""
    environment = dict(os.environ)
    if step.threads is not None:
        environment["OMP_NUM_THREADS"] = str(step.threads)
    directory = None if step.run_directory is None else REPOSITORY / step.run_directory
    if directory is not None:
        (directory / run_status.FILE).unlink(missing_ok=True)  # what it says of an earlier start
    status = subprocess.run(step.command, cwd=REPOSITORY, env=environment, check=False).returncode
    if status == 0 and directory is not None:
        return int(run_status.read(directory).get("state") != "finished")
    return status


def is_done(step: Step, record: Path) -> bool:
    """The step finished before, reading and writing exactly what is there now."""
    known = recorded(record)
    return known is not None and known == {**inputs_of(step), "outputs": content_hash(step.outputs)}


def was_interrupted(step: Step, record: Path) -> bool:
    """The step was started on what is there now and did not finish: it goes on from where it stopped."""
    return recorded(record) == {**inputs_of(step), "outputs": None}


def recorded(record: Path) -> dict[str, str | None] | None:
    """State noted by `mark`, None if there is none that can be read."""
    try:
        return json.loads(record.read_text())["state"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return None


def mark(step: Step, record: Path, finished: bool, seconds: float = 0.0) -> None:
    """Note what the step reads and, when it has finished, what it wrote."""
    record.parent.mkdir(parents=True, exist_ok=True)
    state = {**inputs_of(step), "outputs": content_hash(step.outputs) if finished else None}
    record.write_text(json.dumps({"state": state, "wall_s": seconds}, indent=2) + "\n")


def inputs_of(step: Step) -> dict[str, str | None]:
    """What the step depends on: its command (but for the port) and the content of its inputs."""
    port = step.command.index("--master_port") + 1 if "--master_port" in step.command else None
    command = [word for index, word in enumerate(step.command) if index != port]
    return {"command": shlex.join(command), "inputs": content_hash(step.inputs)}


def content_hash(paths: list[Path]) -> str:
    """sha256 over names and contents of files, directories with all that is in them; what is missing counts."""
    digest = hashlib.sha256()
    for path in paths:
        root = REPOSITORY / path
        files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
        for file in files:
            digest.update(
                str(file.relative_to(REPOSITORY) if file.is_relative_to(REPOSITORY) else file).encode()
            )
            digest.update(hash_file(file) if file.is_file() else b"missing")
    return digest.hexdigest()


def hash_file(path: Path) -> bytes:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def summarise(project: Path, steps: list[Step], seconds: float) -> None:
    """The few figures that matter, quality and speed together, and where to go on."""
    report = read_report(REPOSITORY / project / "report.json")
    bits, speed = report["bits_per_byte"], report["speed"]
    rows = [
        ("reconstruction, token accuracy", f"{report['reconstruction']['token_accuracy']:.4f}"),
        ("rate of the codes, bits per token", f"{report['rate']['codes_bits_per_token']:.1f}"),
        ("bits per byte: latent model (bound)", f"{bits['latent_bound']:.3f}"),
        ("bits per byte: base LM", f"{bits['base_lm']:.3f}"),
        ("bits per byte: unigram", f"{bits['unigram']:.3f}"),
        ("bits per byte: uniform", f"{bits['uniform']:.3f}"),
        ("speed over transformers generate", f"{speed['speedup']:.2f}x"),
        ("speed over a lean loop of the base LM", f"{speed['speedup_over_lean_loop']:.2f}x"),
    ]
    print("\n" + "\n".join(f"  {name:42}{value:>10}" for name, value in rows))
    records = [project / "demo" / f"{step.name}.json" for step in steps]
    work = sum(json.loads((REPOSITORY / record).read_text())["wall_s"] for record in records)
    print(
        f"\n{work / 60:.1f} minutes of work in all, {seconds / 60:.1f} now.\n"
        f"Report: {project / 'report.html'} (figures: {project / 'report.json'})\n"
        f'Next:   python launch/generate.py --model {project / "model"} --prompt "Returns the"\n'
        f"        python launch/demo.py --config configs/small.yaml name=small   (about two hours)"
    )


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    sys.exit(main())
