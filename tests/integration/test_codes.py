"""From a codec to what the latent model is trained on: nearest codes, stochastic codes, tokens as codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline import CodeDataset, TokenDataset
from launch import eval, precompute_codes
from launch.config import RunConfig, load_config
from launch.latent_task import RQTransformerTask
from launch.paths import codes_directory, model_directory
from rqvae import RQVAE, IdentityCodec, ResidualQuantizer, load_codec, persistence
from tests.integration.conftest import NANO, run


@pytest.fixture(scope="module")
def project(nano_data: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a project with a codec, untrained but with codebooks of its own latents, and its codes."""
    overrides = [
        *nano_data,
        f"run_root={tmp_path_factory.mktemp('codes')}",
        "tracking.wandb=disabled",
        "codec.quantizer.code_temperature=2.0",
    ]
    config = load_config(NANO, overrides=overrides)
    torch.manual_seed(0)
    codec = RQVAE(config.codec).eval()
    batch = TokenDataset(config.data.directory, "train").read(range(32))
    with torch.no_grad():
        latents = codec.encoder(batch["input_ids"], batch["document_ids"])
    codec.quantizer.initialize(latents[(batch["document_ids"].view(32, -1, 4) > 0).any(-1)], seed=0)
    directory = model_directory(config) / "rqvae"
    codec.save_pretrained(directory)
    command = ["--config", str(NANO), "--checkpoint", str(directory), "--latents", *overrides]
    assert precompute_codes.main(command) == 0
    return overrides


def test_codes_in_bf16_are_nearly_those_in_fp32(project: list[str], tmp_path: Path) -> None:
    config = load_config(NANO, overrides=project)
    checkpoint = str(model_directory(config) / "rqvae")
    elsewhere = [*project, "name=rounded"]
    command = ["--config", str(NANO), "--checkpoint", checkpoint, "--precision", "bf16", *elsewhere]
    assert precompute_codes.main(command) == 0
    tokens = TokenDataset(config.data.directory, "train")
    rounded = CodeDataset(tokens, codes_directory(load_config(NANO, overrides=elsewhere)))
    assert rounded.manifest.layout.precision == "bf16"
    exact = CodeDataset(tokens, codes_directory(config)).read(range(64))["codes"][..., 0]
    agreement = (rounded.read(range(64))["codes"][..., 0] == exact).float().mean()
    assert 0.8 < agreement < 1


def stochastic(overrides: list[str]) -> RunConfig:
    return load_config(
        NANO, stage="rq_transformer", overrides=[*overrides, "stages.rq_transformer.stochastic_codes=true"]
    )


def test_codes_and_latents_on_disk_are_those_of_the_codec(project: list[str]) -> None:
    config = stochastic(project)
    codec = load_codec(model_directory(config) / "rqvae")
    assert isinstance(codec, RQVAE)
    task = RQTransformerTask(config)
    dataset = task.dataset("train")
    batch = dataset.read([0, 7, len(dataset) - 1])
    assert torch.equal(batch["codes"], codec.encode(batch["input_ids"], document_ids=batch["document_ids"]))
    with torch.no_grad():
        latents = codec.encoder(batch["input_ids"], batch["document_ids"])
    torch.testing.assert_close(batch["latents"], latents, rtol=1e-3, atol=1e-4)
    quantizer = ResidualQuantizer.from_pretrained(codes_directory(config) / "quantizer")
    for level, expected in zip(quantizer.levels, codec.quantizer.levels, strict=True):
        assert torch.equal(level.codebook, expected.codebook)
    assert torch.equal(quantizer.ema_distortion, codec.quantizer.ema_distortion)


def test_stochastic_codes_are_drawn_by_step_and_sample(project: list[str]) -> None:
    config = stochastic(project)
    task = RQTransformerTask(config)
    torch.manual_seed(0)
    model = task.create_model().train()
    batch = task.dataset("train").read(range(8))
    codes, targets = task._codes(model, batch, step=3)
    assert targets is not None
    part, _ = task._codes(model, {name: value[5:] for name, value in batch.items()}, step=3)
    assert torch.equal(part, codes[5:])
    other, _ = task._codes(model, batch, step=4)
    differing = (codes[..., 0] != batch["codes"][..., 0]).float().mean()
    assert 0.02 < differing < 0.98
    assert not torch.equal(other, codes)
    for level, shares in enumerate(targets):
        assert shares.shape == (*codes.shape[:2], config.codec.codebook_sizes[level])
        torch.testing.assert_close(shares.sum(-1), torch.ones(codes.shape[:2]))
    # Lee 2022: the soft targets are what is learnt; the reported nats are those of the codes.
    out = task.forward(model, batch, torch.tensor(100.0), step=3)
    again = model(codes, token_document_ids=batch["document_ids"], num_tokens=torch.tensor(100.0))
    assert float(out.sums["level_nats"].sum()) == pytest.approx(float(again.nats.sum()), rel=1e-5)
    assert float(out.loss) != pytest.approx(float(again.loss), rel=1e-6)
    # Validation scores the codes themselves.
    kept, nothing = task._codes(model.eval(), batch, step=3)
    assert nothing is None
    assert torch.equal(kept, batch["codes"])


