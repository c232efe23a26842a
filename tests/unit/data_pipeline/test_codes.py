from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from numpy.typing import ArrayLike, NDArray

from data_pipeline import (
    CodeDataset,
    StepLoader,
    TokenDataset,
    code_shard_is_done,
    finish_codes,
    write_code_shard,
)
from data_pipeline.__main__ import main
from data_pipeline.code_manifest import CODE_MANIFEST_NAME, CodeManifest, Precision, load_code_manifest
from data_pipeline.errors import (
    CodecMismatchError,
    CorruptShardError,
    EmptySplitError,
    FingerprintMismatchError,
    MissingShardError,
    NotADatasetError,
)
from data_pipeline.files import write_json
from data_pipeline.manifest import read_json
from data_pipeline.verification import verify

SIZES = (16, 300)
CODEC = "c0dec"


def codes_of(samples: range) -> NDArray[np.int64]:
    """[n, 8, 2] codes that say which sample and position they belong to."""
    numbers = np.array(samples)[:, None, None]
    return (numbers * 7 + np.arange(8)[None, :, None] + np.arange(2)) % np.array(SIZES)


def write(
    directory: Path,
    tokens: TokenDataset,
    shard: int,
    codec: str = CODEC,
    latents: ArrayLike | None = None,
    precision: Precision = "fp32",
) -> None:
    write_code_shard(
        directory,
        tokens.split,
        shard,
        codes_of(tokens.shard_range(shard)),
        token_dataset=tokens,
        codec_hash=codec,
        compression_factor=4,
        codebook_sizes=SIZES,
        latents=latents,
        precision=precision,
    )


