"""The whole chain, from text to report, as a user would type it.

    python launch/demo.py [--config configs/tiny.yaml] [--ranks 2] [a.b=value ...]

Every step is a command of its own and is printed before it runs. A step is skipped when what it reads and what it
wrote are, by content, what they were when it finished; training that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from launch.chain import chain, only
from launch.config import load_config
from launch.paths import project_directory
from launch.report_data import read_report
from launch.steps import REPOSITORY, Step, run_steps, seconds_of

RECORDS = "demo"
"""Directory in the project for what was done."""


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
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    project = project_directory(config)
    steps = chain(config, args.config, overrides, args.ranks)
    started = time.monotonic()
    failure = run_steps(steps, project, project / RECORDS)
    if failure is not None:
        print(
            f"error: {failure.step} ended with status {failure.status}; start the demo again to go on from here",
            file=sys.stderr,
        )
        return failure.status
    summarise(project, steps, time.monotonic() - started)
    return 0


def summarise(project: Path, steps: list[Step], seconds: float) -> None:
    """The few figures that matter, quality and speed together, and where to go on."""
    report = read_report(REPOSITORY / project / "report.json")
    bits, speed = report["bits_per_byte"], report["speed"]
    compute = report["compute"]
    rows = [
        ("bits per byte: latent model (bound)", f"{bits['latent_bound']:.3f}"),
        ("bits per byte: base LM", f"{bits['base_lm']:.3f}"),
        ("bound over base LM", f"{bits['latent_bound'] / bits['base_lm']:.2f}x"),
        (
            "training FLOPs over the base LM's",
            f"{compute['total_latent']['train_flops'] / compute['total_base_lm']['train_flops']:.2f}x",
        ),
        ("bits per byte: unigram", f"{bits['unigram']:.3f}"),
        ("bits per byte: uniform", f"{bits['uniform']:.3f}"),
        ("speed over transformers generate", f"{speed['speedup']:.2f}x"),
        ("speed over a lean loop of the base LM", f"{speed['speedup_over_lean_loop']:.2f}x"),
    ]
    print("\n" + "\n".join(f"  {name:42}{value:>10}" for name, value in rows))
    work = seconds_of(REPOSITORY / project / RECORDS, steps)
    print(
        f"\n{work / 60:.1f} minutes of work in all, {seconds / 60:.1f} now.\n"
        f"Report: {project / 'report.html'} (figures: {project / 'report.json'})\n"
        f'Next:   python launch/generate.py --model {project / "model"} --prompt "Returns the"\n'
        f"        python launch/demo.py --config configs/small.yaml name=small   (about two hours)"
    )


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    sys.exit(main())
