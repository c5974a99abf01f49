"""A needle grid as a small YAML file, in the spirit of the published needle configs.

    context:        {min_len: 1000, max_len: 8000, intervals: 8}       # or lengths: [1000, 2000, 4000]; spacing: linear | sigmoid
    document_depth: {intervals: 11, spacing: linear}                   # or percents: [0, 50, 100]; min_percent, max_percent
    prompt:         {variant: single, language: en}                    # or needle, retrieval_question, answer; haystack_dir
    repeats: 3
    seed: 0

The names that published configs use are read too: ``interval``, ``interval_type``, ``manually_select_list``.

`spaced` puts n points between two ends: evenly, or along a logistic curve, which is dense near the ends and sparse in the
middle: point x in percent of the way goes to 100 / (1 + exp(-(x - 50) / 10)), the ends stay where they are.

Invariants: `yaml.safe_load` builds no objects; an unknown key or a wrong value is an error that names it and what is
accepted; two points that fall together are an error, not dropped. Cost: none; a haystack folder is read once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from longalign_lib.data.folders import read_folder
from longalign_lib.evaluate.needle_variants import COUNTS, VARIANTS
from longalign_lib.evaluate.needles import Needle, recall

SPACINGS = ("linear", "sigmoid")
SYNONYMS = {"interval": "intervals", "interval_type": "spacing"}
LISTS = {"context": "lengths", "document_depth": "percents"}  # what ``manually_select_list`` means in each section
KEYS = {
    "": ("context", "document_depth", "prompt", "repeats", "seed", "max_new_tokens"),
    "context": ("lengths", "min_len", "max_len", "intervals", "spacing"),
    "document_depth": ("percents", "min_percent", "max_percent", "intervals", "spacing"),
    "prompt": ("variant", "language", "count", "spread", "needle", "others", "retrieval_question", "answer", "wrong", "haystack_dir"),
}


class ConfigError(ValueError):
    """A config that cannot be used; the message names the key, its value and what is accepted."""


@dataclass(frozen=True)
class GridSpec:
    """What `needle.build_grid` needs. ``needles`` is None to draw from a family, ``haystack`` None for the built-in one."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    repeats: int = 3
    seed: int = 0
    variant: str = "single"
    language: str = "en"
    count: int | None = None
    spread: str | None = None
    needles: tuple[Needle, ...] | None = None
    haystack: str | None = None
    max_new_tokens: int | None = None

    def drawn(self) -> dict:
        """Keyword arguments of `needle.build_grid` and `needle.run_grid`."""
        return {"lengths": self.lengths, "depths": self.depths, "repeats": self.repeats, "seed": self.seed, "needles": self.needles,
                "haystack": self.haystack, "variant": self.variant, "language": self.language, "count": self.count, "spread": self.spread}  # fmt: skip


def spaced(low: float, high: float, n: int, spacing: str = "linear") -> list[float]:
    """``n`` points from ``low`` to ``high``, both included.

    Raises:
        ValueError: fewer than two points for two ends, ends in the wrong order, an unknown spacing.
    """
    if spacing not in SPACINGS:
        raise ConfigError(f"spacing {spacing!r} is not one of {', '.join(SPACINGS)}")
    if n < 1 or high < low or (n == 1) != (high == low):
        raise ConfigError(f"{n} points from {low:g} to {high:g}: give two or more between two ends, or one where both are the same")
    shares = [i / (n - 1) for i in range(n)] if n > 1 else [0.0]
    if spacing == "sigmoid":
        shares = [x if x in (0, 1) else 1 / (1 + math.exp(-(100 * x - 50) / 10)) for x in shares]
    return [low + x * (high - low) for x in shares]


def haystack_of(folder: str | Path, language: str = "en") -> str:
    """The texts of a folder in sorted order, as one haystack.

    Raises:
        FileNotFoundError: no such folder. ValueError: no text in it; the reasons are named.
    """
    documents, rejected = read_folder(folder, language=language)
    text = "\n\n".join(d.text.strip() for d in documents if d.text.strip())
    if not text:
        why = "; ".join(f"{r['id']}: {r['reason']}" for r in rejected[:3]) or "it holds no files"
        raise ConfigError(f"haystack_dir {str(folder)!r} is empty ({why}): put txt, md, jsonl or parquet files with text there")
    return text


def load_config(path: str | Path) -> GridSpec:
    """Read a grid from a YAML file; a relative ``haystack_dir`` counts from the file's folder.

    Raises:
        FileNotFoundError: no such file or haystack folder. ConfigError: not YAML, an unknown key, a wrong value.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config file")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} is not YAML: {str(error).splitlines()[0]} {getattr(error, 'problem', '') or ''}".strip()) from None
    try:
        return spec_of(raw, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from None


def spec_of(raw: Mapping, folder: Path | str = ".") -> GridSpec:
    """The grid that a mapping describes; see the module's head for the keys."""
    top = _section("", {} if raw is None else raw)
    context, depth, prompt = (_section(name, top.get(name) or {}) for name in ("context", "document_depth", "prompt"))
    numbers = {k: _whole(k, top[k], 0 if k == "seed" else 1) for k in ("repeats", "seed", "max_new_tokens") if top.get(k) is not None}
    lengths = [round(v) for v in _axis("context", context, "min_len", "max_len", (1000, 4000, 4))]
    depths = [round(v, 3) for v in _axis("document_depth", depth, "min_percent", "max_percent", (0, 100, 5))]
    for key, values in (("context", lengths), ("document_depth", depths)):
        if twice := sorted({v for v in values if values.count(v) > 1}):
            raise ConfigError(f"{key} gives {', '.join(map(str, twice))} more than once: {values}; take fewer intervals, or list different values")
    if bad := [v for v in depths if not 0 <= v <= 100]:
        raise ConfigError(f"document_depth gives {bad}; depths are percentages between 0 and 100")
    if bad := [v for v in lengths if v < 1]:
        raise ConfigError(f"context gives {bad}; lengths are tokens, at least 1")
    return GridSpec(tuple(lengths), tuple(depths), **numbers, **_prompt(prompt, Path(folder)))


