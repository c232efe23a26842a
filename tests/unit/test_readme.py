"""The commands in the READMEs name files, options, settings and targets that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from launch.config import STAGES, load_config

ROOT = Path(__file__).parents[2]
FOLDERS = (".", "configs", "data_pipeline", "launch", "rqvae", "slurm")
READMES = {folder: (ROOT / folder / "README.md").read_text() for folder in FOLDERS}
EVERYTHING = "\n".join(READMES.values())
# Programs of others, with their options: `deepspeed --num_accelerators 2 launch/train.py ...`.
LAUNCHERS = ("deepspeed", "torchrun", "python", "srun")


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", EVERYTHING, flags=re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


OURS = [line for line in commands() if "launch/" in line or "-m data_pipeline" in line]


def parts(line: str) -> tuple[Path, list[str]]:
    """The source file that parses the command's arguments, and these arguments."""
    words = shlex.split(line, comments=True)
    if "data_pipeline" in words:
        at = words.index("data_pipeline")
        return ROOT / "data_pipeline" / "__main__.py", words[at + 1 :]
    at = next(index for index, word in enumerate(words) if word.startswith("launch/"))
    return ROOT / words[at], words[at + 1 :]


def test_there_are_commands_of_every_kind() -> None:
    assert len(OURS) >= 12
    assert {shlex.split(line)[0] for line in OURS} <= set(LAUNCHERS)


@pytest.mark.parametrize("line", OURS)
def test_the_command_and_its_options_exist(line: str) -> None:
    source, arguments = parts(line)
    assert source.is_file(), source
    text = source.read_text()
    for word in arguments:
        if word.startswith("--"):
            assert f'"{word}"' in text, word


@pytest.mark.parametrize("line", [line for line in OURS if "--config" in line])
def test_its_configuration_loads_with_its_settings(line: str) -> None:
    _, arguments = parts(line)
    stage = arguments[arguments.index("--stage") + 1] if "--stage" in arguments else None
    assert stage is None or stage in STAGES
    overrides = [word for word in arguments if re.fullmatch(r"[a-z_0-9.]+=.*", word)]
    load_config(ROOT / arguments[arguments.index("--config") + 1], stage=stage, overrides=overrides)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make ([a-z-]+)", EVERYTHING))))
def test_the_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize(
    "path",
    sorted(set(re.findall(r"`((?:configs|launch|rqvae|data_pipeline|slurm|tests)/[\w./]*)`", EVERYTHING))),
)
def test_the_file_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_the_data_directory_is_the_configurations() -> None:
    directory = load_config(ROOT / "configs" / "tiny.yaml").data.directory
    assert set(re.findall(r"--data (\S+)", READMES["."])) == {directory}


@pytest.mark.parametrize("folder", FOLDERS)
def test_links_lead_somewhere(folder: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([\w-]+))?\)", READMES[folder]):
        path = (ROOT / folder / target).resolve() if target else ROOT / folder / "README.md"
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
