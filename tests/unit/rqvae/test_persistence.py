from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rqvae import RQVAE, FlatTransformer, RQTransformer

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def saved(make_codec: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[RQVAE, Path]:
    codec = make_codec(dtype=torch.float32, codebook_size=(16, 8, 4))
    directory = tmp_path_factory.mktemp("saved") / "codec"
    codec.save_pretrained(directory)
    return codec, directory


@pytest.fixture
def copy(saved: tuple[RQVAE, Path], tmp_path: Path) -> Path:
    """A saved codec that a test may damage."""
    return Path(shutil.copytree(saved[1], tmp_path / "copy"))


def test_a_saved_codec_is_the_same_codec(saved: tuple[RQVAE, Path], tokens: Make) -> None:
    codec, directory = saved
    loaded = RQVAE.from_pretrained(str(directory))
    assert not loaded.training
    assert loaded.config == codec.config
    assert loaded.codec_hash() == codec.codec_hash()
    for (name, tensor), expected in zip(
        loaded.state_dict().items(), codec.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, expected), name
    codes = codec.encode(tokens(4, 32))
    assert torch.equal(loaded.encode(tokens(4, 32)), codes)
    assert torch.equal(loaded.decode(codes), codec.decode(codes))


def test_only_safe_files_are_written(saved: tuple[RQVAE, Path]) -> None:
    assert sorted(path.name for path in saved[1].iterdir()) == ["config.json", "model.safetensors"]


def test_where_the_weights_came_from_is_forgotten(make_codec_config: Make) -> None:
    config = make_codec_config()
    backbone = config.backbone.model_copy(update={"pretrained": "some/where"})
    assert RQVAE(config.model_copy(update={"backbone": backbone})).config == config


def test_any_change_of_weights_or_configuration_changes_the_hash(make_codec: Make) -> None:
    codec = make_codec(dtype=torch.float32)
    first = codec.codec_hash()
    assert codec.codec_hash() == first
    assert len(first) == 64
    hashes = {first, make_codec(dtype=torch.float32, quantizer={"ema_decay": 0.9}).codec_hash()}
    for tensor in (
        codec.encoder.absent_token.data,
        codec.quantizer.levels[2].codebook,
        codec.decoder.head.weight.data,
    ):
        tensor.view(-1)[-1] += 1e-3
        hashes.add(codec.codec_hash())
    assert len(hashes) == 5


def test_saving_again_leaves_nothing_of_the_old_model(
    make_codec: Make, saved: tuple[RQVAE, Path], copy: Path
) -> None:
    smaller = make_codec(dtype=torch.float32, codebook_levels=1)
    smaller.save_pretrained(copy)
    assert RQVAE.from_pretrained(copy).codec_hash() == smaller.codec_hash()


@pytest.mark.parametrize("model_class", [RQTransformer, FlatTransformer])
def test_a_saved_latent_model_is_the_same_model(
    make_latent_model: Make, model_class: type[RQTransformer], tmp_path: Path
) -> None:
    model = make_latent_model(model_class, torch.float32, codebook_size=(16, 8, 4), codec_hash="a" * 64)
    model.save_pretrained(tmp_path / "model")
    loaded = model_class.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert not loaded.training
    codes = torch.randint(4, (2, 5, 3))
    assert torch.equal(loaded(codes).nats, model(codes).nats)
    other = FlatTransformer if model_class is RQTransformer else RQTransformer
    with pytest.raises(ValueError, match=f"holds a {model_class.__name__}, not a {other.__name__}"):
        other.from_pretrained(tmp_path / "model")


# Damage and foreign directories -------------------------------------------------------------------------


def damage_missing(directory: Path) -> None:
    shutil.rmtree(directory)


def damage_no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def damage_is_a_file(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.write_text("{}")


def damage_config_cut(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(path.read_text()[:-20])


def damage_config_binary(directory: Path) -> None:
    (directory / "config.json").write_bytes(b"\xff\xfe\x00\x93")


def damage_config_is_a_list(directory: Path) -> None:
    (directory / "config.json").write_text("[]")


def damage_foreign_config(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen3", "hidden_size": 32}))


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damage_other_version(directory: Path) -> None:
    edit_config(directory, format_version=99)


def damage_config_empty(directory: Path) -> None:
    edit_config(directory, config=None)


def damage_config_absent(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({"model": "RQVAE", "format_version": 2}))


def damage_config_misspelt(directory: Path) -> None:
    content = json.loads((directory / "config.json").read_text())["config"]
    edit_config(directory, config=content | {"codebook_sise": 3})


def damage_config_of_another_size(directory: Path) -> None:
    content = json.loads((directory / "config.json").read_text())["config"]
    edit_config(directory, config=content | {"codebook_dim": 4})


def damage_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def damage_weights_cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_weights_empty(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"")


def damage_tensor_missing(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["quantizer.levels.1.codebook"]
    save_file(tensors, directory / "model.safetensors")


def damage_tensor_unexpected(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"encoder.more": torch.zeros(1)}, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, "not a model directory"),
        (damage_no_config, "not a model directory"),
        (damage_is_a_file, "not a model directory"),
        (damage_config_cut, "is not JSON"),
        (damage_config_binary, "is not JSON"),
        (damage_config_is_a_list, "holds a list"),
        (damage_foreign_config, "holds a None, not a RQVAE"),
        (damage_other_version, "format version 99"),
        (damage_config_empty, "is not valid"),
        (damage_config_absent, "is not valid"),
        (damage_config_misspelt, "codebook_sise"),
        (damage_config_of_another_size, r"to_codebook.weight: \(8, 32\), expected \(4, 32\)"),
        (damage_no_weights, "missing"),
        (damage_weights_cut, "damaged"),
        (damage_weights_empty, "damaged"),
        (damage_tensor_missing, "quantizer.levels.1.codebook: missing"),
        (damage_tensor_unexpected, "encoder.more: unexpected"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_damaged_directory_is_a_clear_error(
    copy: Path, damage: Callable[[Path], None], message: str
) -> None:
    RQVAE.from_pretrained(copy)
    damage(copy)
    with pytest.raises(ValueError, match=message) as caught:
        RQVAE.from_pretrained(copy)
    assert str(copy) in str(caught.value)
