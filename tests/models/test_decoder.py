"""The whole decoder, in every family: against numpy, causal, blind to packing, the same with remat and at any depth."""

import dataclasses

import decoder_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_variants import LLAMA, VARIANTS, rows, spread_params
from flax import nnx

from epigone.errors import UserError
from epigone.models.config import DecoderConfig
from epigone.models.decoder import abstract, apply, by_layer, flops_per_token, init, parameter_count, structure
from epigone.models.language_model import Specials
from epigone.models.layers import learned, save_nothing, save_products
from epigone.models.rope import LinearScaling, LongRopeScaling

LONG = dataclasses.replace(VARIANTS["phi3"].rope_scaling, original_max_length=8)
FOREIGN = Specials(pad=2, bos=3, eos=3, unk=None, stops=(5,), never=(2, 36))
FAMILIES = VARIANTS | {
    "phi3_long": dataclasses.replace(VARIANTS["phi3"], rope_scaling=LONG, specials=FOREIGN),
    "mixtral": dataclasses.replace(LLAMA, experts=4, gated=False, remat=save_nothing, specials=Specials(never=())),
}
every_variant = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
forward = jax.jit(apply, static_argnums=0)


def named_arrays(params):
    pure = nnx.to_pure_dict(params)
    return tuple({name: np.asarray(x, np.float64) for name, x in pure[group].items()} for group in ("outer", "layers"))


@every_variant
def test_equals_the_numpy_reference(config):
    params, batch = spread_params(config), rows(config)
    logits_BTV = np.asarray(forward(config, params, *batch))
    assert logits_BTV.dtype == np.float32
    assert logits_BTV.shape == (3, 12, config.vocab_size)
    outer, layers = named_arrays(params)
    never = list(config.specials.never)
    for b, row in enumerate(zip(*batch, strict=True)):
        expected = decoder_reference.logits(config, outer, layers, *row)
        assert np.abs(np.delete(logits_BTV[b] - expected, never, axis=1)).max() < 1e-4
        np.testing.assert_array_equal(logits_BTV[b][:, never], np.float32(-1e9))


@every_variant
def test_no_gradient_from_the_future_or_from_another_document(config):
    """d logits_t / d embedding_s is 0 for s > t and across segments, and elsewhere it is not."""
    params, (tokens, positions, segments) = spread_params(config), rows(config)
    model = nnx.merge(structure(config), params)

    def logit_sums(shift_BTD, probe_V):
        graph, state = nnx.split(model)
        shifted = nnx.merge(graph, state)
        embed = shifted.embed
        object.__setattr__(shifted, "embed", lambda *inputs: embed(*inputs) + shift_BTD)
        return shifted.logits(shifted(tokens, positions, segments)) @ probe_V

    never = [0, *config.specials.never]
    probe_V = (
        jnp.asarray(np.random.default_rng(1).standard_normal(config.vocab_size), jnp.float32)
        .at[jnp.array(never)]
        .set(0)
    )
    zero = jnp.zeros((*tokens.shape, config.model_size))
    jacobian = jax.jit(jax.jacrev(logit_sums))(zero, probe_V)  # [B, T, B, S, D]
    size = np.abs(np.asarray(jacobian)).max(-1)
    for b in range(3):
        for t in range(12):
            for s in range(12):
                near = not all(config.windowed_layers) or t - s < config.window * config.layers - 1
                if s > t or segments[b, s] != segments[b, t]:
                    assert size[b, t, b, s] == 0
                elif near:
                    assert size[b, t, b, s] > 0
    assert size.transpose(0, 2, 1, 3)[~np.eye(3, dtype=bool)].max() == 0


