"""Teachers in memory: a decoder's own logits, and an n-gram's row for each context."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from epigone.data.pipeline import Batches, pack
from epigone.lessons.divergences import forward_kl
from epigone.lessons.fused import fused_loss
from epigone.lessons.heads import Head, Hidden
from epigone.lessons.objective import Objective
from epigone.models import decoder
from epigone.models.config import DecoderConfig
from epigone.models.ngram import NGram, NGramModel
from epigone.models.rules import Sharding
from epigone.models.sharding import make_mesh
from epigone.teachers.in_memory import DecoderTeacher, NGramTeacher, context_windows
from epigone.training.checkpoint import load_params, save_params

CONFIG = DecoderConfig(vocab_size=64, layers=1, model_size=16, heads=2, max_length=16)


class Batch(NamedTuple):
    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    weights_BT: np.ndarray
    positions_BT: np.ndarray
    segments_BT: np.ndarray


def two_documents_a_row():
    tokens = np.array([[1, 7, 8, 9, 1, 7, 8, 0], [1, 5, 6, 7, 8, 9, 10, 11]], np.int32)
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0], [1] * 8], np.int32)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 0], list(range(8))], np.int32)
    return Batch(tokens, np.roll(tokens, -1, 1), (segments > 0).astype(np.float32), positions, segments)


class Trigram:
    """Log-probabilities that depend on the last two tokens alone, bos included."""

    vocab_size, order = 12, 3

    def next_log_probs(self, contexts):
        tails = [([1, *context.tolist()])[-2:] for context in contexts]
        logits = np.stack([np.random.default_rng([0, *tail]).normal(size=self.vocab_size) for tail in tails])
        logits[:, :2] = -np.inf
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def brute_force(model, batch):
    rows = []
    for tokens, segments in zip(batch.tokens_BT, batch.segments_BT, strict=True):
        for t in range(len(tokens)):
            own = [token for token, s in zip(tokens[: t + 1], segments[: t + 1], strict=True) if s == segments[t]]
            rows.append(np.array([token for token in own if token != 1], np.int32))
    return model.next_log_probs(rows).reshape(*batch.tokens_BT.shape, -1)


def test_ngram_scores_each_token_in_its_own_segment():
    batch = two_documents_a_row()
    teacher = NGramTeacher(Trigram(), "id")
    fetched = teacher.fetch(batch)
    assert fetched["logits_BTV"].dtype == np.float32
    real = batch.segments_BT > 0
    np.testing.assert_allclose(fetched["logits_BTV"][real], brute_force(Trigram(), batch)[real], rtol=1e-6)
    np.testing.assert_array_equal(fetched["logits_BTV"][0, 1], fetched["logits_BTV"][0, 5])


def test_each_context_is_asked_for_once():
    asked = []

    class Counting(Trigram):
        def next_log_probs(self, contexts):
            asked.extend(tuple(context) for context in contexts)
            return super().next_log_probs(contexts)

    NGramTeacher(Counting(), "id").fetch(two_documents_a_row())
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_real_ngram_gives_each_target_the_probability_it_has_in_its_document(order):
    random = np.random.default_rng(0)
    documents = [random.integers(4, 20, n).astype(np.int32) for n in (5, 9, 3, 12, 7)]
    model = NGramModel.fit(NGram(order=order), documents, 20)
    rows = pack(documents, 16)
    batch = Batches([rows], None, len(rows), seed=0).batch(0)
    logits = NGramTeacher(model, "id").fetch(batch)["logits_BTV"]
    given = np.take_along_axis(logits, batch.targets_BT[..., None], -1)[..., 0][batch.weights_BT > 0]
    expected = np.concatenate(model.log_probs(documents))
    assert batch.weights_BT.sum() == len(expected)
    np.testing.assert_allclose(np.sort(given), np.sort(expected), rtol=1e-5)


@pytest.mark.parametrize("width", [1, 2, 5, 20])
def test_context_windows_end_at_the_segment(width):
    batch = two_documents_a_row()
    windows = context_windows(batch.tokens_BT, batch.segments_BT, width)
    expected = ([-1] * width + [7])[-width:]
    assert windows[0, 5].tolist() == expected
    assert set(windows[0, 4].tolist()) == {-1}


def test_ngram_teacher_gives_finite_loss_and_gradient():
    batch = two_documents_a_row()
    teacher = NGramTeacher(Trigram(), "id")
    student = jnp.zeros((2, 8, 12)).at[..., :2].set(-1e9)
    scores = teacher.scores(teacher.place(), batch, teacher.fetch(batch))
    value, gradient = jax.value_and_grad(lambda s: forward_kl(s, scores).sum())(student)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


def test_decoder_teacher_gives_the_states_of_its_own_logits_on_any_mesh():
    batch = two_documents_a_row()
    params = decoder.init(CONFIG, 0)
    expected = jax.jit(decoder.apply, static_argnums=0)(CONFIG, params, *(batch[i] for i in (0, 3, 4)))
    teacher = DecoderTeacher(CONFIG, params, "id")
    with jax.set_mesh(make_mesh(1, 2, 2)):
        placed = teacher.place()
        on_mesh = Batch(*(jax.device_put(x, P(("data", "fsdp"), None)) for x in batch))
        hidden_BTD, head_VD, bias_V = jax.jit(teacher.scores)(placed, on_mesh, {})
    assert bias_V is None
    assert teacher.head == Head(vocab_size=64, never=CONFIG.specials.never)
    allowed = [v for v in range(64) if v not in CONFIG.specials.never]
    logits = np.asarray(hidden_BTD) @ np.asarray(head_VD).T
    np.testing.assert_allclose(logits[..., allowed], expected[..., allowed], rtol=1e-5, atol=1e-5)


def test_weights_go_from_a_disk_to_their_places_and_are_nowhere_whole(tmp_path):
    params = decoder.init(CONFIG, 0)
    save_params(tmp_path / "model", params)
    asked = []

    def read(abstract):
        asked.append(abstract)
        return load_params(tmp_path / "model", abstract)

    with jax.set_mesh(make_mesh(2, 2, 2)):
        placed = DecoderTeacher(CONFIG, read, "id", sharding=Sharding(D=("data", "fsdp"))).place()
    up = asked[0]["layers"]["up_LDF"].get_value()
    assert up.sharding.shard_shape(up.shape) == (up.shape[0], up.shape[1] // 4, up.shape[2] // 2)
    for mine, wanted, target in zip(*map(jax.tree.leaves, (placed, params, asked[0])), strict=True):
        assert mine.sharding == target.sharding
        np.testing.assert_array_equal(mine, wanted)
    teacher = DecoderTeacher(CONFIG, read, "id")
    np.testing.assert_array_equal(teacher.head_alone()["head_VD"], params["outer"]["embedding_VD"][...])


def test_teachers_of_one_shape_share_a_compiled_step():
    first, second = (DecoderTeacher(CONFIG, decoder.init(CONFIG, seed), "id") for seed in (0, 1))
    assert first.scores == second.scores
    assert hash(first.scores) == hash(second.scores)
    assert NGramTeacher(Trigram(), "a").scores is NGramTeacher(Trigram(), "b").scores


def test_no_gradient_reaches_the_teacher():
    batch = two_documents_a_row()
    teacher = DecoderTeacher(CONFIG, decoder.init(CONFIG, 0), "id")
    student = Hidden(jnp.ones((2, 8, 4)), jnp.ones((64, 4)))

    def loss(params):
        scores = teacher.scores(params, batch, {})
        return fused_loss(Objective().loss, student, scores, batch.targets_BT, batch.weights_BT)[0]

    value, gradient = jax.value_and_grad(loss)(teacher.params)
    assert value > 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_flops_are_those_of_a_forward_pass():
    teacher = DecoderTeacher(CONFIG, decoder.init(CONFIG, 0), "id")
    assert teacher.flops_per_token(8) == decoder.flops_per_token(CONFIG, 8, training=False)
    assert NGramTeacher(Trigram(), "id").flops_per_token(8) == 0
