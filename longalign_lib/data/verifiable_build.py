"""Files of verifiable samples: as many as wanted, in shares of languages and kinds, unhurt by kills.

    verifiable.jsonl.part   a sample a line, in order; what stands there is not made again
    verifiable.jsonl        the whole, moved there when the last sample is written
    verifiable.settings.json  what was asked for, so that nobody continues a file with other settings

Sample i is drawn by a generator of its own, seeded by (seed, i), and drawn again only when it repeats one before it: a run
that was killed anywhere, and a file that grows from 1,000 samples to 2,000, have the lines of one run. Every sample is checked
before it is written (`faults`): its answer is marked right, and stands in the text once; otherwise it is drawn again.

Cost: 2,000 samples of up to 4,096 tokens in 20 to 40 seconds on one core.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from longalign_lib.data.documents import Document
from longalign_lib.data.facts import FAMILIES
from longalign_lib.data.jsonl import iter_jsonl
from longalign_lib.data.settings import same_settings
from longalign_lib.data.text import language_of
from longalign_lib.data.verifiable import Pool, check_arguments, draw_sample
from longalign_lib.data.verifiable_answers import is_right
from longalign_lib.data.verifiable_code import code_facts
from longalign_lib.data.verifiable_items import ALL_KINDS

CHINESE = 0.1  # the paper's share


def build_verifiable(
    documents: Sequence[Document],
    tokenizer,
    path: str | Path,
    n: int,
    seed: int = 0,
    kinds: Sequence[str] = ALL_KINDS,
    languages: Mapping[str, float] | Sequence[str] | None = None,
    low: int = 256,
    high: int = 4096,
    max_facts: int = 3,
    progress: bool = True,
) -> Path:
    """Write n verifiable samples to a JSONL file, or what is missing of them.

    Args:
        documents: of the languages wanted; those of other languages are not used. Questions of kind "code" are asked of
            documents with code half of the time, where there are any.
        tokenizer: with a chat template; lengths are counted with it.
        path: the JSONL file; its `.part` and `.settings.json` stand beside it.
        n: how many samples; a file that holds fewer is continued.
        seed: of every draw.
        kinds: drawn uniformly; see `verifiable`.
        languages: shares, {"en": 0.9, "zh": 0.1}; or languages, each as often; None is one in ten Chinese, as in the
            paper, or the only language that there is.
        low, high: tokens of a whole chat, drawn uniformly between them.
        max_facts: a "retrieve" sample holds 1 to max_facts facts of which one is asked for.
        progress: show a bar.

    Returns:
        the path, which holds n samples as `verifiable.retrieval_samples` describes them.

    Raises:
        ValueError: no document of a language, an unknown kind, bounds that no sample can meet, a file that holds more than
            n samples, documents too few for n different ones, or a file that was begun with other settings.
    """
    path = Path(path)
    check_arguments(documents, kinds, low, high)
    if n < 1:
        raise ValueError(f"n is {n}; give at least 1")
    by_language = {name: [d for d in documents if _language(d) == name] for name in FAMILIES}
    shares = _shares(languages, by_language)
    settings = {
        "seed": seed, "kinds": list(kinds), "languages": shares, "low": low, "high": high, "max_facts": max_facts,
        "documents": _hash(*((d.id, d.text) for name in sorted(shares) for d in by_language[name])),
        "tokenizer": _hash(len(tokenizer), tokenizer.chat_template, tokenizer("Ein Leuchtturm, 灯塔 123.")["input_ids"]),
    }  # fmt: skip
    part = path.with_name(path.name + ".part")
    same_settings(path.with_suffix(".settings.json"), settings, path.exists() or part.exists())
    done, there = _lines(path), _lines(part)
    if max(done, there) > n:
        held = path if done > n else part
        raise ValueError(f"{held} holds {max(done, there)} samples already, {n} are wanted; ask for as many, or give another path")
    if done == n:
        return path
    if done:
        os.replace(path, part)
    pools = {name: Pool(by_language[name], tokenizer) for name in shares}
    with_code = {name: [d for d in by_language[name] if code_facts(d.text)] for name in shares} if "code" in kinds else {}
    code_pools = {name: Pool(found, tokenizer) for name, found in with_code.items() if found}
    names, weights = list(shares), np.array(list(shares.values()))
    done = _lines(part)
    seen = {sample["prompt_hash"] for sample in iter_jsonl(part)} if done else set()
    with part.open("ab") as handle:
        for i in tqdm(range(done, n), desc="verifiable", initial=done, total=n, leave=False, delay=2, disable=not progress):
            rng = np.random.default_rng([seed, i])
            kind, language = str(rng.choice(list(kinds))), names[int(rng.choice(len(names), p=weights))]
            coded = kind == "code" and rng.random() < 0.5
            pool = code_pools.get(language, pools[language]) if coded else pools[language]
            sample = _draw(pool, kind, low, high, max_facts, rng, seen, i)
            seen.add(sample["prompt_hash"])
            handle.write((json.dumps(sample, ensure_ascii=False) + "\n").encode("utf-8"))
            handle.flush()
        os.fsync(handle.fileno())
    os.replace(part, path)
    return path


def _draw(pool: Pool, kind: str, low: int, high: int, max_facts: int, rng: np.random.Generator, seen: set, i: int) -> dict:
    wrong = ""
    for _ in range(10):  # text that reads like a sample's facts is rare, and so is the same sample twice: another draw
        sample = draw_sample(pool, kind, low, high, max_facts, rng)
        wrong = faults(sample) or ("the same text and question stood before" if sample["prompt_hash"] in seen else "")
        if not wrong:
            return sample
    raise ValueError(f"sample {i} ({kind}) could not be drawn in ten tries: {wrong}; give more documents or other lengths")


def faults(sample: Mapping) -> str:
    """What is wrong with a sample, or "": its answer marked wrong, the answer in the question, the facts not in the text."""
    text, question = sample["messages"][0]["content"].rsplit("\n\n", 1)
    kind, answer, expected = sample["task"].rsplit(":", 1)[-1], sample["messages"][1]["content"], sample["expected"]
    if not is_right(sample, answer):
        return f"its own answer {answer!r} is marked wrong"
    if kind not in ("order", "count") and is_right(sample, question):
        return f"its question {question!r} holds the answer"
    if kind != "count" and (missing := [value for value in expected if value.lower() not in text.lower()]):
        return f"{missing[0]!r} does not stand in the text"
    if kind in ("retrieve", "hop", "chain", "list") and (twice := [v for v in expected if text.lower().count(v.lower()) > 1]):
        return f"{twice[0]!r} stands in the text more than once"
    return ""


def _shares(languages, by_language: Mapping[str, list]) -> dict[str, float]:
    there = [name for name, found in by_language.items() if found]
    if languages is None:
        languages = {"en": 1 - CHINESE, "zh": CHINESE} if len(there) == 2 else there
    if not isinstance(languages, Mapping):
        languages = dict.fromkeys(languages, 1.0)
    if unknown := [name for name in languages if name not in by_language]:
        raise ValueError(f"language {unknown[0]!r} is unknown; accepted: {', '.join(by_language)}")
    total = sum(languages.values())
    if not languages or total <= 0 or min(languages.values()) < 0:
        raise ValueError(f"languages {dict(languages)} are no shares; give numbers of 0 or more, not all 0")
    if missing := [name for name, share in languages.items() if share and name not in there]:
        raise ValueError(f"no document is in {missing[0]!r}; add some, or ask for {', '.join(there) or 'nothing'} alone")
    return {name: share / total for name, share in sorted(languages.items()) if share}


def _lines(path: Path) -> int:
    """Whole lines of a file; a last line without an end, torn by a kill, is cut off."""
    if not path.is_file():
        return 0
    with path.open("rb+") as handle:
        count = whole = 0
        for line in handle:
            if line.endswith(b"\n"):
                count, whole = count + 1, whole + len(line)
        handle.truncate(whole)
    return count


def _language(document: Document) -> str:
    return document.language if document.language in FAMILIES else language_of(document.text)


def _hash(*parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]