@every_variant
def test_packed_documents_equal_separate_ones(config):
    params, (tokens, positions, segments) = spread_params(config), rows(config)
    packed = np.asarray(forward(config, params, tokens, positions, segments))
    alone = [np.full((3, 12), fill, np.int32) for fill in (5, 0, 0)]
    for b in (0, 1, 2):
        first = int((segments[b] == 1).sum())
        alone[0][b, :first], alone[1][b, :first], alone[2][b, :first] = (
            tokens[b, :first], positions[b, :first], segments[b, :first]
        )  # fmt: skip
    first_alone = np.asarray(forward(config, params, *alone))
    for b, first in enumerate((12, 5, 7)):
        np.testing.assert_allclose(packed[b, :first], first_alone[b, :first], atol=1e-5)
    second = [np.zeros((3, 12), np.int32) for _ in range(3)]
    for b, (start, end) in ((1, (5, 12)), (2, (7, 10))):
        for part, whole in zip(second, (tokens, positions, segments), strict=True):
            part[b, : end - start] = whole[b, start:end]
    second_alone = np.asarray(forward(config, params, *second))
    np.testing.assert_allclose(packed[1, 5:], second_alone[1, :7], atol=1e-5)
    np.testing.assert_allclose(packed[2, 7:10], second_alone[2, :3], atol=1e-5)


def test_padded_rows_pad_and_bos_have_no_probability_and_no_nan():
    params, batch = spread_params(LLAMA), rows(LLAMA)
    assert LLAMA.sizes.V == 40
    probabilities = np.asarray(jax.nn.softmax(forward(LLAMA, params, *batch)))
    assert probabilities.shape[-1] == 37
    assert (probabilities[..., :2] == 0).all()
    assert (probabilities[..., 2:] > 0).all()
    loss = lambda p: -jax.nn.log_softmax(apply(LLAMA, p, *batch))[..., 3].mean()  # noqa: E731
    gradients = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert (np.asarray(gradients["outer"]["embedding_VD"][...])[37:] == 0).all()


def test_grouped_queries_equal_repeated_key_heads():
    params, batch = spread_params(LLAMA), rows(LLAMA)
    full = dataclasses.replace(LLAMA, kv_heads=4)
    repeated = init(full, 0)
    for name, value in params["layers"].items():
        copies = np.repeat(value[...], 2, axis=2) if name in ("key_LDKH", "value_LDKH") else value[...]
        repeated["layers"][name][...] = jnp.asarray(copies)
    for name, value in params["outer"].items():
        repeated["outer"][name][...] = value[...]
    np.testing.assert_allclose(forward(LLAMA, params, *batch), forward(full, repeated, *batch), atol=2e-5)


