"""Rotary positions in config.json: `rope_theta` and `rope_scaling` as files have them, `rope_parameters` since 5.0.

Read as transformers reads them: what stands in the dictionary wins over keys beside it, `rope_scaling` over
`rope_parameters`. The older keys are written, which every version reads.
"""

from collections.abc import Mapping
from typing import Any

from epigone.errors import UserError
from epigone.interchange.values import number, numbers, optional, positive, switch, whole
from epigone.models.config import DecoderConfig
from epigone.models.layers import rotary
from epigone.models.rope import LinearScaling, Llama3Scaling, LongRopeScaling, RopeScaling, YarnScaling

Values = Mapping[str, Any]
_COMMON = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
_LENGTH = "original_max_position_embeddings"
_OWN = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", _LENGTH},
    "yarn": {"factor", _LENGTH, "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"},
    "longrope": {"factor", _LENGTH, "short_factor", "long_factor", "attention_factor"},
}
"""Keys of each type of scaling that is known."""


def read_rope(values: Values) -> dict[str, Any]:
    """Base, share and scaling from a file that has one kind of rotary layers."""
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    return _read_global(values, given, default_type="default")


def read_phi3_rope(values: Values) -> dict[str, Any]:
    """The same; older files of Phi-3 call its longrope "su" or "yarn"."""
    given = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    if _kind(given) in ("su", "yarn"):
        given["rope_type"] = given["type"] = "longrope"
    return _read_global(values, given, default_type="default")


def read_two_ropes(values: Values) -> dict[str, Any]:
    """Base and scaling of the layers that see all, base of those in the window (Gemma 3)."""
    nested = values.get("rope_parameters") or {}
    if set(nested) - {"full_attention", "sliding_attention"}:
        raise UserError(f"rope_parameters {nested}: here it has full_attention and sliding_attention")
    outer = dict(nested.get("full_attention") or {}) | dict(values.get("rope_scaling") or {})
    local = dict(nested.get("sliding_attention") or {})
    if _kind(local) != "default":
        raise UserError(f"rope_parameters of sliding_attention has rope_type '{_kind(local)}': only default is known")
    _check_keys(local, "default")
    fields = _read_global(values, outer, default_type="default")
    theta = local.get("rope_theta", values.get("rope_local_base_freq"))
    return fields | {"rope_local_theta": number("rope_local_base_freq", theta)}


def _read_global(values: Values, given: Values, default_type: str) -> dict[str, Any]:
    kind = _kind(given) if given else default_type
    if kind not in _OWN:
        raise UserError(f"rope_type '{kind}' is not one of {', '.join(_OWN)}")
    _check_keys(given, kind)
    theta = given.get("rope_theta") or values.get("rope_theta")
    share = given.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
    return {
        "rope_theta": positive("rope_theta", theta),
        "rope_fraction": number("partial_rotary_factor", share),
        "rope_scaling": _scaling(kind, given, values),
    }


def _kind(given: Values) -> str:
    if not isinstance(given, Mapping):
        raise UserError(f"rope parameters are {given!r}: an object is wanted")
    return str(given.get("rope_type") or given.get("type") or "default")


def _check_keys(given: Values, kind: str) -> None:
    unknown = {key: given[key] for key in sorted(set(given) - _COMMON - _OWN[kind]) if given[key] is not None}
    if unknown:
        raise UserError(f"rope parameters of type '{kind}' have unknown {_listed(unknown)}")


def _listed(pairs: Values) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in pairs.items())


def _scaling(kind: str, given: Values, values: Values) -> RopeScaling | None:
    if kind == "default":
        return None
    needed = {"longrope": ("short_factor", "long_factor"), "yarn": ()}.get(kind, _OWN[kind] - {_LENGTH})
    missing = sorted(key for key in needed if given.get(key) is None)
    if missing:
        raise UserError(f"rope_type '{kind}' lacks {', '.join(missing)}")
    if kind == "linear":
        return LinearScaling(positive("factor", given["factor"]))
    longest = values["max_position_embeddings"]
    length = whole(_LENGTH, values.get(_LENGTH) or given.get(_LENGTH) or longest)
    factor = positive("factor", given.get("factor") or longest / length)
    if kind == "llama3":
        low, high = (number(key, given[key]) for key in ("low_freq_factor", "high_freq_factor"))
        return Llama3Scaling(factor, low, high, length)
    attention = optional(number)("attention_factor", given.get("attention_factor"))
    if kind == "longrope":
        short, long = (numbers(key, given[key]) for key in ("short_factor", "long_factor"))
        return LongRopeScaling(short, long, length, factor, attention)
    return YarnScaling(
        factor,
        length,
        beta_fast=number("beta_fast", given.get("beta_fast") or 32),
        beta_slow=number("beta_slow", given.get("beta_slow") or 1),
        attention_factor=attention,
        mscale=optional(number)("mscale", given.get("mscale")),
        mscale_all_dim=optional(number)("mscale_all_dim", given.get("mscale_all_dim")),
        truncate=switch("truncate", given.get("truncate", True)),
    )


def write_rope(config: DecoderConfig) -> dict[str, Any]:
    """rope_theta and rope_scaling."""
    if config.positions is not rotary:
        return {}
    return {"rope_theta": config.rope_theta, "rope_scaling": _written(config.rope_scaling)}


def write_phi3_rope(config: DecoderConfig) -> dict[str, Any]:
    """The same with the share that is rotated; the original length stands outside, as every version of Phi-3 has it."""
    written = write_rope(config)
    if config.rope_fraction != 1.0:
        written["partial_rotary_factor"] = config.rope_fraction
    scaling = config.rope_scaling
    if not isinstance(scaling, LongRopeScaling):
        return written
    inner = dict(written["rope_scaling"])
    inner["type"] = inner.pop("rope_type")
    if scaling.factor == config.max_length / scaling.original_max_length:
        del inner["factor"]
    return written | {_LENGTH: inner.pop(_LENGTH), "rope_scaling": inner}


def write_two_ropes(config: DecoderConfig) -> dict[str, Any]:
    """The same, and rope_local_base_freq for the layers in the window."""
    local = config.rope_local_theta
    return write_rope(config) | {"rope_local_base_freq": config.rope_theta if local is None else local}


def _written(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    written: dict[str, Any] = {"factor": scaling.factor, _LENGTH: scaling.original_max_length}
    if isinstance(scaling, Llama3Scaling):
        ends = {"low_freq_factor": scaling.low_frequency_factor, "high_freq_factor": scaling.high_frequency_factor}
        return {"rope_type": "llama3", **written, **ends}
    if isinstance(scaling, LongRopeScaling):
        factors = {"short_factor": list(scaling.short_factors), "long_factor": list(scaling.long_factors)}
        return {"rope_type": "longrope", **written, **factors, **_given(attention_factor=scaling.attention_factor)}
    mscales = _given(
        attention_factor=scaling.attention_factor, mscale=scaling.mscale, mscale_all_dim=scaling.mscale_all_dim
    )
    cut = {} if scaling.truncate else {"truncate": False}
    betas = {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    return {"rope_type": "yarn", **written, **betas, **mscales, **cut}


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
