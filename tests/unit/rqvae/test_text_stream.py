"""Text of tokens that come a few at a time: whole characters, and stop strings wherever the cuts are."""

from __future__ import annotations

import itertools

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rqvae.text_stream import TextStream, decode_text


@pytest.fixture(scope="module")
def by_bytes() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.fixture(scope="module")
def by_words() -> PreTrainedTokenizerFast:
    """Words that carry the space before them, which the first one loses."""
    words = ["▁a", "▁bc", "d", "▁", "."]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="."))
    inner.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=True)


def pieces(stream: TextStream, ids: list[int], sizes: tuple[int, ...]) -> list[str]:
    shown = []
    for size in itertools.cycle(sizes):
        if not ids or stream.stopped:
            break
        shown.append(stream.push(ids[:size]))
        ids = ids[size:]
    return [*shown, stream.finish()]


SIZES = [(1,), (2,), (3,), (4,), (1, 5), (7, 2), (100,)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("text", ["plain", "héllo 🎉 wörld – 日本語", "🎉", "", "a\n\n  b �x", "é" * 9])
def test_pieces_are_the_text_in_whole_characters(
    by_bytes: PreTrainedTokenizerFast, text: str, sizes: tuple[int, ...]
) -> None:
    ids = by_bytes(text)["input_ids"]
    assert len(ids) == len(text.encode())
    shown = pieces(TextStream(by_bytes), ids, sizes)
    assert "".join(shown) == text
    assert text.count("\ufffd") == "".join(shown).count("\ufffd")


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_bytes_that_are_no_text(by_bytes: PreTrainedTokenizerFast, sizes: tuple[int, ...]) -> None:
    for ids in ([*range(256)], [*range(255, -1, -1)], [i * 37 % 256 for i in range(300)], [200] * 9):
        assert "".join(pieces(TextStream(by_bytes), list(ids), sizes)) == decode_text(by_bytes, ids)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_words_with_spaces(by_words: PreTrainedTokenizerFast, sizes: tuple[int, ...]) -> None:
    for ids in itertools.product(range(5), repeat=4):
        shown = pieces(TextStream(by_words), list(ids), sizes)
        assert "".join(shown) == decode_text(by_words, ids)


@pytest.mark.parametrize(
    ("text", "stop", "exempt", "expected", "taken"),
    [
        ("one two three", ["two"], 0, "one ", 7),
        ("one two three", ["e t"], 0, "on", 5),
        ("one two three", ["three!", "x"], 0, "one two three", 13),
        ("aaab", ["aab"], 0, "a", 4),
        ("abcdef", ["abcdef", "cd"], 0, "ab", 4),  # complete first, though it began later
        ("abcd", ["bcd", "abcd"], 0, "", 4),  # complete together: the one that began first
        ("ab ab ab", ["ab"], 2, "ab ", 5),  # the first is complete within the tokens that are exempt
        ("ab ab ab", ["ab"], 1, "", 2),  # it began in them
        ("ab ab ab", ["ab"], 8, "ab ab ab", 8),
        ("x🎉y", ["🎉"], 0, "x", 5),
        ("x🎉y", ["🎉"], 4, "x", 5),
        ("stop", ["stop"], 0, "", 4),
    ],
)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_text_ends_at_the_stop_string_that_is_complete_first(
    by_bytes: PreTrainedTokenizerFast,
    text: str,
    stop: list[str],
    exempt: int,
    expected: str,
    taken: int,
    sizes: tuple[int, ...],
) -> None:
    stream = TextStream(by_bytes, stop, exempt)
    shown = pieces(stream, by_bytes(text)["input_ids"], sizes)
    assert "".join(shown) == stream.text == expected
    assert stream.num_tokens == taken
    assert stream.stopped == (expected != text)


def test_what_may_begin_a_stop_string_is_held_back(by_bytes: PreTrainedTokenizerFast) -> None:
    stream = TextStream(by_bytes, ["\n\nQ:"])
    shown = [stream.push(by_bytes(part)["input_ids"]) for part in ("one\n", "\n", "two\n", "\nQ", ":x")]
    assert shown == ["one", "", "\n\ntwo", "", ""]
    assert stream.stopped
    assert stream.finish() == ""