def _section(name: str, given) -> dict:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name or 'the config'} must be a mapping of keys to values, got {given!r}")
    renames = SYNONYMS | ({"manually_select_list": LISTS[name]} if name in LISTS else {})
    found = {}
    for key, value in given.items():
        mine = renames.get(key, key) if name in LISTS else key
        if mine not in KEYS[name]:
            raise ConfigError(f"unknown key {key!r}{' in ' + name if name else ''}; accepted: {', '.join(KEYS[name])}")
        if mine in found:
            raise ConfigError(f"{key!r} in {name or 'the config'} says what another key says already")
        if value is not None:
            found[mine] = value
    return found


def _whole(key: str, value, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{key} must be a whole number of at least {least}, got {value!r}")
    return value


def _axis(name: str, given: dict, low: str, high: str, default: tuple) -> list[float]:
    listed = LISTS[name]
    if listed in given:
        if others := sorted(set(given) - {listed}):
            raise ConfigError(f"{name} has {listed} and {', '.join(others)}: give the list alone, or ends and intervals")
        values = given[listed]
        if not isinstance(values, Sequence) or isinstance(values, str) or not values or not all(_is_number(v) for v in values):
            raise ConfigError(f"{name}: {listed} must be a list of numbers, got {values!r}")
        return list(values)
    ends = [given.get(low, default[0]), given.get(high, default[1])]
    if not all(_is_number(v) for v in ends):
        raise ConfigError(f"{name}: {low} and {high} must be numbers, got {ends}")
    try:
        return spaced(*ends, _whole("intervals", given.get("intervals", default[2]), 1), given.get("spacing", "linear"))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _words(key: str, value) -> tuple[str, ...]:
    values = [value] if isinstance(value, (str, int, float)) and not isinstance(value, bool) else value
    if not isinstance(values, Sequence) or not values or not all(isinstance(v, (str, int)) and str(v).strip() for v in values):
        raise ConfigError(f"prompt: {key} must be a text or a list of texts, got {value!r}")
    return tuple(str(v).strip() for v in values)


def _prompt(given: dict, folder: Path) -> dict:
    for key, accepted in (("variant", VARIANTS), ("language", ("en", "zh")), ("spread", ("after", "around"))):
        if key in given and given[key] not in accepted:
            raise ConfigError(f"prompt: {key} {given[key]!r} is not one of {', '.join(accepted)}")
    found = {k: given[k] for k in ("variant", "language", "spread") if k in given}
    if "count" in given:
        found["count"] = _whole("count", given["count"], 1)
    if "haystack_dir" in given:
        place = Path(str(given["haystack_dir"])).expanduser()
        found["haystack"] = haystack_of(place if place.is_absolute() else folder / place, found.get("language", "en"))
    own = [k for k in ("needle", "others", "retrieval_question", "answer", "wrong") if k in given]
    if own:
        found["needles"] = (_own_needle(given, found),)
    return found


def _own_needle(given: dict, found: dict) -> Needle:
    if missing := [k for k in ("needle", "retrieval_question", "answer") if k not in given]:
        raise ConfigError(f"prompt: a needle of your own needs {', '.join(missing)} too (answer: the words that an answer must hold)")
    if "count" in given:
        raise ConfigError("prompt: count is for drawn needles; list further sentences of your own under others")
    texts, question = _words("needle", given["needle"]), _words("retrieval_question", given["retrieval_question"])
    others = texts[1:] + (_words("others", given["others"]) if "others" in given else ())
    parts, wrong = _words("answer", given["answer"]), _words("wrong", given["wrong"]) if "wrong" in given else ()
    variant = given.get("variant") or ("keys" if wrong and others else "several" if others else "single")
    if variant != "single" and not others:
        raise ConfigError(f"prompt: variant {variant!r} needs more sentences: list them under needle or others")
    if COUNTS[variant] == 1 and others:
        raise ConfigError(f"prompt: variant 'single' hides one sentence, {1 + len(others)} are given")
    found["variant"] = variant
    needle = Needle(texts[0], question[0], parts, found.get("language", "en"), variant, others, wrong)
    if recall(" ".join(needle.texts), parts) < 1:
        raise ConfigError(f"prompt: the hidden sentences do not hold all of the answer {list(parts)}: no answer could score")
    if recall(needle.question, parts) == 1:
        raise ConfigError(f"prompt: the question holds the answer {list(parts)} already")
    return needle
