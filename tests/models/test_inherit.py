"""Students from their teacher's weights: which layers and units are taken, that only they are, and what is refused."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from decoder_variants import LLAMA, VARIANTS, rows, spread_params
from flax import nnx

from epigone.errors import UserError
from epigone.identity import canonical, restore
from epigone.models.attention import causal_mask, xla_attention
from epigone.models.decoder import abstract, apply, arrays, block, init, structure
from epigone.models.importance import measure
from epigone.models.inherit import Inherit, check, inherit
from epigone.models.language_model import Specials
from epigone.models.layers import gelu, layer_norm, learned, offset_rms_norm
from epigone.models.rope import LinearScaling
from epigone.models.selection import (
    evenly,
    every_other,
    first_and_last,
    first_units,
    kept_units,
    least_redundant,
    most_active,
)
from epigone.models.sharding import Sharding, make_mesh

forward = jax.jit(apply, static_argnums=0)
replace = dataclasses.replace
DEEP = replace(LLAMA, layers=6, head_size=4)
EXPERTS = replace(LLAMA, layers=3, head_size=4, experts=4, experts_per_token=2)
EVERYTHING = VARIANTS | {
    "post": replace(LLAMA, pre_norm=False, post_norm=True, qk_norm_whole=True, norm=offset_rms_norm, qkv_bias=True),
    "pattern": replace(LLAMA, layers=3, window=3, window_pattern=(True, False), post_norm=True, tied=False),
    "experts": EXPERTS,
}


def named(params):
    return {name: np.asarray(x[...]) for group in params.values() for name, x in group.items()}


def changed(params, **values):
    """A copy in which the named arrays are others."""
    copy = jax.tree.map(lambda x: x, params)
    for group in copy.values():
        for name in set(group) & set(values):
            group[name][...] = jnp.asarray(values[name])
    return copy


@pytest.mark.parametrize("config", EVERYTHING.values(), ids=EVERYTHING.keys())
def test_all_layers_and_the_whole_width_are_the_teacher_to_the_bit(config):
    teacher = spread_params(config)
    student = inherit(config, teacher, config, init(config, 7), Inherit(width=first_units))
    assert set(named(student)) == set(named(teacher))
    for name, value in named(student).items():
        np.testing.assert_array_equal(value, named(teacher)[name], err_msg=name)


def test_whatever_is_measured_all_units_are_the_teacher_to_the_bit():
    teacher, batch = spread_params(DEEP), rows(DEEP)
    student = inherit(DEEP, teacher, DEEP, init(DEEP, 7), Inherit(least_redundant, most_active), [batch])
    np.testing.assert_array_equal(forward(DEEP, student, *batch), forward(DEEP, teacher, *batch))


def test_layers_by_name():
    def of(choice, theirs, ours):
        return choice(replace(LLAMA, layers=theirs), replace(LLAMA, layers=ours), None)

    assert of(evenly, 12, 6) == (0, 2, 4, 7, 9, 11)
    assert of(evenly, 12, 1) == (0,)
    assert of(evenly, 5, 5) == of(first_and_last, 5, 5) == (0, 1, 2, 3, 4)
    assert of(every_other, 12, 6) == (0, 2, 4, 6, 8, 10)
    assert of(every_other, 5, 3) == (0, 2, 4)
    assert of(first_and_last, 12, 5) == (0, 1, 2, 10, 11)
    with pytest.raises(UserError, match=r"layers 12 gives 6, and the student has layers 7"):
        of(every_other, 12, 7)


def test_the_student_runs_the_chosen_layers_of_the_teacher():
    """The same logits as the teacher's blocks, one after the other, without those that were left out."""
    teacher, batch, config = spread_params(DEEP), rows(DEEP), replace(DEEP, layers=3)
    student = inherit(DEEP, teacher, config, init(config, 0), Inherit(layers=(1, 2, 5)))
    right = blocks(DEEP, teacher, (1, 2, 5), *batch)
    np.testing.assert_allclose(forward(config, student, *batch), right, atol=1e-5)
    assert np.abs(np.asarray(right - blocks(DEEP, teacher, (0, 2, 5), *batch))).max() > 0.1


