"""Logits and greedy text equal to transformers' on random tiny models of every family."""

import numpy as np
import pytest
from tiny_models import FAMILIES, VOCAB, loop_twin, make_pair

from mor_jax.models import Decoder
from tests.models.continuations import continue_prompts

pytest.importorskip("torch")
pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("quick_compilation")]

ROWS, LENGTH = 3, 40  # longer than every window (4, 5) and every original context (8, 32) of the families
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request, tmp_path_factory):
    return make_pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH))


def counted(mask):
    return np.maximum(np.cumsum(mask, axis=1) - 1, 0)


def test_the_torch_model_has_logits_worth_comparing(pair, ids):
    logits = pair.torch_logits(ids)
    assert logits.std() > 0.3
    changed = ids.copy()
    changed[:, -3] = (changed[:, -3] + 1) % VOCAB
    assert np.abs(pair.torch_logits(changed) - logits)[:, -1].max() > 100 * TOLERANCE


def test_plain_batch(pair, ids):
    mask = np.ones_like(ids)
    ours = pair.logits(ids, counted(mask), mask)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, pair.torch_logits(ids), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(pair, ids, side):
    kept = np.array([LENGTH, LENGTH - 9, LENGTH - 27])[:, None]
    place = np.arange(LENGTH)[None]
    mask = (place < kept if side == "right" else place >= LENGTH - kept).astype(int)
    positions = counted(mask)
    ours = pair.logits(ids, positions, mask)
    theirs = pair.torch_logits(ids, mask, positions)
    real = mask.astype(bool)
    np.testing.assert_allclose(ours[real], theirs[real], atol=TOLERANCE, rtol=0)
    assert np.isfinite(ours).all()


def test_three_packed_segments_equal_three_runs(pair, ids):
    lengths = (11, 9, 17)  # and three tokens of padding
    segments = np.repeat([1, 2, 3, 0], [*lengths, LENGTH - sum(lengths)])
    positions = np.concatenate([*(np.arange(n) for n in lengths), np.zeros(LENGTH - sum(lengths), int)])
    ours = pair.logits(ids, np.tile(positions, (ROWS, 1)), np.tile(segments, (ROWS, 1)))
    start = 0
    for length in lengths:
        piece = slice(start, start + length)
        np.testing.assert_allclose(ours[:, piece], pair.torch_logits(ids[:, piece]), atol=TOLERANCE, rtol=0)
        start += length


def test_loop_equals_scan(pair, ids):
    mask = np.ones_like(ids)
    loop = loop_twin(pair)
    assert {"layers_0", "layers_1"} <= set(loop.params)
    np.testing.assert_allclose(
        loop.logits(ids, counted(mask), mask), pair.logits(ids, counted(mask), mask), atol=1e-5, rtol=0
    )


def test_greedy_generation_with_left_padding(pair, ids):
    import torch

    lengths = (30, 3, 17)  # with the new tokens beyond every original context
    prompts = [row[-length:].tolist() for row, length in zip(ids, lengths, strict=True)]
    padded = np.zeros((ROWS, max(lengths)), int)
    mask = np.zeros_like(padded)
    for row, prompt in enumerate(prompts):
        padded[row, -len(prompt) :] = prompt
        mask[row, -len(prompt) :] = 1
    theirs = pair.torch_model.generate(
        torch.tensor(padded),
        attention_mask=torch.tensor(mask),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )[:, padded.shape[1] :].tolist()
    assert (
        continue_prompts(Decoder(pair.config), pair.config, {"params": pair.params}, prompts, max_new_tokens=12)
        == theirs
    )
