"""Questions about code whose answers are read from the code itself, or from a listing that was put into the text.

Real code first: one-line function heads and assigned constants of the text at hand are parsed with `ast` (nothing is run),
and asked about when their name is unique in the text. Where a text has none, a listing of two or three made-up functions is
inserted at a sentence boundary; they share a parameter with different defaults, so that the name must be found.

    def raise_sluice(gate, speed=42, colour="amber"):        What is the default of `speed` in `raise_sluice`?  ->  42

Invariants: a name that is asked about is defined once in the text; the question holds no answer. Cost: one pass over the lines.
"""

from __future__ import annotations

import ast
import re
import warnings
from dataclasses import dataclass

import numpy as np

from longalign_lib.data.facts import CODE_NAMES, CODE_QUESTIONS, CODE_WORDS

_HEAD = re.compile(r"^[ \t]*(?:async )?def (\w{3,})\((.*)\)(?: *->[^:]*)?:[ \t]*$", flags=re.MULTILINE)
_CONSTANT = re.compile(r"^(_?[A-Z][A-Z0-9_]{2,}) *(?::[^=\n]*)?= *([^\n#]+?)[ \t]*(?:#[^\n]*)?$", flags=re.MULTILINE)


@dataclass(frozen=True)
class CodeFact:
    """One thing to ask: how ("default", "parameters", "constant"), whose, which parameter, the values, where (0..1)."""

    how: str
    name: str
    part: str
    values: tuple[str, ...]
    place: float


def code_facts(text: str) -> list[CodeFact]:
    """What can be asked about the code in a text: defaults and parameters of functions, values of constants.

    Values that anyone would guess (None, booleans, 0, 1, empty) or that have no letter or digit are left out, and so are
    names that are defined twice.
    """
    found, size = [], max(1, len(text))
    for match in _HEAD.finditer(text):
        name, place = match[1], round(match.start() / size, 4)
        if len(re.findall(rf"\b(?:def|class)\s+{name}\b|\b{name}\s*=[^=]", text)) != 1:
            continue
        try:
            arguments = ast.parse(f"def {name}({match[2]}): ...").body[0].args
        except SyntaxError:
            continue
        plain = [*arguments.posonlyargs, *arguments.args]
        names = [a.arg for a in plain + arguments.kwonlyargs if a.arg not in ("self", "cls")]
        with_default = [*zip(plain[len(plain) - len(arguments.defaults) :], arguments.defaults),
                        *zip(arguments.kwonlyargs, arguments.kw_defaults)]  # fmt: skip
        for argument, node in with_default:
            if (value := _value(node)) is not None and value in match[2]:
                found.append(CodeFact("default", name, argument.arg, (value,), place))
        if len(names) > 2 and not (arguments.vararg or arguments.kwarg):
            found.append(CodeFact("parameters", name, "", tuple(names), place))
    for match in _CONSTANT.finditer(text):
        once = len(re.findall(rf"(?<![\w.]){match[1]}\s*(?::[^=\n]*)?[+*/|-]?=[^=]", text)) == 1
        try:
            value = _value(ast.parse(match[2], mode="eval").body) if once else None
        except SyntaxError:
            continue
        if value is not None and value in match[2] and _bound(match[1], text) == 1:  # 0o666 is not asked for as 438
            found.append(CodeFact("constant", match[1], "", (value,), round(match.start() / size, 4)))
    return [f for f in found if not any(_inside(v, _ask(f, "en")) for v in f.values)]


def ask_code(fact: CodeFact, language: str) -> tuple[str, str]:
    """(question, answer) about a fact, in "en" or "zh"."""
    joined = (", " if language == "en" else "、").join(f"`{v}`" for v in fact.values)
    return _ask(fact, language), CODE_QUESTIONS[language][fact.how][1].format(k=fact.name, p=fact.part, v=joined)


