from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from data_pipeline.yaml_config import ConfigError, apply_overrides, merge, read_yaml, validate
from rqvae.config import StrictModel


class Circle(StrictModel):
    kind: Literal["circle"] = "circle"
    radius: float


class Square(StrictModel):
    kind: Literal["square"] = "square"
    side_length: float


class Inner(StrictModel):
    learning_rate: float = 0.1
    steps: int = Field(default=1, gt=0)
    mode: Literal["fast", "slow"] = "fast"


class Outer(StrictModel):
    train: Inner = Inner()
    shape: Annotated[Circle | Square, Field(discriminator="kind")] = Circle(radius=1)
    many: list[Inner] = Field(default=[])
    by_name: dict[str, Inner] = Field(default={})


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_extends_merges_over_the_parent(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "base.yaml", "a: {x: 1, y: [1, 2]}\nb: 1\n")
    write(tmp_path / "middle.yaml", "extends: base.yaml\nb: 2\n")
    child = write(tmp_path / "sub" / "child.yaml", "extends: ../middle.yaml\na: {y: [3]}\n")
    assert read_yaml(child) == {"a": {"x": 1, "y": [3]}, "b": 2}


def test_another_kind_replaces_the_parents_mapping() -> None:
    assert merge({"s": {"kind": "a", "x": 1}}, {"s": {"kind": "b"}}) == {"s": {"kind": "b"}}
    assert merge({"s": {"kind": "a", "x": 1}}, {"s": {"y": 2}}) == {"s": {"kind": "a", "x": 1, "y": 2}}


def test_inline_files_are_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "configs" / "parts").mkdir(parents=True)
    write(tmp_path / "configs" / "parts" / "p.yaml", "size: 3\n")
    write(tmp_path / "configs" / "base.yaml", "model: {part: parts/p.yaml}\n")
    child = write(tmp_path / "child.yaml", "extends: configs/base.yaml\n")
    assert read_yaml(child, inline=["model.part"]) == {"model": {"part": {"size": 3}}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "'a' stands twice"),
        ("x: {b: 1, b: 2}\n", "'b' stands twice"),
        ("- 1\n", "one mapping"),
        ("1: x\n", "names as keys"),
        ("a: [1\n", "not readable as YAML"),
        ("extends: [a, b]\n", "one parent"),
        ("extends: missing.yaml\n", "no such file"),
        ("extends: here.yaml\n", "cannot extend itself"),
        ("a: !!python/object/apply:os.getcwd []\n", "not readable as YAML"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_yaml(write(tmp_path / "here.yaml", text))


def test_scientific_notation_is_a_number(tmp_path: Path) -> None:
    values = read_yaml(write(tmp_path / "c.yaml", "a: 1e-4\nb: 2E5\nc: -1.5e+3\nd: e5\nf: 1e\n"))
    assert values == {"a": 1e-4, "b": 2e5, "c": -1500.0, "d": "e5", "f": "1e"}


def test_overrides_are_yaml_and_leave_the_input_alone() -> None:
    values = {"a": {"b": 1, "c": 2}, "d": None}
    result = apply_overrides(values, ["a.b=1e-3", "d.e=[1, x]", "f=null", "a.b=7", "g=a=b"])
    assert result == {"a": {"b": 7, "c": 2}, "d": {"e": [1, "x"]}, "f": None, "g": "a=b"}
    assert values == {"a": {"b": 1, "c": 2}, "d": None}


def test_all_unusable_overrides_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides({"a": 1}, ["a.b=1", "novalue", "x.=1", "y=[1"])
    assert len(caught.value.mistakes) == 4
    assert "a is 1, which has no keys" in str(caught.value)


def test_every_mistake_is_listed_with_its_path_and_the_nearest_name() -> None:
    values = {
        "train": {"lerning_rate": 1, "steps": 0, "mode": "fsat"},
        "shape": {"kind": "square", "side": 2},
        "many": [{"steps": 1}, {"setps": 2}],
        "by_name": {"one": {"steps": "x"}},
        "shpe": {},
    }
    with pytest.raises(ConfigError) as caught:
        validate(Outer, values, "run.yaml")
    assert caught.value.source == "run.yaml"
    assert set(caught.value.mistakes) == {
        "train.lerning_rate: unknown key; did you mean train.learning_rate?",
        "train.steps: input should be greater than 0 (got 0)",
        "train.mode: input should be 'fast' or 'slow' (got 'fsat'); did you mean fast?",
        "shape.side_length: missing",
        "shape.side: unknown key; did you mean shape.side_length?",
        "many.1.setps: unknown key; did you mean many.1.steps?",
        "by_name.one.steps: input should be a valid integer, unable to parse string as an integer (got 'x')",
        "shpe: unknown key; did you mean shape?",
    }


def test_an_unknown_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"shape.kind: 'sqare' is not one of circle, square; did you mean square"
    ):
        validate(Outer, {"shape": {"kind": "sqare"}}, "x")
    with pytest.raises(ConfigError, match="shape: needs the key 'kind'"):
        validate(Outer, {"shape": {"radius": 1}}, "x")


def test_configuration_is_free_of_torch() -> None:
    code = (
        "import sys, data_pipeline, data_pipeline.config, data_pipeline.yaml_config, data_pipeline.__main__;"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
