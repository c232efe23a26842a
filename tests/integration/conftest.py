"""Real processes on a corpus made here: the deepspeed launcher, ZeRO-3 on two ranks, gloo."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
NANO = Path(__file__).with_name("nano.yaml")
WALL_CLOCK = ("_s", "_per_s", "_gib", "_share", "_utilisation")
"""Ends of the names of metrics that no two runs have in common."""

_SUBJECTS = ["The river", "A small engine", "The old harbour", "Every winter storm", "The second reader"]
_VERBS = ["carries", "remembers", "follows", "repairs", "measures", "forgets"]
_OBJECTS = [
    "the light of the valley",
    "three quiet boats",
    "a map of the coast",
    "its own name",
    "the bridge",
]


def write_corpus(path: Path, num_documents: int) -> None:
    """Documents of a small grammar: text with structure, the same on every machine."""
    draw = random.Random(0)
    with path.open("w") as file:
        for index in range(num_documents):
            sentences = [
                f"{draw.choice(_SUBJECTS)} {draw.choice(_VERBS)} {draw.choice(_OBJECTS)}."
                for _ in range(draw.randint(1, 12))
            ]
            file.write(json.dumps({"id": f"document-{index}", "text": " ".join(sentences)}) + "\n")


def command_environment(program: Path = REPOSITORY) -> dict[str, str]:
    """Environment of a command on two ranks and two cores, with the packages of `program`, whatever is installed."""
    path = os.pathsep.join(filter(None, [str(program), os.environ.get("PYTHONPATH")]))
    settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "WANDB_SILENT": "true", "PYTHONPATH": path}
    return {**os.environ, **settings}


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launcher(num_ranks: int) -> list[str]:
    """The real deepspeed launcher."""
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    return [
        deepspeed,
        "--num_accelerators",
        str(num_ranks),
        "--master_port",
        str(free_port()),
        "launch/train.py",
    ]


def run(
    command: list[str], timeout_s: float = 300, program: Path = REPOSITORY
) -> subprocess.CompletedProcess[str]:
    """Run to the end from the repository, or another directory with its packages; output captured."""
    return subprocess.run(
        command,
        cwd=program,
        env=command_environment(program),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def clone_program(place: Path) -> Path:
    """The program as it is here, in a repository of its own with one commit."""
    for name in ("configs", "data_pipeline", "launch", "rqvae", "slurm"):
        ignored = shutil.ignore_patterns("__pycache__", "site.sh")
        shutil.copytree(REPOSITORY / name, place / name, ignore=ignored)
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *words], cwd=place, check=True)
    return place


def records(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what depends on the wall clock; none if there is no file yet.

    Half a line at the end, of a process that is writing or was killed, is left out.
    """
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
    return [{key: value for key, value in line.items() if not key.endswith(WALL_CLOCK)} for line in lines]


@pytest.fixture(scope="session")
def nano_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of documents."""
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    write_corpus(path, 400)
    return path


@pytest.fixture(scope="session")
def nano_data(nano_corpus: Path) -> list[str]:
    """Overrides that point at built token shards."""
    directory = nano_corpus.parent / "shards"
    overrides = [f"data.directory={directory}", f"data.source.paths={nano_corpus}"]
    result = run([sys.executable, "-m", "data_pipeline", "build", "--config", str(NANO), *overrides])
    assert result.returncode == 0, result.stderr
    return overrides
