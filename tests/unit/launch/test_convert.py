"""Models written tensor by tensor, foreign checkpoints, initial weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel

from launch import tasks
from launch.config import load_config
from launch.convert_checkpoint import main, write_model
from launch.safetensors_files import verify_tensors, write_tensors
from rqvae import RQVAE
from rqvae.backbone import BaseLM, huggingface_config

NANO = Path(__file__).parents[2] / "integration/nano.yaml"
REFERENCE = [
    "codec.resample=reference", "codec.compression_factor=2", "codec.num_latent_layers=0",
    "codec.codebook_dim=64", "data.document_grid=2",
]  # fmt: skip


def test_tensors_read_back_from_several_files_and_damage_is_found(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(300, 5),
        "b": torch.arange(7),
        "c": torch.randn(4, 4, dtype=torch.bfloat16),
        "d": torch.tensor(3.0),
        "e": torch.randn(5, 300).t(),
    }
    write_tensors(tmp_path, tensors, tensors.__getitem__, max_file_bytes=6200)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    read = load_file(files[0]) | load_file(files[1])
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    verify_tensors(tmp_path, tensors, tensors.__getitem__)
    with pytest.raises(RuntimeError, match="other tensors"):
        verify_tensors(tmp_path, {"a": tensors["a"]}, tensors.__getitem__)
    content = bytearray(files[0].read_bytes())
    content[-1] ^= 1
    files[0].write_bytes(content)
    with pytest.raises(RuntimeError, match="reads back"):
        verify_tensors(tmp_path, tensors, tensors.__getitem__)


@pytest.mark.parametrize("is_shared", [False, True])
def test_written_models_load_with_from_pretrained(tmp_path: Path, is_shared: bool) -> None:
    config = load_config(NANO, overrides=[f"codec.backbone.shared={str(is_shared).lower()}"]).codec
    for number, create in enumerate((lambda: RQVAE(config), lambda: BaseLM(config.backbone.architecture, 0))):
        model = create()
        with torch.device("meta"):
            empty = create()
        state, directory = model.state_dict(), tmp_path / str(number)
        write_model(empty, state.__getitem__, directory)
        loaded: nn.Module = (
            RQVAE.from_pretrained(directory) if number == 0 else BaseLM.from_pretrained(directory, 0)
        )
        assert loaded.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_a_run_starts_from_a_converted_model_of_its_shape(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    config = load_config(NANO, stage="rqvae", overrides=[f"stages.rqvae.initial_weights={directory}"])
    source = RQVAE(config.codec)
    source.save_pretrained(directory)
    task = tasks.RQVAETask(config)
    model = task.create_model()
    task.initialize(model)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in model.state_dict().items())
    other = tasks.RQVAETask(
        config.model_copy(update={"codec": config.codec.model_copy(update={"latent_dim": 32})})
    )
    with pytest.raises(ValueError, match="do not fit"):
        other.initialize(other.create_model())

    BaseLM(config.codec.backbone.architecture, 0).save_pretrained(tmp_path / "lm")
    lm_config = load_config(
        NANO, stage="base_lm", overrides=[f"stages.base_lm.initial_weights={tmp_path / 'lm'}"]
    )
    lm = BaseLM(config.codec.backbone.architecture, 0)
    tasks.BaseLMTask(lm_config).initialize(lm)
    assert torch.equal(lm.lm.lm_head.weight, BaseLM.from_pretrained(tmp_path / "lm", 0).lm.lm_head.weight)
    with pytest.raises(ValueError, match="no safetensors"):
        tasks.BaseLMTask(
            load_config(NANO, stage="base_lm", overrides=["stages.base_lm.initial_weights=nowhere"])
        ).initialize(lm)


class ReferenceCodec(nn.Module):
    """The published module tree of charleslow/rq_vae at K = 2, with as many refinement layers as asked for."""

    def __init__(self, architecture: Any, num_refinements: int) -> None:
        super().__init__()
        hidden, dim = architecture.hidden_size, 64
        self.encoder, self.decoder, self.quantizer = nn.Module(), nn.Module(), nn.Module()
        self.encoder.backbone = AutoModel.from_config(huggingface_config(architecture), dtype=torch.float32)
        self.encoder.downsample = nn.Sequential(nn.Conv1d(hidden, dim, 3, 2, 1), nn.GELU(), nn.LayerNorm(dim))
        self.decoder.backbone = AutoModel.from_config(huggingface_config(architecture), dtype=torch.float32)
        self.decoder.input_proj = nn.Linear(dim, hidden)
        self.decoder.upsample_layers = nn.Sequential(
            nn.ConvTranspose1d(hidden, hidden, 4, 2, 1), nn.GELU(), nn.LayerNorm(hidden)
        )
        self.decoder.output_head = nn.Linear(hidden, architecture.vocab_size, bias=False)
        self.quantizer.quantizers = nn.ModuleList(self._level(dim) for _ in range(3))
        for half in (self.encoder, self.decoder):
            half.latent_refinement = nn.ModuleList(nn.Linear(dim, dim) for _ in range(num_refinements))

    def _level(self, dim: int) -> nn.Module:
        level = nn.Module()
        level.codebook = nn.Parameter(torch.randn(32, dim))
        level.register_buffer("ema_cluster_size", torch.rand(32))
        level.register_buffer("ema_embed_sum", torch.randn(32, dim))
        level.register_buffer("initialized", torch.tensor([True]))
        return level

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and logits."""
        x = self.encoder.backbone(input_ids=input_ids).last_hidden_state
        x = self.encoder.downsample[2](F.gelu(self.encoder.downsample[0](x.transpose(1, 2))).transpose(1, 2))
        total, codes = torch.zeros_like(x), []
        for level in self.quantizer.quantizers:
            codes.append(torch.cdist(x - total, level.codebook.expand(len(x), -1, -1)).argmin(-1))
            total = total + level.codebook[codes[-1]]
        y = self.decoder.input_proj(total).transpose(1, 2)
        y = self.decoder.upsample_layers[2](F.gelu(self.decoder.upsample_layers[0](y)).transpose(1, 2))
        y = self.decoder.backbone(inputs_embeds=y).last_hidden_state
        return torch.stack(codes, -1), self.decoder.output_head(y)


