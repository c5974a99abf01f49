"""Questions about code: what `ast` says of a whole file is the oracle for what is read from pieces of it."""

from __future__ import annotations

import ast
import inspect
import textwrap

import numpy as np

from longalign_lib.data.documents import python_source
from longalign_lib.data.facts import CODE_WORDS
from longalign_lib.data.verifiable_code import ask_code, code_facts, draw_listing, introduction, rivals
from longalign_lib.data.verifiable_items import make_item

CODE = '''
LIMIT = 42          # a comment
NAME: str = "skerry"
_HIDDEN_RATE = -0.25
TWICE = 3
TWICE = 4
EMPTY = None
MODE = 0o666
GROWS = 7
GROWS += 1

def find(readings, min_range_mm=200, *, label="flat"):
    return readings

async def send(self, host, port=8080, timeout=None):
    ...

def again(x, step=9): ...
def again(x, step=8):
    pass

def gather(first, *rest, **more):
    pass
'''


def test_what_can_be_asked_and_what_not():
    found = {(f.how, f.name, f.part): f.values for f in code_facts(CODE)}
    assert found == {
        ("default", "find", "min_range_mm"): ("200",),
        ("default", "find", "label"): ("flat",),
        ("parameters", "find", ""): ("readings", "min_range_mm", "label"),
        ("default", "send", "port"): ("8080",),
        ("parameters", "send", ""): ("host", "port", "timeout"),
        ("constant", "LIMIT", ""): ("42",),
        ("constant", "NAME", ""): ("skerry",),
        ("constant", "_HIDDEN_RATE", ""): ("-0.25",),
    }
    assert code_facts("The def of a word (noun): a text without code.") == [] == code_facts("")


def test_a_constant_that_is_bound_again_is_not_asked_about():
    assert [f.values for f in code_facts("LIMIT = 10\nprint(LIMIT, OTHER == 3)\ncall(\n    LIMIT, step=5)\n# as LIMIT\n")] == [("10",)]
    for again in (
        "LIMIT, OTHER = 20, 30", "(OTHER, LIMIT) = pair", "[OTHER, *LIMIT] = row", "LIMIT **= 2", "LIMIT //= 3", "LIMIT <<= 2",
        "for LIMIT in range(5):  # each", "    for i, LIMIT in rows:", "with open(path) as LIMIT:", "async with it() as (a, LIMIT):",
        "except OSError as LIMIT:", "from other import LIMIT", "import other as LIMIT", "def LIMIT():", "if (LIMIT := 60):",
        "elif (n := 3) and (LIMIT := 4):",
    ):  # fmt: skip
        assert code_facts(f"LIMIT = 10\n{again}\n    pass\n") == [], again


def test_values_without_a_letter_or_digit_are_not_asked_for():
    text = "DOTS = '...'\nDASHES = '--'\nLINE = '__'\n\ndef fill_in(a, width=80, mark='..'):\n    pass\n"
    assert {f.values for f in code_facts(text) if f.how != "parameters"} == {("80",)}


def test_real_modules_agree_with_their_syntax_trees():
    asked = 0
    for document in python_source()[:12]:
        tree = ast.parse(document.text)
        functions = {n.name: n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))}
        for fact in code_facts(document.text):
            asked += 1
            if fact.how == "parameters":
                a = functions[fact.name].args
                wanted = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ("self", "cls")]
                assert list(fact.values) == wanted
            elif fact.how == "default":
                a = functions[fact.name].args
                plain = [*a.posonlyargs, *a.args]
                defaults = dict(zip([x.arg for x in plain[len(plain) - len(a.defaults) :]], a.defaults))
                defaults |= {x.arg: d for x, d in zip(a.kwonlyargs, a.kw_defaults) if d is not None}
                assert str(ast.literal_eval(defaults[fact.part])) == fact.values[0]
            else:
                (node,) = (n for n in tree.body if isinstance(n, (ast.Assign, ast.AnnAssign))
                           and fact.name in ast.unparse(n).split("=")[0])  # fmt: skip
                assert str(ast.literal_eval(node.value)) == fact.values[0]
            assert 0 <= fact.place <= 1 and all(v in document.text for v in fact.values)
    assert asked > 100


def test_listings_are_python_and_say_what_is_asked():
    rng = np.random.default_rng(0)
    hows = set()
    for _ in range(60):
        listing, found = draw_listing(rng)
        functions = {n.name: n for n in ast.parse(textwrap.dedent(listing.strip().removeprefix("```python").removesuffix("```"))).body}
        assert 2 <= len(functions) <= 3
        for fact in found:
            a = functions[fact.name].args
            if fact.how == "parameters":
                assert [x.arg for x in a.args] == list(fact.values)
            else:
                value = dict(zip([x.arg for x in a.args[1:]], a.defaults))[fact.part]
                assert str(value.value) == fact.values[0]
                others = {str(dict(zip([x.arg for x in f.args.args[1:]], f.args.defaults))[fact.part].value)
                          for name, f in functions.items() if name != fact.name}  # fmt: skip
                assert set(rivals(fact, found, listing)) == others  # the same parameter of the other functions
            for language in ("en", "zh"):
                question, answer = ask_code(fact, language)
                assert fact.name in question and all(v in answer and v not in question for v in fact.values)
            hows.add(fact.how)
    assert hows == {"default", "parameters"}
    assert introduction("zh", rng) in CODE_WORDS["zh"]


def test_a_text_with_code_is_asked_about_its_own():
    rng = np.random.default_rng(0)
    for language in ("en", "zh"):
        items = [make_item("code", language, CODE, rng) for _ in range(40)]
        assert all(not i.sentences and len(i.spots) == 1 for i in items) and len({i.question for i in items}) == 8
        item = make_item("code", language, inspect.cleandoc("No code here."), rng)
        assert len(item.sentences) == 1 and "```python" in item.sentences[0] and not item.spots