def test_stochastic_codes_need_latents(project: list[str], tmp_path: Path) -> None:
    directory = model_directory(load_config(NANO, overrides=project)) / "rqvae"
    overrides = [*project, f"run_root={tmp_path}"]
    assert precompute_codes.main(["--config", str(NANO), "--checkpoint", str(directory), *overrides]) == 0
    with pytest.raises(ValueError, match="holds codes without their latents"):
        RQTransformerTask(stochastic(overrides)).dataset("train")


IDENTITY = ["codec.model=identity", "codec.codebook_levels=null", "codec.codebook_size=null"]


def identity(overrides: list[str], run_root: Path) -> list[str]:
    """Overrides that turn the project's configuration into the identity codec's."""
    return [*overrides, f"run_root={run_root}", *IDENTITY]


def test_the_identity_codec_is_made_on_the_spot(
    project: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = identity(project, tmp_path)
    config = load_config(NANO, overrides=overrides)
    assert precompute_codes.main(["--config", str(NANO), *overrides]) == 0
    assert isinstance(load_codec(model_directory(config) / "rqvae"), IdentityCodec)
    tokens = TokenDataset(config.data.directory, "train")
    batch = CodeDataset(tokens, codes_directory(config)).read(range(4))
    real = batch["document_ids"] > 0
    assert torch.equal(batch["codes"].flatten(1)[real], batch["input_ids"][real])
    capsys.readouterr()
    for wrong, message in (
        (["--checkpoint", str(tmp_path)], "the identity codec has none"),
        (["--latents"], "the identity codec has no latents"),
    ):
        assert precompute_codes.main(["--config", str(NANO), *wrong, *overrides]) == 2
        assert message in capsys.readouterr().err
    assert precompute_codes.main(["--config", str(NANO), *project]) == 2
    assert "the model directory of the codec is needed" in capsys.readouterr().err


class OtherTask:
    """Takes part while a task is writing: half of what it writes is there, then the other's is, whole."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, place: Path, comes_first: Callable[[], Any]) -> None:
        save_config = persistence.save_config
        monkeypatch.setattr(persistence, "save_config", self)
        self._save_config, self._place, self._comes_first = save_config, place, comes_first
        self.calls = 0

    def __call__(self, *arguments: Any) -> None:
        self.calls += 1
        if self.calls == 1:
            assert not self._place.exists()  # nothing half written, which the other would read
            self._comes_first()
        self._save_config(*arguments)


def untrained_codec(temperature: float) -> RQVAE:
    torch.manual_seed(0)
    overrides = ["data.source.paths=none", f"codec.quantizer.code_temperature={temperature}"]
    return RQVAE(load_config(NANO, overrides=overrides).codec)


@pytest.mark.parametrize("other", ["the same codec", "another codec"])
def test_two_tasks_keep_the_quantizer_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    directory = tmp_path / "codes" / "quantizer"
    codec, others = untrained_codec(1.0), untrained_codec(1.0 if other == "the same codec" else 2.0)
    others_hash = others.codec_hash()
    task = OtherTask(
        monkeypatch, directory, lambda: precompute_codes.keep_quantizer(others, others_hash, directory)
    )
    if other == "the same codec":
        precompute_codes.keep_quantizer(codec, codec.codec_hash(), directory)
    else:
        with pytest.raises(ValueError, match="holds the codes of another codec"):
            precompute_codes.keep_quantizer(codec, codec.codec_hash(), directory)
    assert task.calls == 2
    assert ResidualQuantizer.from_pretrained(directory).codec_hash == others_hash
    assert [path.name for path in directory.parent.iterdir()] == ["quantizer"]
    precompute_codes.keep_quantizer(others, others_hash, directory)
    assert task.calls == 2


@pytest.mark.parametrize("other", ["the same codec", "another codec"])
def test_two_tasks_make_the_identity_codec_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    overrides = identity(["data.source.paths=none"], tmp_path)
    config = load_config(NANO, overrides=overrides)
    factor = 4 if other == "the same codec" else 2
    others = load_config(NANO, overrides=[*overrides, f"codec.compression_factor={factor}"])
    directory = model_directory(config) / "rqvae"
    task = OtherTask(monkeypatch, directory, lambda: precompute_codes.codec_of(others, None))
    if other == "the same codec":
        assert isinstance(precompute_codes.codec_of(config, None), IdentityCodec)
    else:
        with pytest.raises(ValueError, match="holds another codec"):
            precompute_codes.codec_of(config, None)
    assert task.calls == 2
    assert load_codec(directory).config.compression_factor == factor
    assert [path.name for path in directory.parent.iterdir()] == ["rqvae"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["stages.rq_transformer.stochastic_codes=true"],
        ["latent_model.model=flat_transformer", "latent_model.match=parameters"],
        ["latent_model.head=shared", "latent_model.spatial_input=both"],
        IDENTITY,
    ],
    ids=lambda settings: settings[0],
)
def test_variants_train_and_are_evaluated(project: list[str], tmp_path: Path, settings: list[str]) -> None:
    base = load_config(NANO, overrides=project)
    codec = ["--checkpoint", str(model_directory(base) / "rqvae")]
    if settings is IDENTITY:
        overrides, extra = identity(project, tmp_path), []
    else:
        overrides, extra = [*project, f"run_root={tmp_path}", *settings], [*codec, "--latents"]
    config = load_config(NANO, overrides=overrides)
    if settings is not IDENTITY:
        load_codec(model_directory(base) / "rqvae").save_pretrained(model_directory(config) / "rqvae")
    python, with_config = sys.executable, ["--config", str(NANO)]
    stage = ["--stage", "rq_transformer"]
    run_directory = str(model_directory(config).parent / "rq_transformer")
    exported = str(model_directory(config) / "rq_transformer")
    commands = [
        [python, "launch/precompute_codes.py", *with_config, *extra, *overrides],
        [python, "launch/train.py", *with_config, *stage, *overrides],
        [python, "launch/convert_checkpoint.py", run_directory, exported, "--to", "safetensors"],
        [
            *[python, "launch/eval.py", "--model", str(model_directory(config))],
            *["--data", config.data.directory, *with_config, *overrides],
        ],
        [python, "launch/generate.py", "--model", str(model_directory(config)), "--prompt", "The river"],
    ]
    for command in commands:
        result = run(command)
        assert result.returncode == 0, result.stdout + result.stderr
    report: dict[str, Any] = json.loads((model_directory(config).parent / "report.json").read_text())
    bits = report["bits_per_byte"]
    assert 0 < bits["latent_bound"] < 20
    assert "base_lm" not in bits
    if settings is IDENTITY:
        assert bits["latent_reconstruction"] == 0
        assert report["reconstruction"]["token_accuracy"] == 1
        # 20 steps are enough to beat guessing, and nothing is added by the codec.
        assert bits["latent_bound"] < bits["uniform"] * 1.1


def test_tokens_as_codes_go_from_text_to_text(
    nano_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The anchor codec through every command, in single processes: its decoder is trained, its codes are tokens."""
    overrides = [
        *[*nano_data, f"run_root={tmp_path}", "name=anchor", "tracking.wandb=disabled", "train.zero_stage=0"],
        *[
            "codec.model=anchor",
            "codec.codebook_levels=2",
            "codec.codebook_size=null",
            "codec.codebook_dim=64",
        ],
        *[
            "codec.quantizer={}",
            "latent_model.depth_input=code",
            "evaluation.max_samples=8",
            "train.steps=12",
        ],
    ]
    config = load_config(NANO, overrides=overrides)
    model = model_directory(config)
    python, with_config = sys.executable, ["--config", str(NANO)]

    def train_and_export(stage: str) -> list[list[str]]:
        export = [str(model.parent / stage), str(model / stage), "--to", "safetensors"]
        return [
            [python, "launch/train.py", *with_config, "--stage", stage, *overrides],
            [python, "launch/convert_checkpoint.py", *export],
        ]

    evaluate = ["--model", str(model), "--data", config.data.directory, *with_config, *overrides]
    codec = ["--checkpoint", str(model / "rqvae")]
    commands = [
        *train_and_export("rqvae"),
        [python, "launch/precompute_codes.py", *with_config, *codec, *overrides],
        *train_and_export("rq_transformer"),
        [python, "launch/eval.py", *evaluate],
        [python, "launch/generate.py", "--model", str(model), "--prompt", "The river"],
    ]
    for command in commands:
        result = run(command)
        assert result.returncode == 0, result.stdout + result.stderr
    report: dict[str, Any] = json.loads((model.parent / "report.json").read_text())
    bits = report["bits_per_byte"]
    assert bits["latent_bound"] == pytest.approx(bits["latent_codes"] + bits["latent_reconstruction"])
    # Half of the tokens are known, and the rest is predicted by a model of 12 steps.
    assert 0.5 < report["reconstruction"]["token_accuracy"] < 1
    assert 0 < bits["latent_reconstruction"] < bits["uniform"]
    batch = TokenDataset(config.data.directory, "train").read(range(4))
    codes = CodeDataset(TokenDataset(config.data.directory, "train"), codes_directory(config)).read(range(4))
    real = batch["document_ids"].view(4, -1, 4)[..., [1, 3]] > 0
    assert "zero_rate, latent_bound_calibrated" in report["missing"]
    # There is nothing to draw from, wherever it is asked for.
    assert eval.main([*evaluate, "evaluation.stochastic_codes=true"]) == 2
    assert "the anchor codec's codes are certain" in capsys.readouterr().err
    assert precompute_codes.main([*with_config, *codec, "--latents", *overrides]) == 2
    assert "the anchor codec has no latents" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"codec\.model: anchor has nothing to draw from"):
        load_config(NANO, overrides=[*overrides, "stages.rq_transformer.stochastic_codes=true"])
    assert torch.equal(codes["codes"][real], batch["input_ids"].view(4, -1, 4)[..., [1, 3]][real])