def save_reference(path: Path, num_refinements: int, **changed: Any) -> ReferenceCodec:
    torch.manual_seed(0)
    architecture = load_config(NANO).codec.backbone.architecture
    model = ReferenceCodec(architecture, num_refinements)
    config = {
        "model_name": "Qwen/Qwen3-0.6B", "latent_dim": 64, "compression_factor": 2, "codebook_size": 32,
        "codebook_levels": 3, **changed,
    }  # fmt: skip
    torch.save({"model_state_dict": model.state_dict(), "config": config}, path)
    return model.eval()


def config_file(directory: Path) -> Path:
    path = directory / "reference.yaml"
    path.write_text(load_config(NANO, overrides=REFERENCE).to_yaml())
    return path


def test_reference_codec_computes_the_same(tmp_path: Path) -> None:
    reference = save_reference(tmp_path / "codec.pt", 0)
    command = [str(tmp_path / "codec.pt"), str(tmp_path / "out"), "--to", "safetensors"]
    assert main([*command, "--config", str(config_file(tmp_path))]) == 0
    codec = RQVAE.from_pretrained(tmp_path / "out")
    tokens = torch.randint(320, (3, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        codes, logits = reference(tokens)
    assert torch.equal(codec.encode(tokens), codes)
    torch.testing.assert_close(codec.decode(codes), logits, rtol=1e-4, atol=1e-4)
    before = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    assert main([*command, "--config", str(config_file(tmp_path))]) == 2  # never overwrites
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == before


class Harmful:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/harmful-code-was-run"),))


def test_what_cannot_be_converted_is_listed_and_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(tmp_path / "codec.pt"), str(tmp_path / "out"), "--to", "safetensors"]
    command += ["--config", str(config_file(tmp_path))]
    save_reference(tmp_path / "codec.pt", 2)
    assert main(command) == 2
    error = capsys.readouterr().err
    for half in ("encoder", "decoder"):
        for index in (0, 1):
            assert f"{half}.latent_refinement.{index}.weight: refinement of another kind" in error
    save_reference(tmp_path / "codec.pt", 0, compression_factor=4, codebook_levels=8)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "codec.compression_factor: 2, must be 4" in error
    assert "codec.codebook_levels: 3, must be 8" in error
    torch.save({"model_state_dict": {}, "config": Harmful()}, tmp_path / "codec.pt")
    assert main(command) == 2
    assert "is refused" in capsys.readouterr().err
    torch.save({"model_state_dict": {}, "epoch": 1}, tmp_path / "codec.pt")
    assert main(command) == 2
    assert "no checkpoint of the reference" in capsys.readouterr().err
    assert main(command[:-2]) == 2
    assert "--config is needed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not Path("/tmp/harmful-code-was-run").exists()
