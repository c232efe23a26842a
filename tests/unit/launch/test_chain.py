"""Skipping by content, going on after a kill, and the steps of every kind of codec."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launch import chain, run_status, steps
from launch.config import load_config
from launch.report_data import read_report, update_report


@pytest.fixture
def step(tmp_path: Path) -> steps.Step:
    (tmp_path / "input").write_text("text")
    (tmp_path / "output").mkdir()
    (tmp_path / "output/result").write_text("result")
    return steps.Step("step", ["command", "--master_port", "1"], [tmp_path / "input"], [tmp_path / "output"])


def test_a_step_is_done_only_as_long_as_nothing_changed(step: steps.Step, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    assert not steps.is_done(step, record)
    steps.mark(step, record, finished=False)
    assert steps.was_interrupted(step, record)
    assert not steps.is_done(step, record)
    steps.mark(step, record, finished=True, seconds=1.0)
    assert steps.is_done(step, record)
    # The port is no content.
    assert steps.is_done(
        steps.Step("step", ["command", "--master_port", "2"], step.inputs, step.outputs), record
    )
    assert not steps.is_done(steps.Step("step", ["other"], step.inputs, step.outputs), record)
    (tmp_path / "output/result").write_text("damaged")
    assert not steps.is_done(step, record)
    (tmp_path / "output/result").write_text("result")
    assert steps.is_done(step, record)
    (tmp_path / "input").write_text("other text")
    assert not steps.is_done(step, record)
    assert not steps.was_interrupted(step, record)


def test_outputs_outside_the_project_are_kept(tmp_path: Path) -> None:
    inside, outside = tmp_path / "project/model", tmp_path / "data"
    for directory in (inside, outside):
        directory.mkdir(parents=True)
    steps.remove_outputs(steps.Step("step", [], [], [inside, outside]), tmp_path / "project")
    assert not inside.exists()
    assert outside.exists()


def test_report_keeps_the_keys_of_others(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    update_report(path, {"speed": {"speedup": 2.0}})
    update_report(path, {"rate": {"codes_bits_per_token": 20.0}})
    assert read_report(path) == {"speed": {"speedup": 2.0}, "rate": {"codes_bits_per_token": 20.0}}
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        read_report(path)


def test_a_measurement_is_done_while_the_report_holds_it(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    step = steps.Step("evaluate", [sys.executable, "-c", ""], [], [], report_key=(report, "bits_per_byte"))
    steps.mark(step, tmp_path / "record.json", finished=True)
    assert not steps.is_done(
        step, tmp_path / "record.json"
    )  # removed, as one is told to do with a damaged one
    update_report(report, {"bits_per_byte": {}})
    assert steps.is_done(step, tmp_path / "record.json")
    update_report(tmp_path / "other.json", {"speed": {}})
    assert not steps.is_done(
        replace(step, report_key=(tmp_path / "other.json", "bits_per_byte")), tmp_path / "record.json"
    )


def test_where_python_lies_makes_no_other_step() -> None:
    here, launcher = Path(sys.executable), Path(sys.executable).with_name("deepspeed")
    commands = [[str(here), "launch/train.py"], [str(launcher), "launch/train.py"]]
    told = [steps.inputs_of(steps.Step("train", command, [], []))["command"] for command in commands]
    assert told == ["python launch/train.py", "deepspeed launch/train.py"]


def test_training_is_done_when_it_says_so_itself(tmp_path: Path) -> None:
    """`deepspeed` exits with 0 when `kill -9` ended its lower process."""
    says = "from pathlib import Path; from launch import run_status; run_status"

    def run(code: str) -> int:
        return steps.run(steps.Step("train", [sys.executable, "-c", code], [], [], run_directory=tmp_path))

    assert run(f"{says}.finished(Path('{tmp_path}'), 9)") == 0
    assert run(f"{says}.running(Path('{tmp_path}'))") == 1
    run_status.finished(tmp_path, 9)  # an earlier start
    assert run("") == 1
    assert run("raise SystemExit(3)") == 3


def test_other_settings_are_another_step(step: steps.Step, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    steps.mark(step, record, finished=True)
    assert steps.is_done(step, record)
    other = steps.Step(step.name, step.command, step.inputs, step.outputs, settings="steps: 9")
    assert not steps.is_done(other, record)


def write_line(path: Path, line: str) -> list[str]:
    code = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.open('a').write(sys.argv[2])"
    return [sys.executable, "-c", code, str(path), line]


def test_the_first_failure_ends_the_chain_and_says_why(tmp_path: Path) -> None:
    made = tmp_path / "made"
    fails = (
        "import sys; print('loading'); print('error: no more room\\nfree some', file=sys.stderr); sys.exit(3)"
    )
    row = [
        steps.Step("first", write_line(made, "first"), [], [made]),
        steps.Step("second", [sys.executable, "-c", fails], [], []),
        steps.Step("third", write_line(made, "third"), [], [made]),
    ]
    failure = steps.run_steps(row, tmp_path, tmp_path / "steps", tmp_path / "logs")
    assert failure == steps.Failure("second", 3, "error: no more room\nfree some")
    assert made.read_text() == "first"
    assert "loading" in (tmp_path / "logs/second.log").read_text()


CHAIN = """
import sys
from pathlib import Path
from launch.steps import Step, run_steps