def draw_listing(rng: np.random.Generator) -> tuple[str, list[CodeFact]]:
    """A listing of two or three made-up functions that share a parameter, and what can be asked about the first of them."""
    pick = lambda options: str(rng.choice(options))  # noqa: E731
    count = int(rng.integers(2, 4))
    nouns = [str(n) for n in rng.choice(CODE_NAMES["noun"], size=count, replace=False)]
    names = [f"{pick(CODE_NAMES['verb'])}_{noun}" for noun in nouns]
    shared, tint, method, *firsts = (str(p) for p in rng.choice(CODE_NAMES["parameter"], size=3 + count, replace=False))
    numbers = [int(v) for v in rng.choice(np.arange(12, 998), size=count, replace=False)]
    tints = [str(c) for c in rng.choice(CODE_NAMES["string"], size=count, replace=False)]
    heads, orders = [], []
    for name, first, number, value in zip(names, firsts, numbers, tints):
        optional = [(shared, f"{shared}={number}"), (tint, f'{tint}="{value}"')][:: 1 if rng.random() < 0.5 else -1]
        head = f"def {name}({first}, {', '.join(text for _, text in optional)}):"
        heads.append(f"{head}\n    return {first}.{method}({shared}, {tint})")
        orders.append((first, *(parameter for parameter, _ in optional)))
    heads = [heads[i] for i in rng.permutation(count)]
    facts = [
        CodeFact("default", names[0], shared, (str(numbers[0]),), 0.0),
        CodeFact("default", names[0], tint, (tints[0],), 0.0),
        CodeFact("parameters", names[0], "", orders[0], 0.0),
    ]
    return "\n\n```python\n" + "\n\n".join(heads) + "\n```\n\n", facts


def rivals(fact: CodeFact, others: list[CodeFact], listing: str = "") -> tuple[str, ...]:
    """Values that would be wrong: defaults of the same parameter elsewhere in the text or the listing."""
    if fact.how != "default":
        return ()
    wrong = {v for o in others if o.part == fact.part and o.name != fact.name for v in o.values}
    wrong |= {v.strip("\"'") for v in re.findall(rf"\b{fact.part}=(\"\w+\"|\d+)", listing)}
    return tuple(sorted(wrong - set(fact.values)))


def introduction(language: str, rng: np.random.Generator) -> str:
    """The sentence before an inserted listing."""
    return str(rng.choice(CODE_WORDS[language]))


def _ask(fact: CodeFact, language: str) -> str:
    return CODE_QUESTIONS[language][fact.how][0].format(k=fact.name, p=fact.part)


def _inside(value: str, question: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(value.lower())}(?![A-Za-z0-9])", question.lower()) is not None


def _bound(name: str, text: str) -> int:
    """How often lines of a text bind a name: in a tuple, by `for`, `as`, `**=`, `import`, `def` and so on, too."""
    count = 0
    for match in re.finditer(rf"^[ \t]*(?:async |el(?=if))?(except\b)?(.*(?<![\w.]){name}(?!\w).*)$", text, flags=re.MULTILINE):
        line = f"try: pass\nexcept{match[2]}" if match[1] else match[2]
        try:
            with warnings.catch_warnings(action="ignore"):  # of an escape that is none
                nodes = list(ast.walk(ast.parse(line + ("\n pass" if re.search(r":\s*(#.*)?$", line) else ""))))
        except (SyntaxError, ValueError):  # prose, or a part of a statement
            continue
        for node in nodes:
            if isinstance(node, ast.Name):
                count += node.id == name and isinstance(node.ctx, ast.Store)
            else:
                count += name in (getattr(node, "asname", None), getattr(node, "name", None))
    return count


def _value(node) -> str | None:
    """A constant's text when it is worth asking for, else None."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        inner = _value(node.operand)
        return f"-{inner}" if inner and isinstance(node.operand.value, (int, float)) else None
    if not isinstance(node, ast.Constant) or isinstance(node.value, (bool, type(None), bytes)):
        return None
    if isinstance(node.value, str):
        sayable = re.fullmatch(r"[\w.:/ -]{2,40}", node.value) and re.search(r"[^\W_]", node.value)
        return node.value if sayable and node.value.strip() == node.value else None
    return repr(node.value) if isinstance(node.value, (int, float)) and node.value not in (0, 1) else None