@partial(jax.jit, static_argnums=(0, 2))
def blocks(config, params, layers, tokens, positions, segments):
    """The teacher's logits when only these layers run, block by block."""
    model = nnx.merge(structure(config), params)
    mask = causal_mask(segments, None)
    mix = lambda q, k, v: (xla_attention(q, k, v, mask, None, 0.5), None)  # noqa: E731
    x = model.embed(tokens, positions)
    for layer in layers:
        weights = {name: value[layer] for name, value in arrays(model.layers).items()}
        x, _ = block(config, Sharding(), weights, x, model.angles(positions)[0], mix)
    return model.logits(model.finish(x))


def test_layers_that_do_nothing_are_the_first_to_go():
    """Layers 2 and 3 give zeros: the student without them is the teacher; evenly spaced layers are not."""
    teacher, batch, config = spread_params(DEEP), rows(DEEP), replace(DEEP, layers=4)
    silent = {n: named(teacher)[n].copy() for n in ("mix_LNHD", "down_LFD")}
    for value in silent.values():
        value[[2, 3]] = 0
    teacher = changed(teacher, **silent)
    right = forward(DEEP, teacher, *batch)
    student = inherit(DEEP, teacher, config, init(config, 0), Inherit(layers=least_redundant), [batch])
    np.testing.assert_allclose(forward(config, student, *batch), right, atol=1e-5)
    naive = inherit(DEEP, teacher, config, init(config, 0), Inherit(layers=evenly))
    assert np.abs(np.asarray(forward(config, naive, *batch) - right)).max() > 0.1


def test_least_redundant_keeps_the_students_kinds_of_layers():
    teacher = replace(DEEP, window=3, window_pattern=(True, False))
    influence = np.array([0.1, 0.9, 0.8, 0.2, 0.7, 0.6])
    choose = lambda pattern, n: least_redundant(  # noqa: E731
        teacher, replace(teacher, layers=n, window_pattern=pattern), influence
    )
    assert choose((True, False), 4) == (0, 1, 2, 5)
    assert choose((False, True), 2) == (1, 2)
    assert choose((True,), 3) == (0, 2, 4)
    with pytest.raises(UserError, match="no 4 of the teacher's layers"):
        choose((True,), 4)
    plain = least_redundant(DEEP, replace(DEEP, layers=3), influence)
    assert plain == (1, 2, 4)


NARROW = replace(LLAMA, model_size=8, heads=2, kv_heads=1, head_size=4, ff_size=6, layers=1)


def test_first_units_by_hand():
    config = replace(LLAMA, qkv_bias=True, mix_bias=True, ff_bias=True, post_norm=True, tied=False, qk_norm=True)
    student = replace(config, model_size=8, heads=2, kv_heads=1, head_size=4, ff_size=6, layers=1)
    teacher = spread_params(config)
    found = named(inherit(config, teacher, student, init(student, 0), Inherit(layers=(1,), width=first_units)))
    t = named(teacher)
    right = {
        "query_LDNH": t["query_LDNH"][1:, :8, :2],
        "key_LDKH": t["key_LDKH"][1:, :8, :1],
        "value_LDKH": t["value_LDKH"][1:, :8, :1],
        "mix_LNHD": t["mix_LNHD"][1:, :2, :, :8],
        "query_bias_LNH": t["query_bias_LNH"][1:, :2],
        "key_bias_LKH": t["key_bias_LKH"][1:, :1],
        "value_bias_LKH": t["value_bias_LKH"][1:, :1],
        "query_norm_scale_LH": t["query_norm_scale_LH"][1:],
        "key_norm_scale_LH": t["key_norm_scale_LH"][1:],
        "up_LDF": t["up_LDF"][1:, :8, :6],
        "gate_LDF": t["gate_LDF"][1:, :8, :6],
        "down_LFD": t["down_LFD"][1:, :6, :8],
        "up_bias_LF": t["up_bias_LF"][1:, :6],
        "gate_bias_LF": t["gate_bias_LF"][1:, :6],
        "embedding_VD": t["embedding_VD"][:, :8],
        "head_VD": t["head_VD"][:, :8],
        "final_norm_scale_D": t["final_norm_scale_D"][:8],
    }
    norms = [f"{part}_{kind}_scale" for part in ("attention", "ff") for kind in ("norm", "post_norm")]
    right |= {f"{name}_LD": t[f"{name}_LD"][1:, :8] for name in ("mix_bias", "down_bias", *norms)}
    assert set(right) == set(found)
    for name, value in found.items():
        np.testing.assert_array_equal(value, right[name], err_msg=name)


