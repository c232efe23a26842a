from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.packing import (
    DOCUMENT,
    LENGTH,
    NUM_BYTES,
    PHASE,
    START,
    PackedSample,
    Packer,
    document_phase,
)

PAD, EOS = 0, 1


def pack(
    lengths: list[int], phases: list[int], sample_length: int, grid: int
) -> tuple[list[PackedSample], list]:
    """Packs documents of distinct tokens, 3 bytes a token (the end-of-text token has none)."""
    packer = Packer(sample_length, grid, PAD, np.dtype("<u2"), first_document=10)
    samples, documents, next_token = [], [], 2
    for length, phase in zip(lengths, phases, strict=True):
        tokens = np.arange(next_token, next_token + length)
        tokens[-1] = EOS
        next_token += length
        documents.append(tokens)
        samples += packer.add(tokens, phase, 3 * (length - 1), lambda position: 3 * position)
    return samples + packer.flush(), documents


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_packing_loses_nothing_and_keeps_the_grid(data: st.DataObject) -> None:
    grid = data.draw(st.sampled_from([1, 2, 4, 8]))
    sample_length = grid * data.draw(st.integers(1, 8))
    lengths = data.draw(st.lists(st.integers(1, 60), max_size=30))
    phases = data.draw(st.lists(st.integers(0, grid - 1), min_size=len(lengths), max_size=len(lengths)))
    samples, documents = pack(lengths, phases, sample_length, grid)

    pieces: dict[int, list[np.ndarray]] = {}
    num_bytes: dict[int, int] = {}
    for sample in samples:
        real = np.zeros(sample_length, dtype=bool)
        chunk_owner: dict[int, int] = {}
        for segment in sample.segments:
            start, length, document = segment[START], segment[LENGTH], int(segment[DOCUMENT])
            first_piece = document not in pieces
            assert segment[PHASE] == (phases[document - 10] if first_piece else 0)
            assert (start - segment[PHASE]) % grid == 0
            pieces.setdefault(document, []).append(sample.tokens[start : start + length])
            num_bytes[document] = num_bytes.get(document, 0) + segment[NUM_BYTES]
            assert not real[start : start + length].any()
            real[start : start + length] = True
            for chunk in range(start // grid, (start + length - 1) // grid + 1):
                assert chunk_owner.setdefault(chunk, document) == document
        assert (sample.tokens[~real] == PAD).all()
        # nothing but the padding of the grid is left empty, except behind the end of the split
        if sample is not samples[-1]:
            assert len(chunk_owner) == sample_length // grid
    for number, tokens in enumerate(documents):
        assert np.array_equal(np.concatenate(pieces[number + 10]), tokens)
        assert num_bytes[number + 10] == 3 * (len(tokens) - 1)
    assert sum(sample.documents for sample in samples) == len(documents)


def test_a_cut_document_goes_on_at_the_start_of_the_next_sample() -> None:
    samples, _ = pack([3, 9], [1, 2], sample_length=8, grid=4)
    assert samples[0].tokens.tolist() == [0, 2, 3, 1, 0, 0, 5, 6]
    assert samples[0].segments.tolist() == [[0, 1, 3, 1, 6, 10], [0, 6, 2, 2, 6, 11]]
    assert samples[1].tokens.tolist() == [7, 8, 9, 10, 11, 12, 1, 0]
    assert samples[1].segments.tolist() == [[0, 0, 7, 0, 18, 11]]
    assert [sample.documents for sample in samples] == [2, 0]


def test_phases_depend_on_seed_and_document_only_and_are_uniform() -> None:
    assert document_phase(3, "a", 8) == document_phase(3, "a", 8)
    counts = np.bincount([document_phase(0, f"document {i}", 4) for i in range(4000)], minlength=4)
    assert (abs(counts - 1000) < 120).all()
    other = [document_phase(0, str(i), 64) == document_phase(1, str(i), 64) for i in range(640)]
    assert sum(other) < 40
