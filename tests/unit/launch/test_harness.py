"""The real lm-evaluation-harness on a few made-up items of every standard task, with tiny models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from launch import eval_tasks
from rqvae import RQVAE, BaseLM, IdentityCodec, RQTransformer, RQTransformerConfig, RQVAEConfig, latent_bound

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[eval]'")

ITEMS = Path(__file__).parents[2] / "offline_tasks"
ARCHITECTURE = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and an end of text."""
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(alphabet | {"<eos>": 256}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("project") / "model"
    torch.manual_seed(0)
    codec = RQVAE(
        RQVAEConfig.model_validate(
            {
                "backbone": {"architecture": ARCHITECTURE},
                "codebook_levels": 2,
                "codebook_size": 16,
                "codebook_dim": 8,
                "latent_dim": 32,
                "latent_head_dim": 16,
            }
        )
    )
    codec.save_pretrained(directory / "rqvae")
    shape = {"spatial_dim": 32, "spatial_layers": 1, "depth_dim": 32, "depth_layers": 1, "head_dim": 16}
    config = {**shape, "compression_factor": 4, "codebook_levels": 2, "codebook_size": 16}
    RQTransformer(RQTransformerConfig.model_validate(config)).save_pretrained(directory / "rq_transformer")
    BaseLM(codec.config.backbone.architecture, 256).save_pretrained(directory / "base_lm")
    byte_tokenizer().save_pretrained(directory / "tokenizer")
    return directory


def run(project: Path, *arguments: str) -> dict[str, Any]:
    options = ["--model", str(project), "--local-data", str(ITEMS), "--max-length", "512", *arguments]
    assert eval_tasks.main(options) == 0
    return json.loads((project.parent / "report.json").read_text())["tasks"]


def test_every_standard_task_runs_offline(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(project, "--limit", "1")
    assert set(rows) == {"base_lm", "latent"}
    assert all(set(row["tasks"]) == set(eval_tasks.TASKS) for row in rows.values())
    latent = {task: row["kinds"] for task, row in rows["latent"]["tasks"].items()}
    assert latent["hellaswag"]["acc_norm"].startswith("heuristic")
    assert latent["wikitext"]["bits_per_byte"] == "upper bound"
    assert latent["lambada_openai"] == {"perplexity": "upper bound", "acc": "exact (by generation)"}
    assert rows["base_lm"]["tasks"]["piqa"]["kinds"]["acc"] == "exact"
    assert "| wikitext | bits_per_byte | latent |" in capsys.readouterr().out


def test_likelihood_of_a_page_is_that_of_the_models(project: Path) -> None:
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    rows = run(project, "--tasks", "wikitext", "--limit", "1", "--batch-size", "1")
    page = json.loads((ITEMS / "wikitext/test.jsonl").open().readline())
    ids = byte_tokenizer()(wikitext_detokenizer(page))["input_ids"]
    padding = -len(ids) % 4
    tokens = torch.tensor([ids + [0] * padding])
    documents = torch.tensor([[1] * len(ids) + [0] * padding])
    pair = RQVAE.from_pretrained(project / "rqvae"), RQTransformer.from_pretrained(project / "rq_transformer")
    bound = latent_bound(*pair, tokens, documents)
    nats = {
        "base_lm": float(BaseLM.from_pretrained(project / "base_lm", 256)(tokens, documents).nats.sum()),
        "latent": float(bound.code_nats.sum() + bound.token_nats.sum()),
    }
    # Per byte of the page as it is in the data set.
    bits = {name: value / math.log(2) / len(page["page"].encode()) for name, value in nats.items()}
    for name, row in rows.items():
        assert row["tasks"]["wikitext"]["metrics"]["bits_per_byte"] == pytest.approx(bits[name], rel=1e-4)


def test_scores_do_not_depend_on_the_batch(project: Path) -> None:
    from launch.harness import BaseLMScorer, LatentScorer, Request
    from launch.scored_models import Pair

    pair = Pair(
        RQVAE.from_pretrained(project / "rqvae"), RQTransformer.from_pretrained(project / "rq_transformer")
    )
    base_lm = BaseLM.from_pretrained(project / "base_lm", 256)
    requests = [Request([5, 6, 7], [8, 9]), Request([], [10, 11, 12]), Request(list(range(17)), [3] * 6)]
    for scorer in (LatentScorer(pair, byte_tokenizer()), BaseLMScorer(base_lm)):
        together = scorer.score(requests)
        alone = [scorer.score([request])[0] for request in requests]
        assert [s.nats for s in together] == pytest.approx([s.nats for s in alone], abs=1e-4)
        assert [s.is_greedy for s in together] == [s.is_greedy for s in alone]
    # Exact: the parts of a text add up to the text.
    whole = BaseLMScorer(base_lm).score([Request([], [5, 6, 7, 8, 9])])[0]
    parts = BaseLMScorer(base_lm).score([Request([], [5, 6, 7]), Request([5, 6, 7], [8, 9])])
    assert whole.nats == pytest.approx(sum(part.nats for part in parts), abs=1e-4)


def test_an_answer_does_not_pay_for_the_places_behind_it() -> None:
    """Tokens as codes: the nats of an answer's tokens, wherever in a chunk it ends."""
    from launch.harness import LatentScorer, Request
    from launch.scored_models import Pair

    torch.manual_seed(0)
    codec = IdentityCodec(
        RQVAEConfig.model_validate(
            {"model": "identity", "backbone": {"architecture": ARCHITECTURE}, "compression_factor": 4}
        )
    )
    shape = {"spatial_dim": 32, "spatial_layers": 1, "depth_dim": 32, "depth_layers": 1, "head_dim": 16}
    config = {**shape, "compression_factor": 4, "codebook_levels": 4, "codebook_size": 258}
    latent_model = RQTransformer(RQTransformerConfig.model_validate(config)).eval()
    scorer = LatentScorer(Pair(codec, latent_model), byte_tokenizer())
    context, answer = [7, 8, 9], [20, 21, 22, 23, 24, 25, 26, 27]
    ids = torch.tensor([[0, *context, *answer]])
    whole = latent_bound(codec, latent_model, ids, (torch.arange(12) > 0)[None].long())
    whole = whole.code_nats[0, 1:].flatten()
    for length in range(1, 9):
        score = scorer.score([Request(context, answer[:length])])[0]
        assert score.nats == pytest.approx(float(whole[:length].sum()), rel=1e-5)


def test_what_generation_writes_is_greedy(project: Path) -> None:
    """Of the autoregressive model without generating; of the latent one by generating."""
    from lm_eval.api.instance import Instance

    from launch.harness import BaseLMScorer, HarnessModel, LatentScorer, Request
    from launch.ranks import Ranks
    from launch.scored_models import Pair

    pair = Pair(
        RQVAE.from_pretrained(project / "rqvae"), RQTransformer.from_pretrained(project / "rq_transformer")
    )
    tokenizer, context = byte_tokenizer(), list(range(65, 75))
    for scorer in (
        LatentScorer(pair, tokenizer),
        BaseLMScorer(BaseLM.from_pretrained(project / "base_lm", 256)),
    ):
        model = HarnessModel(scorer, tokenizer, 64, 3, Ranks(), torch.device("cpu"))
        model.encode_pair = lambda before, after: Request(context, list(map(int, after.split())))  # type: ignore[method-assign]
        written = scorer.generate([context], 6, 0.0, 0)[0]
        other = [*written[:5], (written[5] + 1) % 256]
        asked = [
            Instance("loglikelihood", {}, ("", " ".join(map(str, ids))), 0)
            for ids in (written, other, written[:2], [(written[0] + 1) % 256])
        ]
        assert [greedy for _, greedy in model.loglikelihood(asked)] == [True, False, True, False]


def test_generation_stops_where_it_is_told(project: Path) -> None:
    from lm_eval.api.instance import Instance

    from launch.harness import HarnessModel, Score, TokenScorer
    from launch.ranks import Ranks

    class Parrot(TokenScorer):
        """Writes the context again and again."""

        is_bound = False

        def score(self, requests: Any) -> list[Score]:
            return [Score(0.0)] * len(requests)

        def generate(self, contexts: Any, count: int, temperature: float, seed: int) -> list[list[int]]:
            return [(context * count)[:count] for context in contexts]

    model = HarnessModel(Parrot(), byte_tokenizer(), 16, 2, Ranks(), torch.device("cpu"))

    def instance(kind: str, *arguments: Any) -> Instance:
        return Instance(kind, {}, arguments, 0)

    asked = [
        instance("generate_until", "ab.c", {"until": ["."], "max_gen_toks": 8}),
        instance("generate_until", "xy", {"until": [], "max_gen_toks": 3, "do_sample": True}),
        instance("generate_until", "abc", {"until": "c", "max_gen_toks": 5}),
        instance("generate_until", "abc", {"max_gen_toks": 2}),
    ]
    assert model.generate_until(asked) == ["ab", "xyx", "ab", "ab"]
    pairs = [instance("loglikelihood", "xyz", "xyzx"), instance("loglikelihood", "xyz", "zzz")]
    assert [greedy for _, greedy in model.loglikelihood(pairs)] == [True, False]
    assert model.encode_pair("ab ", "cd").continuation == model.encode(" cd")
    assert len(model.truncated) == 0
    model.loglikelihood([instance("loglikelihood", "a" * 30, "b")] * 2)
    assert len(model.truncated) == 1
    with pytest.raises(ValueError, match="raise --max-length"):
        model.loglikelihood([instance("loglikelihood", "a", "b" * 17)])


def test_mistakes_are_said(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert eval_tasks.main([]) == 2
    assert "give --model" in capsys.readouterr().err
    assert eval_tasks.main(["--model", str(project), "--local-data", str(tmp_path), "--tasks", "piqa"]) == 2
    assert "holds none of train.jsonl" in capsys.readouterr().err