@pytest.fixture(scope="module")
def codes(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("codes")
    for split in ("train", "validation", "test"):
        tokens = TokenDataset(built, split)
        for shard in range(len(tokens.shards)):
            write(directory, tokens, shard)
    finish_codes(directory, built, codec_hash=CODEC)
    return directory


def test_codes_are_joined_by_the_sample_index(built: Path, codes: Path) -> None:
    tokens = TokenDataset(built, "train")
    dataset = CodeDataset(tokens, codes, codec_hash=CODEC)
    assert len(dataset) == len(tokens)
    assert (dataset.compression_factor, dataset.codebook_sizes, dataset.codec_hash) == (4, SIZES, CODEC)
    indices = [len(tokens) - 1, 0, 205]
    batch = dataset.read(indices)
    assert batch["codes"].dtype == torch.int64
    assert batch["codes"].tolist() == np.concatenate([codes_of(range(i, i + 1)) for i in indices]).tolist()
    assert torch.equal(batch["input_ids"], tokens.read(indices)["input_ids"])
    with StepLoader(dataset, global_batch_size=4) as loader:
        _, batch = next(loader)
        assert batch["codes"].shape == (4, 8, 2)


def test_stock_webdataset_reads_codes_with_the_keys_of_the_tokens(built: Path, codes: Path) -> None:
    def read(directory: Path) -> list[dict[str, object]]:
        urls = sorted(str(path) for path in (directory / "train").glob("*.tar"))
        return list(webdataset.WebDataset(urls, shardshuffle=False).decode())

    token_groups, code_groups = read(built), read(codes)
    assert [group["__key__"] for group in token_groups] == [group["__key__"] for group in code_groups]
    rows = np.concatenate([group["codes.npy"] for group in code_groups])
    assert rows.dtype == np.uint16
    assert np.array_equal(rows, codes_of(range(len(TokenDataset(built, "train")))))


def test_another_codec_or_other_tokens_are_refused(
    built: Path, codes: Path, make_config: object, tmp_path: Path
) -> None:
    tokens = TokenDataset(built, "train")
    with pytest.raises(CodecMismatchError, match=f"codec {CODEC}, but the codec in use is 0ther"):
        CodeDataset(tokens, codes, codec_hash="0ther")
    with pytest.raises(CodecMismatchError, match="0ther"):
        write(codes, tokens, 0, codec="0ther")
    tokens.fingerprint = "f00"
    with pytest.raises(FingerprintMismatchError, match="token shards in use are f00"):
        CodeDataset(tokens, codes)


def test_codes_say_what_they_were_computed_in(built: Path, codes: Path, tmp_path: Path) -> None:
    tokens = TokenDataset(built, "train")
    # fp32 is what all codes were made in before there was a choice: their fingerprints hold.
    assert load_code_manifest(codes).fingerprint == load_code_manifest(codes).compute_fingerprint()
    assert "precision" not in json.dumps(fingerprinted(load_code_manifest(codes)))
    rows = {"token_fingerprint": tokens.fingerprint, "codec_hash": CODEC}
    assert code_shard_is_done(codes, "train", 0, **rows)
    assert not code_shard_is_done(codes, "train", 0, **rows, precision="bf16")
    with pytest.raises(CodecMismatchError, match=r"made in fp32, not in bf16: go on with --precision fp32"):
        write(codes, tokens, 0, precision="bf16")
    for shard in range(len(tokens.shards)):
        write(tmp_path, tokens, shard, precision="bf16")
    with pytest.raises(MissingShardError):
        finish_codes(tmp_path, built, codec_hash=CODEC, splits=["train"])
    manifest = finish_codes(tmp_path, built, codec_hash=CODEC, splits=["train"], precision="bf16")
    assert manifest.layout.precision == "bf16"
    assert load_code_manifest(tmp_path) == manifest
    assert "precision" in json.dumps(fingerprinted(manifest))


def fingerprinted(manifest: CodeManifest) -> Any:
    """What the fingerprint of a manifest is taken over."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipeline.code_manifest.sha256_json", lambda value: value)
        return manifest.compute_fingerprint()


def test_a_killed_task_finds_what_is_left(built: Path, tmp_path: Path) -> None:
    tokens = TokenDataset(built, "train")

    def done() -> list[bool]:
        return [
            code_shard_is_done(tmp_path, "train", i, token_fingerprint=tokens.fingerprint, codec_hash=CODEC)
            for i in range(len(tokens.shards))
        ]

    write(tmp_path, tokens, 1)
    write(tmp_path, tokens, 0, codec="0ther")
    assert done()[:2] == [False, True]
    with pytest.raises(MissingShardError, match="train/codes-000000"):
        finish_codes(tmp_path, built, codec_hash=CODEC, splits=["train"])
    with pytest.raises(NotADatasetError, match="not all of its shards are encoded"):
        CodeDataset(tokens, tmp_path)
    for shard in range(len(tokens.shards)):
        write(tmp_path, tokens, shard)
    assert all(done())
    (tmp_path / "train/codes-000001.tar").write_bytes(b"cut")
    assert not done()[1]
    write(tmp_path, tokens, 1)
    manifest = finish_codes(tmp_path, built, codec_hash=CODEC, splits=["train"])
    assert finish_codes(tmp_path, built, codec_hash=CODEC, splits=["train"]) == manifest
    with pytest.raises(EmptySplitError, match="'test' was not encoded; there are: train"):
        CodeDataset(TokenDataset(built, "test"), tmp_path)


def test_shards_are_byte_identical_when_made_again(built: Path, codes: Path, tmp_path: Path) -> None:
    write(tmp_path, TokenDataset(built, "train"), 0)
    for name in ("codes-000000.tar", "codes-000000.index.npy", "codes-000000.done.json"):
        assert (tmp_path / "train" / name).read_bytes() == (codes / "train" / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codes: codes[:-1], "must be integers of shape"),
        (lambda codes: codes[:, :4], "must be integers of shape"),
        (lambda codes: codes.astype(np.float32), "must be integers of shape"),
        (lambda codes: codes + 300, "out of the range"),
        (lambda codes: codes - 300, "out of the range"),
    ],
)
def test_codes_that_do_not_fit_are_refused(built: Path, tmp_path: Path, change: object, message: str) -> None:
    tokens = TokenDataset(built, "train")
    with pytest.raises(ValueError, match=message):
        write_code_shard(
            tmp_path,
            "train",
            0,
            change(codes_of(tokens.shard_range(0))),  # type: ignore[operator]
            token_dataset=tokens,
            codec_hash=CODEC,
            compression_factor=4,
            codebook_sizes=SIZES,
        )


def test_damage_is_named(built: Path, codes: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(codes, tmp_path / "copy"))
    path = directory / "train/codes-000001.tar"
    data = bytearray(path.read_bytes())
    data[data.index(codes_of(range(205, 206)).astype("<u2").tobytes())] ^= 1
    path.write_bytes(data)
    dataset = CodeDataset(TokenDataset(built, "train"), directory)
    dataset.read([0, 204])
    with pytest.raises(CorruptShardError, match=r"codes-000001\.tar: sample 5 is damaged: its codes"):
        dataset.read([205])
    path.unlink()
    with pytest.raises(MissingShardError, match="codes-000001"):
        CodeDataset(TokenDataset(built, "train"), directory)


def test_verify_looks_at_every_code_and_every_file(
    built: Path, codes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = Path(shutil.copytree(codes, tmp_path / "copy"))
    assert verify(directory) == []
    # Sound bytes, by their hashes, of a code that its codebook does not have.
    manifest = load_code_manifest(directory)
    layout = manifest.layout.model_copy(update={"codebook_sizes": (16, 290)})
    narrower = manifest.model_copy(update={"layout": layout})
    narrower = narrower.model_copy(update={"fingerprint": narrower.compute_fingerprint()})
    write_json(directory / CODE_MANIFEST_NAME, narrower.model_dump(mode="json"))
    expected = [
        sample
        for sample in range(len(TokenDataset(built, "train")))
        if codes_of(range(sample, sample + 1))[..., 1].max() >= 290
    ]
    found = [line for line in verify(directory) if "train/" in line]
    assert expected and len(found) == len(expected)
    assert "codes-000000.tar: sample " in found[0] and found[0].endswith("breaks the rules of the format")

    shutil.copy(codes / CODE_MANIFEST_NAME, directory)
    stranger = directory / "train" / "codes-000099.tar"
    stranger.write_bytes(b"")
    assert verify(directory) == [f"{stranger}: not in the manifest"]
    stranger.unlink()
    path = directory / "train/codes-000001.tar"
    data = bytearray(path.read_bytes())
    data[data.index(codes_of(range(205, 206)).astype("<u2").tobytes())] ^= 1
    path.write_bytes(data)
    assert main(["verify", str(directory)]) == 1
    told = capsys.readouterr().out
    assert "damaged, swapped or cut (sha256)" in told and "1 of 200 samples cannot be read: 5" in told


def test_inspect_and_stats_read_codes(codes: Path, built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(codes), "--samples", "1"]) == 0
    told = capsys.readouterr().out
    first = " ".join(f"[{a} {b}]" for a, b in codes_of(range(1))[0])
    assert CODEC in told and f"--- train sample 0, a latent in brackets\n{first}\n" in told
    assert main(["inspect", str(codes), "--split", "tset"]) == 1
    assert "there are: train, validation, test" in capsys.readouterr().err
    assert main(["stats", str(codes)]) == 0
    told = capsys.readouterr().out
    samples = len(TokenDataset(built, "train"))
    bits = (np.log2(16) + np.log2(300)) / 4
    assert f"train: {samples:,} samples, {8 * samples:,} latents of K=4" in told
    assert f"at most {bits:.3f} bits per token" in told
    counts = np.bincount(codes_of(range(samples))[..., 1].ravel(), minlength=300)
    shares = counts[counts > 0] / counts.sum()
    perplexity = np.exp(-(shares * np.log(shares)).sum())
    assert f"level  2       {len(shares)} of 300 codes used, perplexity {perplexity:,.1f}\n" in told


def test_large_codebooks_take_32_bits(built: Path, tmp_path: Path) -> None:
    tokens = TokenDataset(built, "test")
    sizes = (100_000, 2)
    for shard in range(len(tokens.shards)):
        values = np.zeros((len(tokens.shard_range(shard)), 8, 2), dtype=np.int64)
        values[..., 0] = 99_999
        write_code_shard(
            tmp_path,
            "test",
            shard,
            torch.from_numpy(values),
            token_dataset=tokens,
            codec_hash=CODEC,
            compression_factor=4,
            codebook_sizes=sizes,
        )
    finish_codes(tmp_path, built, codec_hash=CODEC, splits=["test"])
    assert CodeDataset(tokens, tmp_path).read([0])["codes"][0, 0].tolist() == [99_999, 0]


# Latents beside the codes --------------------------------------------------------------------------------


def latents_of(samples: range) -> NDArray[np.float32]:
    """[n, 8, 3] numbers that fp16 holds exactly."""
    numbers = np.array(samples, dtype=np.float32)[:, None, None]
    return (
        (numbers % 64) / 4
        - np.arange(8, dtype=np.float32)[None, :, None]
        + np.arange(3, dtype=np.float32) / 8
    )


def test_latents_are_kept_beside_the_codes(built: Path, codes: Path, tmp_path: Path) -> None:
    tokens = TokenDataset(built, "train")
    for shard in range(len(tokens.shards)):
        write(tmp_path, tokens, shard, latents=latents_of(tokens.shard_range(shard)))
        for wanted in (False, True):
            assert code_shard_is_done(
                tmp_path,
                "train",
                shard,
                token_fingerprint=tokens.fingerprint,
                codec_hash=CODEC,
                with_latents=wanted,
            )
    finish_codes(tmp_path, built, codec_hash=CODEC, splits=("train",))
    indices = [len(tokens) - 1, 0, 205]
    batch = CodeDataset(tokens, tmp_path, with_latents=True).read(indices)
    assert batch["latents"].dtype == torch.float32
    assert (
        batch["latents"].tolist() == np.concatenate([latents_of(range(i, i + 1)) for i in indices]).tolist()
    )
    plain = CodeDataset(tokens, tmp_path).read(indices)
    assert "latents" not in plain
    assert torch.equal(plain["codes"], CodeDataset(tokens, codes).read(indices)["codes"])


def test_latents_that_are_not_there_are_a_clear_error(built: Path, codes: Path) -> None:
    tokens = TokenDataset(built, "train")
    with pytest.raises(NotADatasetError, match=r"codes without their latents.*--latents"):
        CodeDataset(tokens, codes, with_latents=True)
    assert not code_shard_is_done(
        codes, "train", 0, token_fingerprint=tokens.fingerprint, codec_hash=CODEC, with_latents=True
    )


@pytest.mark.parametrize("moment", ["before it is read", "before it is removed"])
def test_another_task_that_adds_latents_takes_the_manifest_away(
    built: Path, codes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    directory = Path(shutil.copytree(codes, tmp_path / "copy"))
    manifest, tokens = directory / CODE_MANIFEST_NAME, TokenDataset(built, "train")

    def read(path: Path) -> Any:
        if moment == "before it is read":
            manifest.unlink()
        values = read_json(path)
        manifest.unlink()
        return values

    monkeypatch.setattr("data_pipeline.code_manifest.read_json", read)
    write(directory, tokens, 0, latents=latents_of(tokens.shard_range(0)))
    assert code_shard_is_done(
        directory, "train", 0, token_fingerprint=tokens.fingerprint, codec_hash=CODEC, with_latents=True
    )


def test_a_manifest_of_something_else_is_not_passed_over(built: Path, tmp_path: Path) -> None:
    (tmp_path / CODE_MANIFEST_NAME).write_text("{}")
    with pytest.raises(NotADatasetError, match="not the manifest of codes"):
        write(tmp_path, TokenDataset(built, "train"), 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e5])
def test_latents_that_do_not_fit_are_refused(built: Path, tmp_path: Path, value: float) -> None:
    tokens = TokenDataset(built, "train")
    latents = latents_of(tokens.shard_range(0))
    with pytest.raises(ValueError, match="have shape"):
        write(tmp_path, tokens, 0, latents=latents[:, :4])
    latents[3, 2, 1] = value
    with pytest.raises(ValueError, match="do not fit fp16"):
        write(tmp_path, tokens, 0, latents=latents)