@pytest.mark.parametrize("policy", [save_nothing, save_products])
def test_remat_keeps_gradients_and_saves_memory(policy):
    kept = dataclasses.replace(LLAMA, layers=6, ff_size=256)
    remat = dataclasses.replace(kept, remat=policy)
    batch = [np.repeat(x, 8, axis=0) for x in rows(kept)]

    def compiled(config):
        loss = lambda p: jax.nn.log_softmax(apply(config, p, *batch))[..., 3].mean()  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(init(config, 0)).compile()

    with_all, with_less = compiled(kept), compiled(remat)
    params = init(kept, 0)
    for a, b in zip(jax.tree.leaves(with_all(params)), jax.tree.leaves(with_less(params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    full, less = (c.memory_analysis().temp_size_in_bytes for c in (with_all, with_less))
    assert less < 0.8 * full


def test_program_does_not_grow_with_depth():
    def lines(layers):
        config = dataclasses.replace(LLAMA, layers=layers)
        return forward.lower(config, abstract(config), *rows(config)).as_text().count("\n")

    assert lines(24) == lines(3)


def test_parameter_count_and_abstract_tree_are_those_of_the_real_one():
    for config in VARIANTS.values():
        params = init(config, 0)
        assert parameter_count(config) == sum(x.size for x in jax.tree.leaves(params))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
            lambda x: (x.shape, x.dtype), abstract(config)
        )


def test_flops_are_those_of_the_compiled_products():
    """XLA counts 2 m n k too; a scan body is counted once, so one layer is compared. Full scores: no causal half."""
    T = 64
    config = dataclasses.replace(LLAMA, layers=1, model_size=64, ff_size=512, max_length=T, vocab_size=512)
    batch = tuple(np.zeros((1, T), np.int32) for _ in range(3))
    counted = forward.lower(config, abstract(config), *batch).compile().cost_analysis()["flops"]
    full_scores = 4 * config.sizes.N * config.sizes.H * (T - (T + 1) / 2)
    assert counted / T == pytest.approx(flops_per_token(config, T, training=False) + full_scores, rel=0.05)


def test_flops_by_hand():
    config = dataclasses.replace(LLAMA, vocab_size=40)
    layer = 2 * (16 * 4 * 4 + 2 * 16 * 2 * 4 + 4 * 4 * 16 + 3 * 16 * 24) + 4 * 4 * 4 * (1 + 2 + 3 + 4 + 5) // 5
    assert flops_per_token(config, 5, training=False) == 2 * layer + 2 * 40 * 16
    assert flops_per_token(config, 5, training=True) == 3 * flops_per_token(config, 5, training=False)
    windowed = dataclasses.replace(config, window=2)
    saved = 2 * 4 * 4 * 4 * (0 + 0 + 1 + 2 + 3) / 5
    assert flops_per_token(windowed, 5, training=False) == round(flops_per_token(config, 5, training=False) - saved)


def test_flops_of_experts_are_those_of_the_active_ones():
    """Two of four experts cost what two feed-forwards cost, and the router; all four are stored."""
    moe = dataclasses.replace(LLAMA, experts=4, experts_per_token=2)
    router, one = 16 * 4, 3 * 16 * 24
    extra = 2 * LLAMA.layers * (one + router)
    assert flops_per_token(moe, 5, training=False) == flops_per_token(LLAMA, 5, training=False) + extra
    assert parameter_count(moe) == parameter_count(LLAMA) + LLAMA.layers * (3 * one + router)


def test_flops_count_the_window_in_its_own_layers():
    pattern = dataclasses.replace(LLAMA, layers=3, window=2, window_pattern=(True, False))
    everywhere, nowhere = (dataclasses.replace(pattern, window_pattern=(on,)) for on in (True, False))
    assert pattern.windowed_layers == (True, False, True)
    both = 2 * flops_per_token(everywhere, 6, training=False) + flops_per_token(nowhere, 6, training=False)
    assert flops_per_token(pattern, 6, training=False) == pytest.approx(both / 3, abs=1)
    assert nowhere.windowed_layers == dataclasses.replace(pattern, window=None).windowed_layers == (False,) * 3


def test_layers_of_one_kind_leave_nothing_to_choose():
    unbound, bound = (jnp.zeros(2), None), (jnp.ones(2), None)
    windowed = dataclasses.replace(LLAMA, window=3)
    for config, expected in ((LLAMA, unbound), (windowed, bound)):
        kinds, choose = by_layer(config, unbound, bound)
        assert kinds is None
        assert choose(kinds) is expected
    kinds, choose = by_layer(dataclasses.replace(windowed, window_pattern=(False, True)), unbound, bound)
    np.testing.assert_array_equal([choose(kind)[0] for kind in kinds], [[0, 0], [1, 1]])
    model = nnx.merge(structure(LLAMA), init(LLAMA, 0))
    whole, local = model.angles(jnp.zeros((1, 2), jnp.int32))
    assert whole is local


def test_a_window_as_long_as_the_row_changes_nothing():
    config = dataclasses.replace(LLAMA, window=12, window_pattern=(True, False))
    params, batch = spread_params(config), rows(config)
    np.testing.assert_allclose(forward(config, params, *batch), forward(LLAMA, params, *batch), atol=1e-6)


def test_stored_types_and_computed_types_are_two_things():
    for name in ("gemma3", "qwen3_moe", "gpt2"):
        stored = dataclasses.replace(VARIANTS[name], weights_dtype="bfloat16")
        params, batch = spread_params(stored), rows(stored)
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves((init(stored, 0), abstract(stored))))
        widened = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        exact = forward(VARIANTS[name], widened, *batch)
        np.testing.assert_allclose(forward(stored, params, *batch), exact, atol=1e-5)
        low = dataclasses.replace(stored, dtype="bfloat16")
        hidden = nnx.merge(structure(low), init(low, 0))(*batch)
        assert hidden.dtype == jnp.bfloat16
        assert np.isfinite(np.asarray(hidden, np.float32)).all()


def test_what_is_never_predicted_is_the_configs_choice():
    batch, open_config = rows(LLAMA), dataclasses.replace(LLAMA, specials=Specials(never=()))
    params = spread_params(LLAMA)
    free, closed = forward(open_config, params, *batch), forward(LLAMA, params, *batch)
    assert float(free.min()) > -1e6
    np.testing.assert_array_equal(free[..., 2:], closed[..., 2:])


def test_initial_loss_is_that_of_a_uniform_guess():
    config = dataclasses.replace(LLAMA, vocab_size=500, model_size=64, layers=6, ff_size=None)
    logits = forward(config, init(config, 0), *rows(config))
    loss = -jax.nn.log_softmax(logits)[..., 7].mean()
    assert float(loss) == pytest.approx(np.log(498), abs=0.1)
    hidden = nnx.merge(structure(config), init(config, 0))(*rows(config))
    assert float(jnp.sqrt(jnp.mean(hidden**2))) == pytest.approx(1.0, abs=0.01)


def test_seeds_differ_and_repeat():
    same, again, other = init(LLAMA, 0), init(LLAMA, 0), init(LLAMA, 1)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(same["outer"]["embedding_VD"][...], other["outer"]["embedding_VD"][...])


def test_low_precision_computes_in_it_and_gives_float32_logits():
    config = dataclasses.replace(LLAMA, dtype="bfloat16")
    params, batch = init(config, 0), rows(config)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    logits, exact = forward(config, params, *batch), forward(LLAMA, params, *batch)
    assert logits.dtype == jnp.float32
    assert nnx.merge(structure(config), params)(*batch).dtype == jnp.bfloat16
    difference = np.abs(np.asarray(logits - exact))[..., 2:].max()
    assert 0 < difference < 0.02


def test_bad_configs_are_refused_with_their_values():
    for change, word in [
        ({"kv_heads": 3}, "kv_heads 3"),
        ({"heads": 5, "kv_heads": None}, "heads 5"),
        ({"head_size": 5}, "even"),
        ({"dtype": "float8"}, "float8"),
        ({"layers": 0}, "layers is 0"),
        ({"window": 0}, "window is 0"),
        ({"window": 3, "window_pattern": ()}, "window_pattern is empty"),
        ({"weights_dtype": "int8"}, "weights_dtype 'int8'"),
        ({"rope_fraction": 1.5}, "rope_fraction 1.5 of 4 features rotates 6"),
        ({"rope_fraction": 0.25}, "rotates 1"),
        ({"rope_local_theta": 10.0}, "rope_local_theta 10.0 without a window"),
        ({"positions": learned, "rope_scaling": LinearScaling(2.0)}, "with learned positions"),
        (
            {"rope_scaling": LongRopeScaling((1.0,), (1.0,), 8, 2.0)},
            "1 longrope factors for 4 rotated features: give 2",
        ),
        ({"qk_norm": True, "qk_norm_whole": True}, "both on"),
        ({"experts": 0}, "experts is 0"),
        ({"experts": 2, "experts_per_token": 3}, "experts_per_token 3 is more than experts 2"),
        ({"experts": 2, "ff_bias": True}, "ff_bias with experts 2"),
        ({"specials": Specials(eos=37)}, "special token 37 lies outside a vocabulary of vocab_size 37"),
    ]:
        with pytest.raises(UserError, match=word):
            dataclasses.replace(LLAMA, **change)
    with pytest.raises(UserError, match="vocab_size is open"):
        init(DecoderConfig(), 0)
    short = dataclasses.replace(LLAMA, positions=learned, max_length=8)
    with pytest.raises(UserError, match="max_length 8"):
        forward(short, init(short, 0), *rows(short))


def test_initial_weights_have_the_standard_spreads():
    """1 / sqrt(inputs), smaller by sqrt(2 layers) for the two that write to the stream; 0.02 for the table."""
    config = DecoderConfig(vocab_size=1000, layers=8, model_size=64, heads=4)
    params = init(config, 0)
    D, F, depth = 64, config.sizes.F, (2 * 8) ** -0.5
    wanted = {"query_LDNH": D**-0.5, "up_LDF": D**-0.5, "mix_LNHD": D**-0.5 * depth, "down_LFD": F**-0.5 * depth}
    for name, spread in wanted.items():
        assert float(jnp.std(params["layers"][name][...])) == pytest.approx(spread, rel=0.03)
    assert float(jnp.std(params["outer"]["embedding_VD"][...])) == pytest.approx(0.02, rel=0.03)
    assert float(jnp.ptp(params["layers"]["ff_norm_scale_LD"][...])) == 0.0
