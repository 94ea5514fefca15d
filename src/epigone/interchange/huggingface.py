"""Hugging Face models over the one decoder, read and written.

    config = read_config(json.loads(text))     # a config.json as a decoder
    values = write_config(config)              # and back: the first family that represents it
    plan = tensor_plan(config, family)         # the tensors of its files, and where each lies in our parameters

The families are rows of a table (interchange/families.py). Every key of a config.json is read, known to change
nothing, or refused by name; so is every value that the decoder cannot represent.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from epigone.errors import UserError
from epigone.interchange.families import FAMILIES, Family
from epigone.interchange.tensors import Tensor, tensors_of
from epigone.models.config import DecoderConfig, layer_weights, outer_weights
from epigone.models.language_model import Specials
from epigone.models.layers import learned

Values = Mapping[str, Any]

_HARMLESS = """
_name_or_path name_or_path _commit_hash _attn_implementation _attn_implementation_autoset architectures auto_map
model_type transformers_version transformers.js_config use_cache cache_implementation torchscript use_bfloat16
attention_dropout attn_pdrop resid_pdrop embd_pdrop hidden_dropout initializer_range gradient_checkpointing
output_router_logits router_aux_loss_coef router_jitter_noise pretraining_tp is_llama_config is_decoder
output_attentions output_hidden_states return_dict chunk_size_feed_forward reorder_and_upcast_attn n_ctx
summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
id2label label2id num_labels _num_labels problem_type n_special predict_special_tokens output_past
task_specific_params finetuning_task tokenizer_class prefix
sep_token_id decoder_start_token_id unsloth_version unsloth_fixed
do_sample temperature top_k top_p typical_p repetition_penalty max_length min_length num_beams num_beam_groups
num_return_sequences length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size early_stopping
diversity_penalty bad_words_ids begin_suppress_tokens suppress_tokens forced_bos_token_id forced_eos_token_id
exponential_decay_length_penalty remove_invalid_values return_dict_in_generate output_scores
"""
HARMLESS = frozenset(_HARMLESS.split())
"""Keys that say nothing about what a model computes: dropout, training, generation, bookkeeping."""

NEUTRAL: Values = {
    "add_cross_attention": False,
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "is_encoder_decoder": False,
    "lm_head_bias": False,
    "mlp_bias": False,
    "mlp_only_layers": [],
    "pruned_heads": {},
    "rope_interleaved": False,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_encoder_decoder": False,
    "use_bidirectional_attention": False,
    "use_mrope": False,
}
"""Keys that change the model unless they have this value."""

_ODD = (TypeError, ValueError, ArithmeticError, AttributeError, LookupError)
"""What comes of a value of a kind that nobody writes."""

FREE = ("dtype", "remat", "vocab_multiple", "specials", "weights_dtype")
"""Fields that do not decide which family represents a config."""


def read_config(values: Values) -> DecoderConfig:
    """The decoder that a config.json describes.

    `specials` holds the ids of the file, which a tokenizer may correct; `weights_dtype` is the file's dtype.

    Raises:
        UserError: an unknown architecture; or fields that no decoder of Epigone has, each with its value.
    """
    family = find_family(values)
    here = {inside: name for inside, name in family.names.items() if name in values}
    given = {key: value for key, value in values.items() if key not in here.values()}
    given |= {inside: values[name] for inside, name in here.items()}
    problems = _unknown(family, given)
    found: dict[str, Any] = dict(family.fixed)
    for part in family.parts:
        try:
            found |= part.read({**dict.fromkeys(part.keys), **family.defaults, **given})
        except UserError as error:
            problems.append(str(error))
        except _ODD as error:
            odd = ", ".join(f"{key}={given[key]!r:.80}" for key in part.keys if key in given)
            problems.append(f"{odd or ', '.join(part.keys)} is of another kind than it should be ({error})")
    if not problems:
        try:
            return canonical(DecoderConfig(**found, vocab_multiple=1))
        except _ODD as error:
            rotations = {key: given[key] for key in given if key.startswith("rope")}
            problems.append(f"no model has such numbers, {rotations!r:.200} ({error})")
    raise UserError(f"'{family.model_type}' model that cannot be represented: {'; '.join(problems)}")


def find_family(values: Values) -> Family:
    """The row of the table that a config.json belongs to. Raises UserError when there is none."""
    known = {family.model_type: family for family in FAMILIES}
    name = values.get("model_type")
    classes = values.get("architectures")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(one, str) for one in classes)):
        raise UserError(f"architectures is {classes!r:.80}: a list of names is wanted")
    if not isinstance(name, str) or name not in known:
        longer = [other for other in known if other.startswith(f"{name}_")]
        close = longer or difflib.get_close_matches(str(name), known, n=1)
        hint = f", did you mean '{close[0]}'?" if close else ""
        raise UserError(f"unknown architecture {name!r}{hint}: known are {', '.join(known)}")
    family = known[name]
    classes = classes or [family.architecture]
    bare = family.architecture.replace("ForCausalLM", "Model").replace("LMHeadModel", "Model")
    if not set(classes) & {family.architecture, bare}:
        raise UserError(f"architectures {classes}: only {family.architecture} is a language model of this family")
    return family


def _unknown(family: Family, given: Values) -> list[str]:
    read = {key for part in family.parts for key in part.keys} | set(family.ignored)
    rest = {key: value for key, value in given.items() if key not in read and value is not None}
    return [
        f"{key}={value!r:.80}"
        for key, value in rest.items()
        if key not in HARMLESS and not (key in NEUTRAL and value == NEUTRAL[key])
    ]


def canonical(config: DecoderConfig) -> DecoderConfig:
    """The same decoder with nothing left open, so that equal ones compare equal. `vocab_size` must be filled."""
    s = config.sizes
    bound, scale, local = config.windowed_layers, config.attention_scale, config.rope_local_theta
    if not any(bound) or (local == config.rope_theta and config.rope_scaling is None):
        local = None
    unread: dict[str, Any] = {} if config.experts else {"experts_per_token": 2, "normalise_experts": True}
    if config.positions is learned:
        unread |= {"rope_theta": 1e4, "rope_fraction": 1.0}
    return replace(
        config,
        kv_heads=s.K,
        head_size=s.H,
        ff_size=s.F,
        attention_scale=None if scale is not None and abs(scale * s.H**0.5 - 1) < 1e-12 else scale,
        window=config.window if any(bound) else None,
        window_pattern=_shortest(bound) if any(bound) else (True,),
        rope_local_theta=local,
        **unread,
    )


def _shortest(pattern: tuple[bool, ...]) -> tuple[bool, ...]:
    """The shortest beginning that repeats to the pattern."""
    length = len(pattern)
    return next(p for p in (pattern[:n] for n in range(1, length + 1)) if (p * length)[:length] == pattern)


def write_config(config: DecoderConfig, family: Family | None = None) -> dict[str, Any]:
    """The config.json of the first family (or of the one that is asked for) that represents a decoder.

    Raises:
        UserError: no family does; it names the fields in which the closest one differs.
    """
    config = canonical(config)
    lacking: dict[str, list[str]] = {}
    for row in (family,) if family else FAMILIES:
        refused = row.refused(config)
        values = _written(row, config)
        differing = [refused] if refused else _differing(config, values)
        if not differing:
            return values
        lacking[row.model_type] = differing
    closest = min(lacking, key=lambda name: len(lacking[name]))
    without = ", ".join(lacking[closest])
    raise UserError(f"no Hugging Face family has such a decoder: '{closest}' is closest, without {without}")


def _written(family: Family, config: DecoderConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for part in family.parts:
        values |= part.write(config)
    return {family.names.get(key, key): value for key, value in values.items()}


def _differing(config: DecoderConfig, values: Values) -> list[str]:
    """The fields in which a decoder is not what a config.json says of it."""
    plain: dict[str, Any] = {f.name: f.default for f in fields(config) if f.name in FREE}
    plain["specials"] = Specials(0, 0, 0, never=())
    try:
        again = read_config(values)
    except UserError:
        return [f.name for f in fields(config)]
    one, other = replace(config, **plain), replace(again, **plain)
    names = [f.name for f in fields(config) if getattr(one, f.name) != getattr(other, f.name)]
    return [f"{name}={_shown(getattr(config, name))}" for name in names]


def _shown(value: Any) -> str:
    return getattr(value, "__name__", None) or str(value)


def tensor_plan(config: DecoderConfig, family: Family, bare: bool = False) -> tuple[Tensor, ...]:
    """The tensors of a model's files in their order, without padded rows; `bare` leaves the prefix of names away.

    Raises UserError when the family has no place for one of the parameters.
    """
    prefix = "" if bare else family.prefix
    plan = tensors_of(config, family.outer, prefix, None)
    for layer in range(config.layers):
        plan += tensors_of(config, family.inner, f"{prefix}{family.layers}{layer}.", layer)
    _check_whole(config, family, plan)
    return tuple(plan)


def _check_whole(config: DecoderConfig, family: Family, plan: Sequence[Tensor]) -> None:
    placed = {slot.name for tensor in plan for slot in tensor.slots}
    lost = sorted((outer_weights(config) | layer_weights(config)).keys() - placed)
    if lost:
        raise UserError(f"'{family.model_type}' files have no place for {', '.join(lost)}")
