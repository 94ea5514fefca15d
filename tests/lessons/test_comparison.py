"""What training logs of student and teacher: against NumPy in float64, and the same however tokens are cut."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lessons.test_fused import HEADS, MESH, B, E, T, V, inputs, logits
from scipy.special import entr, log_softmax, rel_entr

from epigone.evaluate.agreement import top_overlap
from epigone.evaluate.calibration import TopPredictions, expected_calibration_error
from epigone.lessons.comparison import as_pairs, compare
from epigone.lessons.divergences import MASKED
from epigone.lessons.heads import Head, Hidden
from epigone.models.sharding import make_mesh

OF_STUDENT = {"student_cross_entropy", "student_entropy", "student_ece"}
ALL = OF_STUDENT | {name.replace("student", "teacher") for name in OF_STUDENT}
ALL |= {"forward_kl", "reverse_kl", "agreement_top1", "agreement_top5"}


def means(student, teacher, targets, weights, **given):
    """Every measure as a number."""
    pairs = jax.jit(lambda *x: as_pairs(compare(*x, **given)))(student, teacher, targets, weights)
    assert all(total.shape == count.shape == () for total, count in pairs.values())
    return {name: float(total) / float(count) for name, (total, count) in pairs.items()}


def reference(student, teacher, targets, weights):
    """The definitions in float64, of logits [B, T, V]; weights of 0 and 1 alone, since the ECE counts places."""
    kept = weights > 0
    assert set(np.unique(weights)) <= {0.0, 1.0}
    found, logs = {}, {}
    for who, raw in (("student", student), ("teacher", teacher)):
        logs[who] = log = log_softmax(np.float64(raw), axis=-1)[kept]
        p, hit = np.exp(log), targets[kept]
        found[f"{who}_cross_entropy"] = -log[np.arange(len(hit)), hit].mean()
        found[f"{who}_entropy"] = entr(p).sum(-1).mean()
        found[f"{who}_ece"] = expected_calibration_error(TopPredictions(p.max(-1), p.argmax(-1) == hit))
    s, p = np.exp(logs["student"]), np.exp(logs["teacher"])
    found["forward_kl"], found["reverse_kl"] = rel_entr(p, s).sum(-1).mean(), rel_entr(s, p).sum(-1).mean()
    found["agreement_top1"] = (s.argmax(-1) == p.argmax(-1)).mean()
    shown = [np.where(np.float64(raw)[kept] > MASKED, raw[kept], -np.inf) for raw in (student, teacher)]
    found["agreement_top5"] = top_overlap(*shown, 5).mean()
    return found


def alike(seed=0, **given):
    """Inputs whose teacher is near its student, so that they agree now and then, with weights of 0 and 1."""
    student, teacher, targets, weights = inputs(seed, **given)
    noise = np.random.default_rng(seed).normal(size=(B, T, E)).astype(np.float32)
    states, head = np.zeros((B, T, E), np.float32), np.zeros((V, E), np.float32)
    states[..., : student.hidden_BTD.shape[-1]], head[:, : student.weight_VD.shape[1]] = student[0], student[1]
    teacher = Hidden(states + 0.4 * noise, head + 0.1 * teacher.weight_VD, student.bias_V)
    return student, teacher, targets, np.float32(weights > 0)


def assert_same(found, expected, **given):
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, err_msg=name, **({"rtol": 2e-5, "atol": 2e-6} | given))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("seed", [0, 1])
def test_values_are_those_of_numpy_in_float64(heads, seed):
    student, teacher, targets, weights = alike(seed)
    dense = [np.asarray(logits(head, x)) for head, x in zip(HEADS[heads], (student, teacher), strict=True)]
    expected = reference(*dense, targets, weights)
    assert 0.2 < expected["agreement_top1"] < 0.9
    assert expected["agreement_top1"] != expected["agreement_top5"]
    assert_same(means(student, teacher, targets, weights, heads=HEADS[heads], chunk=7), expected)


def test_every_measure_is_there_and_without_a_teacher_only_the_students():
    student, teacher, targets, weights = alike(2)
    both, one = means(student, teacher, targets, weights), means(student, None, targets, weights)
    assert set(both) == ALL
    assert one == {name: both[name] for name in OF_STUDENT}


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_no_mesh_changes_anything(sizes, heads):
    given = alike(3)
    expected = means(*given, heads=HEADS[heads])
    with jax.set_mesh(make_mesh(*sizes)):
        cut = jax.tree.map(jnp.asarray, given)
        assert_same(means(*cut, heads=HEADS[heads], mesh=MESH, chunk=5), expected)


def test_equal_logits_go_to_the_lowest_id_wherever_the_vocabulary_is_cut():
    """The best tokens of the student tie at 3 and 40, which lie on different devices; so do all others."""
    states = np.ones((B, T, 1), np.float32)
    head = np.zeros((V, 1), np.float32)
    head[[3, 40]] = 2.0
    other = np.zeros((V, 1), np.float32)
    other[[3, 0, 1, 2, 30]] = [[5.0], [4.0], [4.0], [4.0], [4.0]]
    targets, weights = np.full((B, T), 3, np.int32), np.ones((B, T), np.float32)
    given = Hidden(states, head), Hidden(states, other), targets, weights
    with jax.set_mesh(make_mesh(1, 1, 8)):
        found = means(*jax.tree.map(jnp.asarray, given), mesh=MESH)
    for one in (found, means(*given)):
        assert one["agreement_top1"] == 1.0
        # 3, 40, 0, 1, 2 against 3, 0, 1, 2, 30.
        assert one["agreement_top5"] == pytest.approx(0.8)


@pytest.mark.parametrize("chunk", [1, 5, 48, 1000, None])
def test_no_chunk_changes_anything(chunk):
    given = alike(4, bias=False)
    assert_same(means(*given, chunk=chunk), means(*given, chunk=48))


def test_padding_changes_nothing_whatever_it_holds():
    student, teacher, targets, weights = alike(5)
    wild = lambda x: np.concatenate([x, 50 * x], axis=1)  # noqa: E731
    more = (
        student._replace(hidden_BTD=wild(student.hidden_BTD)),
        teacher._replace(hidden_BTD=wild(teacher.hidden_BTD)),
        np.concatenate([targets, 0 * targets], axis=1),
        np.concatenate([weights, 0 * weights], axis=1),
    )
    assert_same(means(*more, chunk=9), means(student, teacher, targets, weights))


def test_parts_of_a_batch_add_up_and_their_own_errors_do_not():
    student, teacher, targets, weights = alike(6)
    cut = lambda rows: (  # noqa: E731
        student._replace(hidden_BTD=student.hidden_BTD[rows]),
        teacher._replace(hidden_BTD=teacher.hidden_BTD[rows]),
        targets[rows],
        weights[rows],
    )
    parts = [compare(*cut(rows)) for rows in (slice(0, 2), slice(2, 8))]
    added = as_pairs(jax.tree.map(jnp.add, *parts))
    whole = means(student, teacher, targets, weights)
    assert_same({name: float(total / count) for name, (total, count) in added.items()}, whole)
    alone = [as_pairs(part)["student_ece"][0] for part in parts]
    assert float(sum(alone)) > 1.01 * float(added["student_ece"][0])


def test_tokens_count_by_their_weight():
    """A weight of 2 is the token twice."""
    student, teacher, targets, weights = alike(7)
    twice = weights * (1 + (np.arange(T) % 2))
    double = jax.tree.map(lambda x: np.concatenate([x, x[:, 1::2]], axis=1), (student[0], teacher[0], targets, weights))
    given = student._replace(hidden_BTD=double[0]), teacher._replace(hidden_BTD=double[1]), *double[2:]
    assert_same(means(student, teacher, targets, twice), means(*given))


def of_probabilities(rows):
    """Hidden states and a head whose logits are the logarithms of these rows."""
    return Hidden(np.log(np.float32(rows))[None], np.eye(len(rows[0]), dtype=np.float32))


def test_calibration_error_by_hand():
    """Three tokens in the bin (0.6, 0.667]: confidences 0.62, 0.64, 0.66, one right. One at 0.9, right."""
    rows = [[0.62, 0.3, 0.08], [0.2, 0.64, 0.16], [0.3, 0.04, 0.66], [0.9, 0.06, 0.04]]
    targets, weights = np.array([[0, 0, 1, 0]], np.int32), np.ones((1, 4), np.float32)
    found = means(of_probabilities(rows), None, targets, weights)
    assert found["student_ece"] == pytest.approx((abs(1 - 0.62 - 0.64 - 0.66) + abs(1 - 0.9)) / 4, abs=1e-6)
    assert found["student_cross_entropy"] == pytest.approx(-np.log([0.62, 0.2, 0.04, 0.9]).mean(), rel=1e-5)


def test_agreement_and_divergence_by_hand():
    student = of_probabilities([[0.5, 0.25, 0.25]])
    teacher = of_probabilities([[0.25, 0.5, 0.25]])
    found = means(student, teacher, np.array([[2]], np.int32), np.ones((1, 1), np.float32))
    assert found["agreement_top1"] == 0.0
    assert found["agreement_top5"] == 1.0
    assert found["forward_kl"] == pytest.approx(0.25 * np.log(2), rel=1e-5)
    assert found["reverse_kl"] == pytest.approx(0.25 * np.log(2), rel=1e-5)
    assert found["student_entropy"] == found["teacher_entropy"] == pytest.approx(1.5 * np.log(2), rel=1e-5)


def test_a_model_beside_itself_agrees_wholly():
    student, _, targets, weights = alike(8)
    found = means(student, student, targets, weights)
    assert found["agreement_top1"] == found["agreement_top5"] == 1.0
    assert found["forward_kl"] == found["reverse_kl"] == 0.0
    assert found["student_ece"] == found["teacher_ece"]


@pytest.mark.parametrize("rows", [44, 56])
def test_a_teacher_with_other_padding(rows):
    student, teacher, targets, weights = alike(9)
    heads = HEADS["padded"]
    other = teacher._replace(
        weight_VD=np.resize(np.vstack([teacher.weight_VD, 9 + teacher.weight_VD]), (rows, E)),
        bias_V=np.resize(teacher.bias_V, rows),
    )
    expected = means(student, teacher, targets, weights, heads=heads)
    assert_same(means(student, other, targets, weights, heads=heads), expected)
    with jax.set_mesh(make_mesh(2, 1, 4)):
        cut = jax.tree.map(jnp.asarray, (student, other, targets, weights))
        assert_same(means(*cut, heads=heads, mesh=MESH), expected)


def test_tokens_that_are_never_predicted_are_in_no_list():
    """Four tokens can be said: their list is the longer one, and its three shared tokens are three quarters."""
    student, teacher, targets, weights = alike(10)
    heads = Head(vocab_size=6, never=(0, 3)), Head(vocab_size=6, never=(0, 2, 3))
    dense = [np.asarray(logits(head, x)) for head, x in zip(heads, (student, teacher), strict=True)]
    targets = np.full_like(targets, 4)
    found = means(student, teacher, targets, weights, heads=heads)
    assert found["agreement_top5"] == pytest.approx(0.75)
    expected = reference(*dense, targets, weights)
    assert found["agreement_top1"] == pytest.approx(expected["agreement_top1"])
    assert found["forward_kl"] == pytest.approx(expected["forward_kl"], rel=1e-5)
    # What the student can say and the teacher never is infinitely far by definition, and a finite number here.
    assert 1e6 < found["reverse_kl"] < np.inf


def test_a_teacher_whose_scores_are_at_hand():
    """Log-probabilities of fewer tokens than the student has rows, some of them -inf."""
    student, teacher, targets, weights = alike(11)
    heads = HEADS["padded"]
    scores = np.array(logits(heads[1], teacher))[..., :41]
    scores[..., :2] = -np.inf
    padded = np.concatenate([scores, np.full((B, T, V - 41), -np.inf)], axis=-1)
    rows = np.asarray(logits(Head(vocab_size=41, never=(0, 1)), student))
    given = {"heads": (Head(vocab_size=41, never=(0, 1)), None)}
    expected = reference(rows, np.maximum(padded, -1e9), targets, weights)
    assert_same(means(student, scores, targets, weights, chunk=9, **given), expected)


def temporaries(tokens, vocabulary, size=64):
    """Bytes that the compiled comparison needs beside its arguments and results."""
    kind = jax.ShapeDtypeStruct
    hidden = Hidden(kind((1, tokens, size), jnp.float32), kind((vocabulary, size), jnp.float32))
    rows = kind((1, tokens), jnp.int32), kind((1, tokens), jnp.float32)
    made = jax.jit(partial(compare, chunk=256)).lower(hidden, hidden, *rows)
    return made.compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    assert temporaries(8192, 8192) - temporaries(1024, 8192) < 8192 * 64 * 4 * 4
