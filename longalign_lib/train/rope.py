"""Rotary positions: how a model trained on 8k tokens is made to read more.

Rotary position embedding turns pair i of a head's D dimensions by the angle t * w_i at position t,

    w_i = theta ** (-2 i / D),   i = 0 .. D/2 - 1,   wavelength_i = 2 pi / w_i tokens for one full turn.

A model trained on L tokens saw every angle of the fast pairs (wavelength < L) and only the start of the turn of the
slow ones. Position t > L shows the slow pairs angles they never saw. Three cures:

    none    w_i                               the window stays L
    linear  w_i / s                           position interpolation: every pair s times slower
    base    (theta * b) ** (-2 i / D)         slow pairs slowed by nearly b, fast ones hardly; LongAlign: b = 200
    yarn    w_i * (1 - r_i) + (w_i / s) * r_i    r_i ramps from 0 (many turns in L) to 1 (less than one turn);
            and cos, sin times 0.1 ln(s) + 1     which sharpens attention over more keys

s (`factor`) is the new window over the old one, b (`base_factor`) the multiplier of theta.

Invariants: the frequencies depend on the configuration alone, never on the batch, so a sequence reads the
same alone and in a pack; weights are not touched; what transformers builds is compared with the formulas here.
`dynamic` and `longrope` break the first and are refused.
Cost: `extend_context` rebuilds one small module (milliseconds) and shares the weights' storage.

Shape legend: T tokens, D rotated dimensions of a head, V vocabulary.
Sources: RoPE (arXiv 2104.09864), position interpolation (arXiv 2306.15595), YaRN (arXiv 2309.00071, with the ramp
over the index i as in its published code and in transformers), LongAlign (arXiv 2401.18058, section 4.1).
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
from transformers import PreTrainedConfig, PreTrainedModel

METHODS = ("none", "linear", "base", "yarn")
LONGALIGN_BASE_FACTOR = 200.0  # theta 10,000 -> 2,000,000
BATCH_DEPENDENT = ("dynamic", "longrope")


def inverse_frequencies(
    head_dim: int,
    theta: float,
    method: str = "none",
    factor: float = 1.0,
    *,
    window: int = 8192,
    base_factor: float = LONGALIGN_BASE_FACTOR,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> np.ndarray:
    """Angle per token of each pair of dimensions (formulas in the module's head).

    Args:
        head_dim: D, rotated dimensions of a head; even.
        theta: RoPE base of the model as shipped.
        method: one of METHODS.
        factor: s, new window over old window (linear, yarn).
        window: L, tokens the model was trained on (yarn's ramp).
        base_factor: b, multiplier of theta (base).
        beta_fast, beta_slow: yarn keeps pairs that turn more than beta_fast times in L and fully
            interpolates those that turn less than beta_slow times.

    Returns:
        float64 [D/2], radians per token, falling.

    Raises:
        ValueError: unknown method, odd head_dim, factor below 1.

    Example:
        >>> inverse_frequencies(4, 100.0).tolist()
        [1.0, 0.1]
        >>> inverse_frequencies(4, 100.0, "linear", 2).tolist()
        [0.5, 0.05]
    """
    _check_method(method)
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim={head_dim}: RoPE turns pairs of dimensions, give an even number of at least 2")
    if factor < 1:
        raise ValueError(f"factor={factor}: the new window over the old one, at least 1")
    if base_factor <= 0 or theta <= 1:
        raise ValueError(f"base_factor={base_factor}, theta={theta}: base_factor must be > 0 and theta > 1")
    exponent = np.arange(0, head_dim, 2) / head_dim
    if method == "base":
        return (theta * base_factor) ** -exponent
    kept = theta**-exponent
    if method == "none":
        return kept
    if method == "linear":
        return kept / factor
    r = yarn_ramp(head_dim, theta, window, beta_fast, beta_slow)
    return kept * (1 - r) + kept / factor * r


def yarn_ramp(head_dim: int, theta: float, window: int, beta_fast: float = 32.0, beta_slow: float = 1.0) -> np.ndarray:
    """r_i of YaRN: 0 where a pair is kept, 1 where it is interpolated, a straight line over i between.

    Pair i turns L / wavelength_i times in the window. That count equals n at the real-valued index
    i(n) = D ln(L / (2 pi n)) / (2 ln theta); the ramp runs from floor(i(beta_fast)) to ceil(i(beta_slow)).

    Returns:
        float64 [D/2] in 0..1, rising.
    """
    if not 0 < beta_slow <= beta_fast:
        raise ValueError(f"beta_slow={beta_slow}, beta_fast={beta_fast}: need 0 < beta_slow <= beta_fast")

    def index_of(turns: float) -> float:
        return head_dim * math.log(window / (2 * math.pi * turns)) / (2 * math.log(theta))

    low = max(math.floor(index_of(beta_fast)), 0)
    high = min(math.ceil(index_of(beta_slow)), head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero, as transformers does
    return np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)


def attention_scale(method: str, factor: float = 1.0) -> float:
    """What cos and sin are multiplied by: 0.1 ln(s) + 1 for yarn (so attention logits get its square), else 1."""
    _check_method(method)
    return 0.1 * math.log(factor) + 1.0 if method == "yarn" and factor > 1 else 1.0


def wavelengths(inverse_freq: np.ndarray) -> np.ndarray:
    """Tokens of one full turn of each pair, 2 pi / w_i; [D/2] -> [D/2]."""
    return 2 * np.pi / np.asarray(inverse_freq, dtype=np.float64)


def ntk_base_factor(factor: float, head_dim: int) -> float:
    """The base multiplier that slows the slowest pair by exactly s: b = s ** (D / (D - 2)) ("NTK-aware" scaling).

    The pairs between the slowest and the fast ones are slowed less, so some still meet unseen angles.
    """
    if head_dim <= 2:
        raise ValueError(f"head_dim={head_dim}: needs more than one pair of dimensions")
    return factor ** (head_dim / (head_dim - 2))


def unseen_angles(frequencies, trained, window: int, longer: int) -> np.ndarray:
    """Pairs that at position `longer` stand at an angle which training never showed them.

    A pair that turned fully round in the window has seen all angles; a slower one has seen 0 .. window * w_i.

    Args:
        frequencies, trained: [D/2] after and before extension, radians per token.
        window, longer: tokens of the trained and of the wanted window.

    Returns:
        bool [D/2].
    """
    seen = window * np.asarray(trained, dtype=np.float64)
    return (seen < 2 * np.pi) & (longer * np.asarray(frequencies, dtype=np.float64) > seen * (1 + 1e-9))


def extend_context(
    model_or_config: PreTrainedModel | PreTrainedConfig | str | Path,
    method: str = "none",
    factor: float | None = None,
    *,
    base_factor: float = LONGALIGN_BASE_FACTOR,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    copy_weights: bool = False,
) -> PreTrainedModel | PreTrainedConfig:
    """A model (or configuration) that reads `factor` times its window; the argument is left as it is.

    It works through transformers' own RoPE: `config.rope_parameters` and `max_position_embeddings` are set,
    so `save_pretrained` and `from_pretrained` keep the change, and the rotary module is rebuilt from them.
    A tokenizer's `model_max_length` is not touched: it only warns.

    Args:
        model_or_config: a causal LM, its configuration, or a name for `longalign_lib.models.load_model`.
        method: one of METHODS.
        factor: s > 1, new window over old. Not for "none". The new window is rounded to whole tokens.
        base_factor: b, multiplier of theta, for "base" only. There `factor` sets nothing but the declared window.
        beta_fast, beta_slow: yarn's ramp, see `inverse_frequencies`.
        copy_weights: False shares the parameters with the given model (right for comparing methods; training one
            trains both), True copies them.

    Returns:
        The same kind as given: a model in the given model's mode, or a configuration. A name gives a model.

    Raises:
        ValueError: a method that is unknown or depends on the batch, a factor that does not fit the method,
            a model whose RoPE is already rescaled or differs between layers.
        RuntimeError: the rotary module found does not follow the formula.

    Example:
        longer = extend_context(load_model("default"), "yarn", 2.0)  # 8,192 -> 16,384 tokens
    """
    _check_method(method)
    if isinstance(model_or_config, (str, Path)):
        from longalign_lib.models import load_model

        model_or_config = load_model(str(model_or_config))
    if isinstance(model_or_config, PreTrainedConfig):
        config = copy.deepcopy(model_or_config)
        _set_rope(config, method, factor, base_factor, beta_fast, beta_slow)
        return config
    if not isinstance(model_or_config, PreTrainedModel):
        raise TypeError(f"{type(model_or_config).__name__}: give a PreTrainedModel, its config, a folder or a Hub id")

    keep = {} if copy_weights else {id(p): p for p in model_or_config.parameters()}
    model = copy.deepcopy(model_or_config, keep)
    expected = _set_rope(model.config, method, factor, base_factor, beta_fast, beta_slow)
    if method != "none":
        _rebuild_rotary(model, expected)
    return model


def check_pack_safe(config: PreTrainedConfig) -> None:
    """Refuse a RoPE whose frequencies depend on the batch.

    Raises:
        ValueError: `dynamic` or `longrope`. They choose frequencies by the largest position of the batch, so a short
            document gets other logits beside a long one, and a pack is not the sum of its documents.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    nested = [v for v in rope.values() if isinstance(v, dict)]
    for kind in (r.get("rope_type", "default") for r in (nested or [rope])):
        if kind in BATCH_DEPENDENT:
            raise ValueError(_refusal(kind))


def _refusal(kind: str) -> str:
    return (
        f"RoPE type {kind!r} picks its frequencies by the largest position in the batch, so documents of one pack "
        f"would not be independent of each other; use one of {', '.join(METHODS)}"
    )


def _check_method(method: str) -> None:
    if method in BATCH_DEPENDENT:
        raise ValueError(_refusal(method))
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not known: use one of {', '.join(METHODS)}")


def _set_rope(config, method, factor, base_factor, beta_fast, beta_slow) -> np.ndarray | None:
    """Write the method into `config` in place; returns the inverse frequencies it must lead to."""
    check_pack_safe(config)
    if method == "none":
        if factor not in (None, 1, 1.0):
            raise ValueError(f"factor={factor} with method 'none': nothing is extended; drop factor or choose a method")
        return None
    if factor is None or not factor > 1:
        raise ValueError(f"factor={factor} with method {method!r}: give the new window over the old one, above 1")
    config = config.get_text_config()
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if "rope_theta" not in rope:
        raise ValueError(
            f"{type(config).__name__}.rope_parameters={rope}: no single rope_theta for all layers; "
            "extend such a model by its own configuration"
        )
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"the model's RoPE is already rescaled ({rope}): start from the model as it was trained")

    old = config.max_position_embeddings
    new = round(old * factor)
    factor = new / old  # exact, so that transformers' own check of the ratio agrees
    theta, partial = rope["rope_theta"], rope.get("partial_rotary_factor", 1.0)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    expected = inverse_frequencies(
        int(head_dim * partial), theta, method, factor, window=old, base_factor=base_factor,
        beta_fast=beta_fast, beta_slow=beta_slow,
    )  # fmt: skip
    if method == "base":
        rope["rope_theta"] = theta * base_factor
    elif method == "linear":
        rope.update(rope_type="linear", factor=factor)
    else:
        rope.update(rope_type="yarn", factor=factor, original_max_position_embeddings=old)
        rope.update(beta_fast=float(beta_fast), beta_slow=float(beta_slow))
    config.max_position_embeddings = new
    config.rope_parameters = rope
    config.validate_rope()
    return expected


def _rebuild_rotary(model: PreTrainedModel, expected: np.ndarray) -> None:
    """Replace every rotary module by one built from the model's present configuration, and check its frequencies."""
    config = model.config.get_text_config()
    found = [n for n, m in model.named_modules() if hasattr(m, "inv_freq") and hasattr(m, "rope_type")]
    if not found:
        raise RuntimeError(
            f"{type(model).__name__} has no rotary module to rebuild: extend its configuration with "
            "extend_context(config, ...) and load the weights with from_pretrained(folder, config=...)"
        )
    for name in found:
        parent, _, leaf = name.rpartition(".")
        old = model.get_submodule(name)
        new = type(old)(config).to(old.inv_freq.device)
        built = new.inv_freq.double().cpu().numpy()
        if built.shape != expected.shape or not np.allclose(built, expected, rtol=1e-4):
            raise RuntimeError(
                f"{name} ({type(new).__name__}) built other frequencies than {config.rope_parameters} "
                "means: this model changes RoPE in a way of its own"
            )
        setattr(model.get_submodule(parent), leaf, new.train(old.training))
