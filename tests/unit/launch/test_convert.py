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
    "codec.resample=original",
    "codec.codebook_dim=64",
    "codec.latent_head_dim=8",
    "data.document_grid=4",
]


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


class ReferenceLayer(nn.Module):
    """Its refinement layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attn = nn.MultiheadAttention(dim, 8, batch_first=True)
        self.ffn = nn.Module()
        self.ffn.w1 = nn.Linear(dim, int(2.67 * dim), bias=False)
        self.ffn.w2 = nn.Linear(int(2.67 * dim), dim, bias=False)
        self.ffn.w3 = nn.Linear(dim, int(2.67 * dim), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.self_attn(normed, normed, normed)[0]
        normed = self.norm2(x)
        return x + self.ffn.w2(F.silu(self.ffn.w1(normed)) * self.ffn.w3(normed))


class ReferenceCodec(nn.Module):
    """The published module tree of charleslow/rq_vae, and what it computes when it is not training."""

    def __init__(self, architecture: Any, compression_factor: int, num_refinements: int) -> None:
        super().__init__()
        hidden, dim, steps = architecture.hidden_size, 64, compression_factor.bit_length() - 1
        widths = [hidden] * steps + [dim]
        self.encoder, self.decoder, self.quantizer = nn.Module(), nn.Module(), nn.Module()
        self.encoder.backbone = AutoModel.from_config(huggingface_config(architecture), dtype=torch.float32)
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for step in range(steps):
            down += [
                nn.Conv1d(widths[step], widths[step + 1], 3, 2, 1),
                nn.GELU(),
                nn.LayerNorm(widths[step + 1]),
            ]
            up += [nn.ConvTranspose1d(hidden, hidden, 4, 2, 1), nn.GELU(), nn.LayerNorm(hidden)]
        self.encoder.downsample = nn.Sequential(*down)
        self.decoder.backbone = AutoModel.from_config(huggingface_config(architecture), dtype=torch.float32)
        self.decoder.input_proj = nn.Linear(dim, hidden)
        self.decoder.upsample_layers = nn.Sequential(*up)
        self.decoder.output_head = nn.Linear(hidden, architecture.vocab_size, bias=False)
        self.quantizer.quantizers = nn.ModuleList(self._level(dim) for _ in range(3))
        for half in (self.encoder, self.decoder):
            half.latent_refinement = nn.ModuleList(ReferenceLayer(dim) for _ in range(num_refinements))
        for parameter in self.parameters():  # no norm or bias does nothing
            parameter.data += 0.1 * torch.randn_like(parameter)

    def _level(self, dim: int) -> nn.Module:
        level = nn.Module()
        level.codebook = nn.Parameter(torch.randn(32, dim))
        level.register_buffer("ema_cluster_size", torch.rand(32))
        level.register_buffer("ema_embed_sum", torch.randn(32, dim))
        level.register_buffer("initialized", torch.tensor([True]))
        return level

    def _resample(self, stack: nn.Sequential, x: Tensor) -> Tensor:
        for layer in stack:
            x = (
                layer(x)
                if isinstance(layer, (nn.LayerNorm, nn.GELU))
                else layer(x.transpose(1, 2)).transpose(1, 2)
            )
        return x

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and logits."""
        x = self._resample(
            self.encoder.downsample, self.encoder.backbone(input_ids=input_ids).last_hidden_state
        )
        for layer in self.encoder.latent_refinement:
            x = layer(x)
        total, codes = torch.zeros_like(x), []
        for level in self.quantizer.quantizers:
            codes.append(torch.cdist(x - total, level.codebook.expand(len(x), -1, -1)).argmin(-1))
            total = total + level.codebook[codes[-1]]
        for layer in self.decoder.latent_refinement:
            total = layer(total)
        y = self._resample(self.decoder.upsample_layers, self.decoder.input_proj(total))
        y = self.decoder.backbone(inputs_embeds=y).last_hidden_state
        return torch.stack(codes, -1), self.decoder.output_head(y)


def save_reference(
    path: Path, compression_factor: int, num_refinements: int, changed: dict[str, int] | None = None
) -> ReferenceCodec:
    torch.manual_seed(0)
    architecture = load_config(NANO).codec.backbone.architecture
    model = ReferenceCodec(architecture, compression_factor, num_refinements)
    config = {
        "model_name": "Qwen/Qwen3-0.6B", "latent_dim": 64, "compression_factor": compression_factor,
        "codebook_size": 32, "codebook_levels": 3, **(changed or {}),
    }  # fmt: skip
    torch.save({"model_state_dict": model.state_dict(), "config": config}, path)
    return model.eval()


def config_file(directory: Path, *overrides: str) -> Path:
    path = directory / "reference.yaml"
    path.write_text(load_config(NANO, overrides=[*REFERENCE, *overrides]).to_yaml())
    return path


@pytest.mark.parametrize(("factor", "layers"), [(2, 0), (4, 2)])
def test_reference_codec_computes_the_same(tmp_path: Path, factor: int, layers: int) -> None:
    reference = save_reference(tmp_path / "codec.pt", factor, layers)
    command = [str(tmp_path / "codec.pt"), str(tmp_path / "out"), "--to", "safetensors", "--config"]
    command.append(
        str(config_file(tmp_path, f"codec.compression_factor={factor}", f"codec.num_latent_layers={layers}"))
    )
    assert main(command) == 0
    codec = RQVAE.from_pretrained(tmp_path / "out")
    tokens = torch.randint(320, (3, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        codes, logits = reference(tokens)
    assert torch.equal(codec.encode(tokens), codes)
    assert codes.unique().numel() > 5
    torch.testing.assert_close(codec.decode(codes), logits, rtol=1e-4, atol=1e-4)
    before = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    assert main(command) == 2  # never overwrites
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == before


class Harmful:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/harmful-code-was-run"),))


def test_what_cannot_be_converted_is_listed_and_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(tmp_path / "codec.pt"), str(tmp_path / "out"), "--to", "safetensors"]
    command += ["--config", str(config_file(tmp_path, "codec.num_latent_layers=1"))]
    save_reference(tmp_path / "codec.pt", 4, 1)
    saved = torch.load(tmp_path / "codec.pt")
    # As an earlier version of the original named its feed-forward layers.
    for half in ("encoder", "decoder"):
        layer = f"{half}.latent_refinement.0"
        saved["model_state_dict"][f"{layer}.linear1.weight"] = saved["model_state_dict"].pop(
            f"{layer}.ffn.w1.weight"
        )
    torch.save(saved, tmp_path / "codec.pt")
    assert main(command) == 2
    error = capsys.readouterr().err
    for half in ("encoder", "decoder"):
        assert f"{half}.latent_refinement.0.linear1.weight: has no place" in error
        assert f"{half}.refinement.layers.0.mlp.gate_up_proj.weight: missing" in error
    save_reference(tmp_path / "codec.pt", 4, 0, {"compression_factor": 1, "codebook_levels": 8})
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "codec.compression_factor: 4, must be 1" in error
    assert "codec.num_latent_layers: 1, must be 0" in error
    assert "codec.codebook_levels: 3, must be 8" in error
    assert "no downsampling" in error
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