root = Path(sys.argv[1])
command = [sys.executable, "-c", sys.argv[2], str(root)]
first = "import pathlib, sys; p = pathlib.Path(sys.argv[1], 'first'); p.open('a').write('x')"
steps = [
    Step("first", [sys.executable, "-c", first, str(root)], [], [root / "first"]),
    Step("second", command, [], [root / "second"], goes_on=True),
]
sys.exit(run_steps(steps, root, root / "steps") is not None)
"""
# Waits where it is killed the first time; says who it is.
SECOND = """
import os, pathlib, sys, time
root = pathlib.Path(sys.argv[1])
again = (root / "second").exists()
(root / "second").write_text(f"{os.getpid()}\\n{again}")
time.sleep(0 if again else 600)
"""


def test_a_killed_chain_takes_its_step_along_and_goes_on_behind_what_is_done(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHAIN, str(tmp_path), SECOND]
    environment = {**os.environ, "PYTHONPATH": str(steps.REPOSITORY)}
    process = subprocess.Popen(command, env=environment, cwd=steps.REPOSITORY)
    second = tmp_path / "second"
    while not (second.exists() and second.read_text().endswith("False")):
        assert process.poll() is None
        time.sleep(0.05)
    child = int(second.read_text().split()[0])
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(200):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the step outlived its chain")
    again = subprocess.run(command, env=environment, cwd=steps.REPOSITORY, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "first: done already" in again.stdout
    assert (tmp_path / "first").read_text() == "x"
    assert second.read_text().endswith("True")


NANO = steps.REPOSITORY / "tests" / "integration" / "nano.yaml"
TOKENS_AS_CODES = ["codec.codebook_levels=null", "codec.codebook_size=null", "latent_model.depth_input=code"]


def names(ranks: int, *overrides: str) -> list[steps.Step]:
    return chain.chain(load_config(NANO, overrides=overrides), str(NANO), list(overrides), ranks)


def test_the_steps_of_a_codec_and_of_tokens_as_codes() -> None:
    codec = names(2)
    assert [step.name for step in codec] == [
        *(
            "build-data",
            "train-base_lm",
            "convert-base_lm",
            "train-rqvae",
            "convert-rqvae",
            "precompute-codes",
        ),
        *("train-rq_transformer", "convert-rq_transformer", "evaluate", "benchmark", "generate", "report"),
    ]
    assert "codec.backbone.pretrained=runs/nano/model/base_lm" in codec[3].command
    assert "--checkpoint" in codec[5].command
    identity = names(2, "codec.model=identity", *TOKENS_AS_CODES)
    assert [step.name for step in identity] == [step.name for step in codec if "rqvae" not in step.name]
    assert "--checkpoint" not in identity[3].command
    assert Path("runs/nano/model/rqvae") in identity[3].outputs


@pytest.mark.parametrize(("name", "starts"), [("tiny", False), ("tiny_rqvae", True)])
def test_a_random_decoder_backbone_does_not_start_from_the_base_lm(name: str, starts: bool) -> None:
    path = f"configs/{name}.yaml"
    found = chain.chain(load_config(path), path, [], ranks=2)
    command = next(step for step in found if step.name == "train-rqvae").command
    assert any(word.startswith("codec.backbone.pretrained=") for word in command) == starts


def test_one_rank_trains_by_itself_without_zero() -> None:
    alone, together = names(1)[1], names(2)[1]
    assert alone.command[:2] == [sys.executable, "launch/train.py"]
    assert alone.command[-1] == "train.zero_stage=1"
    assert Path(together.command[0]).name == "deepspeed" and "train.zero_stage=1" not in together.command