def test_heads_are_taken_by_the_groups_that_share_their_keys():
    """Of the groups {0, 1, 2} and {3, 4, 5} the one with the best two heads, and those; not the best head of all."""
    teacher = replace(LLAMA, layers=1, heads=6, kv_heads=2, head_size=4)
    student = replace(teacher, heads=2, kv_heads=1)
    scores = first_units(teacher, None)._replace(heads_LN=np.array([[9.0, 1, 1, 3, 6, 5]]))
    kept = kept_units(teacher, student, scores, (0,))
    np.testing.assert_array_equal(kept["K"], [[1]])
    np.testing.assert_array_equal(kept["N"], [[4, 5]])
    both = kept_units(teacher, replace(teacher, heads=4), scores, (0,))
    np.testing.assert_array_equal(both["N"], [[0, 1, 4, 5]])
    np.testing.assert_array_equal(
        kept_units(teacher, replace(teacher, heads=4), first_units(teacher, None), (0,))["N"], [[0, 1, 3, 4]]
    )


LIVE = {"F": [2, 5, 7, 8, 11, 14, 17, 20, 21, 23], "K": [1], "N": [2, 3], "D": [0, 3, 4, 6, 9, 10, 13, 15]}


def dead_units(config):
    """A teacher in which all units but the live ones are silent: others in layer 1 than in layer 0."""
    t = {name: value.copy() for name, value in named(spread_params(config)).items()}
    live = {"F": [LIVE["F"], [f - 1 for f in LIVE["F"]]], "N": [[2, 3], [0, 1]]}
    for layer in range(2):
        ff, heads = (np.setdiff1d(np.arange(size), live[letter][layer]) for letter, size in (("F", 24), ("N", 4)))
        t["gate_LDF"][layer][:, ff] = 0
        t["value_LDKH"][layer][:, sorted({n // 2 for n in heads})] = 0
    dead = np.setdiff1d(np.arange(16), LIVE["D"])
    for name in ("embedding_VD", "mix_LNHD", "down_LFD"):
        t[name][..., dead] = 0
    return changed(spread_params(config), **t), live


def test_the_most_active_units_are_the_live_ones_and_keep_the_teachers_logits():
    """As they are, where units only add up; norms take the stream's mean over half as many features: by sqrt(2)."""
    config = replace(LLAMA, head_size=4, norm_epsilon=1e-12)
    (teacher, live), batch = dead_units(config), rows(config)
    right = np.asarray(forward(config, teacher, *batch))
    kept = kept_units(config, replace(NARROW, layers=2, ff_size=10), measure(config, teacher, [batch]), (0, 1))
    np.testing.assert_array_equal(kept["F"], live["F"])
    np.testing.assert_array_equal(kept["N"], live["N"])
    np.testing.assert_array_equal(kept["K"], [[1], [0]])
    np.testing.assert_array_equal(kept["D"], LIVE["D"])

    def student(how, **sizes):
        shape = replace(config, **sizes)
        params = inherit(config, teacher, shape, init(shape, 0), how, [batch])
        if "model_size" in sizes:
            scales = {n: v * np.float32(2**0.5) for n, v in named(params).items() if "norm_scale" in n}
            params = changed(params, **scales)
        return np.asarray(forward(shape, params, *batch))

    for sizes in ({"ff_size": 10}, {"heads": 2, "kv_heads": 1}, {"model_size": 8}):
        np.testing.assert_allclose(student(Inherit(width=most_active), **sizes), right, atol=2e-4)
        assert np.abs(student(Inherit(width=first_units), **sizes) - right).max() > 0.1


def test_experts_that_are_never_taken_go_first_and_each_keeps_its_own_units():
    config = replace(EXPERTS, specials=Specials(never=()))
    t = {name: value.copy() for name, value in named(spread_params(config)).items()}
    batch = rows(config)
    t["embedding_VD"][:, 0] = 50.0
    t["router_LDE"][:, 0] = 20.0 * np.array([-1, 1, -1, 1])
    t["attention_norm_scale_LD"][:, 0] = t["ff_norm_scale_LD"][:, 0] = 1.0
    dead = {1: np.arange(12), 3: np.arange(12, 24)}
    for expert, units in dead.items():
        t["gate_LEDF"][:, expert][..., units] = 0
    teacher = changed(spread_params(config), **t)
    shape = replace(config, experts=2, ff_size=12)
    kept = kept_units(config, shape, measure(config, teacher, [batch]), (0, 1, 2))
    np.testing.assert_array_equal(kept["E"], [[1, 3]] * 3)
    np.testing.assert_array_equal(kept["F"], [[np.arange(12, 24), np.arange(12)]] * 3)
    student = inherit(config, teacher, shape, init(shape, 0), Inherit(width=most_active), [batch])
    np.testing.assert_allclose(forward(shape, student, *batch), forward(config, teacher, *batch), atol=2e-4)
    naive = inherit(config, teacher, shape, init(shape, 0), Inherit(width=first_units))
    assert np.abs(np.asarray(forward(shape, naive, *batch) - forward(config, teacher, *batch))).max() > 0.1


def test_what_is_not_taken_keeps_its_initial_values():
    teacher, fresh = spread_params(LLAMA), init(LLAMA, 3)
    layers = inherit(LLAMA, teacher, LLAMA, fresh, Inherit(embeddings=False))
    outer = inherit(LLAMA, teacher, LLAMA, fresh, Inherit(layers=None))
    for name, value in named(fresh).items():
        mine, theirs = (layers, outer) if name in fresh["outer"] else (outer, layers)
        np.testing.assert_array_equal(named(mine)[name], value, err_msg=name)
        np.testing.assert_array_equal(named(theirs)[name], named(teacher)[name], err_msg=name)


def test_tables_head_types_and_padding_of_the_student():
    """Fewer positions, a head of its own from a tied table, other padding of the vocabulary, another stored type."""
    config = replace(LLAMA, positions=learned)
    shape = replace(config, max_length=12, tied=False, vocab_multiple=1, weights_dtype="bfloat16")
    teacher, batch = spread_params(config), rows(config)
    student = inherit(config, teacher, shape, init(shape, 0), Inherit())
    for found, right in zip(jax.tree.leaves(student), jax.tree.leaves(abstract(shape)), strict=True):
        assert (found.shape, found.dtype) == (right.shape, right.dtype)
    np.testing.assert_array_equal(student["outer"]["head_VD"][...], student["outer"]["embedding_VD"][...])
    for change in ({"vocab_multiple": 64}, {"vocab_multiple": 1, "max_length": 12, "tied": False}):
        shape = replace(config, **change)
        student = inherit(config, teacher, shape, init(shape, 0), Inherit())
        np.testing.assert_allclose(forward(shape, student, *batch), forward(config, teacher, *batch), atol=1e-5)


@pytest.mark.parametrize("config", [replace(LLAMA, layers=3, tied=False), EXPERTS], ids=["dense", "experts"])
def test_every_mesh_gives_the_same_student(config):
    teacher = replace(config, vocab_size=40, model_size=32, heads=8, kv_heads=4, head_size=4, layers=4)
    student = replace(teacher, model_size=16, heads=4, kv_heads=2, ff_size=16, layers=2)
    if config is EXPERTS:
        student = replace(student, experts=2)
    batch, how = rows(teacher, B=4), Inherit(layers=least_redundant, width=most_active)
    without = named(inherit(teacher, init(teacher, 0), student, init(student, 1), how, [batch]))
    with jax.set_mesh(make_mesh(2, 2, 2)):
        params = inherit(teacher, init(teacher, 0), student, init(student, 1), how, [batch])
        for found, target in zip(jax.tree.leaves(params), jax.tree.leaves(abstract(student)), strict=True):
            assert found.sharding == target.sharding
            assert found.dtype == target.dtype
    for name, value in named(params).items():
        np.testing.assert_allclose(value, without[name], rtol=1e-5, atol=1e-7, err_msg=name)


REFUSED = [
    ({"norm": layer_norm}, r"norm is rms_norm in the teacher and layer_norm in the student"),
    ({"gated": False}, r"gated is True in the teacher and False"),
    ({"activation": gelu}, r"activation is silu in the teacher and gelu"),
    ({"head_size": 8}, r"head_size is 4 in the teacher and 8 in the student"),
    ({"vocab_size": 38}, r"vocab_size is 37 in the teacher and 38"),
    ({"rope_theta": 5e5}, r"rope_theta is 10000.0 in the teacher and 500000.0"),
    ({"rope_scaling": LinearScaling(2.0)}, r"rope_scaling is None in the teacher and LinearScaling"),
    ({"post_norm": True}, r"post_norm is False in the teacher"),
    ({"qkv_bias": True}, r"qkv_bias is False in the teacher and True"),
    ({"attention_scale": 0.1}, r"score_scale is 0.5 in the teacher and 0.1"),
    ({"layers": 7}, r"layers is 6 in the teacher and 7 in the student: give the student at most as many"),
    ({"model_size": 32}, r"model_size is 16 in the teacher and 32 in the student: .* lower it"),
    ({"ff_size": 12}, r"ff_size is 24 in the teacher and 12 in the student, and width is None: choose most_active"),
    ({"experts": 2}, r"experts is None in the teacher and 2 in the student"),
    ({"window": 4}, r"bound by the teacher's window as \(False, .*window_pattern"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=[next(iter(change)) for change, _ in REFUSED])
def test_what_does_not_fit_is_refused_before_any_work(change, words):
    with pytest.raises(UserError, match=words):
        check(DEEP, replace(DEEP, **change), Inherit())


def test_a_narrower_student_has_an_embedding_scale_of_its_own():
    wide = replace(DEEP, embedding_scale=DEEP.model_size**0.5)
    with pytest.raises(UserError, match=r"root of the teacher's model_size 16: .* embedding_scale=8\*\*0\.5"):
        check(wide, replace(wide, model_size=8), Inherit(width=first_units))
    check(wide, replace(wide, model_size=8, embedding_scale=8**0.5), Inherit(width=first_units))


def test_bad_choices_are_refused_in_one_line():
    narrow, half = replace(DEEP, heads=2, kv_heads=1), replace(DEEP, layers=2)
    check(DEEP, narrow, Inherit(width=first_units))
    full = replace(DEEP, kv_heads=4)
    with pytest.raises(UserError, match=r"heads / kv_heads is 1 in the teacher and 2 .* kv_heads=4"):
        check(full, DEEP, Inherit(width=first_units))
    with pytest.raises(UserError, match=r"kv_heads is 2 in the teacher and 4 in the student"):
        check(DEEP, full, Inherit(width=first_units))
    with pytest.raises(UserError, match="must ascend from 0 to at most 5"):
        check(DEEP, half, Inherit(layers=(3, 6)))
    with pytest.raises(UserError, match="must ascend"):
        check(DEEP, half, Inherit(layers=(3, 1)))
    with pytest.raises(UserError, match="are 3, and the student has layers 2"):
        check(DEEP, half, Inherit(layers=(1, 2, 3)))
    with pytest.raises(UserError, match="nothing is inherited"):
        check(DEEP, half, Inherit(layers=None, embeddings=False))
    with pytest.raises(UserError, match=r"tied is False in the teacher.*tied=False"):
        check(replace(DEEP, tied=False), DEEP, Inherit())
    longer = replace(DEEP, positions=learned, max_length=17)
    with pytest.raises(UserError, match=r"max_length is 16 in the teacher and 17"):
        check(replace(DEEP, positions=learned), longer, Inherit())
    with pytest.raises(UserError, match="at least one token"):
        inherit(DEEP, spread_params(DEEP), half, init(half, 0), Inherit(layers=least_redundant))


def test_a_config_names_its_functions_and_says_what_it_needs():
    how = Inherit(layers=least_redundant, width=most_active, embeddings=False)
    assert restore(canonical(how)) == how
    assert restore(canonical(Inherit(layers=(0, 3)))) == Inherit(layers=(0, 3))
    assert how.needs_calibration
    assert Inherit(width=most_active).needs_calibration
    assert not Inherit(layers=first_and_last, width=first_units).needs_calibration


@partial(jax.jit, static_argnums=0)
def loss_of(config, params, tokens):
    batch = tokens[:, :-1], np.tile(np.arange(16), (len(tokens), 1)), np.ones((len(tokens), 16), np.int32)
    logprobs = jax.nn.log_softmax(apply(config, params, *batch))
    return -jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1).mean()


def chains(rows_, seed):
    """A sparse first-order chain over 40 tokens: what a small decoder learns in few steps."""
    rng, tokens = np.random.default_rng(seed), np.full((rows_, 17), 5)
    steps = np.random.default_rng(0).integers(4, 40, (40, 3))
    for t in range(1, 17):
        tokens[:, t] = steps[tokens[:, t - 1], rng.integers(0, 3, rows_)]
    return tokens


OPTIMIZER = optax.adam(5e-3)


@partial(jax.jit, static_argnums=0)
def step(config, params, state, tokens):
    updates, state = OPTIMIZER.update(jax.grad(partial(loss_of, config))(params, tokens), state)
    return optax.apply_updates(params, updates), state


def trained(config, params, steps):
    state = OPTIMIZER.init(params)
    for number in range(steps):
        params, state = step(config, params, state, chains(16, number + 1))
    return params


def test_an_inherited_start_beats_a_fresh_one_and_chosen_units_beat_the_first():
    teacher = replace(DEEP, vocab_size=40, layers=4, model_size=32, head_size=8, ff_size=64)
    shape = replace(teacher, layers=3, ff_size=24)
    params = trained(teacher, init(teacher, 0), 120)
    held, calibration = chains(64, 10**6), chains(32, 10**7)
    batch = calibration[:, :-1], np.tile(np.arange(16), (32, 1)), np.ones((32, 16), np.int32)
    starts = {
        how.width: inherit(teacher, params, shape, init(shape, 1), how, [batch])
        for how in (Inherit(least_redundant, most_active), Inherit(least_redundant, first_units))
    } | {"fresh": init(shape, 1)}
    at_once = {name: float(loss_of(shape, start, held)) for name, start in starts.items()}
    assert float(loss_of(teacher, params, held)) < at_once[most_active] < at_once[first_units] < at_once["fresh"]
    after = {name: float(loss_of(shape, trained(shape, starts[name], 20), held)) for name in (most_active, "fresh")}
    assert after[most_active] < after["fresh"] - 0.2
