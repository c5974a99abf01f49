"""Families of made-up facts in English and Chinese: statement, question, answer, all known beforehand.

A fact is a key ("the north archive") and a value ("48213") put into one of several wordings, so that a model cannot
pass by knowing one sentence by heart. Names and values are drawn; nothing here is true of the world, and none of it is
the sentence of the needle test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np

Draw = Callable[[np.random.Generator], str]


@dataclass(frozen=True)
class Family:
    """Wordings of one kind of fact. `{k}` is the key, `{v}` the value.

    Attributes:
        name: of the family. language: "en" or "zh".
        facts, questions, answers: templates; every question fits every fact.
        keys: all keys. value: draws a value.
        plural: what a key is one of and what a value is, for questions about several.
    """

    name: str
    language: str
    facts: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    keys: tuple[str, ...]
    value: Draw
    plural: str


def number(low: int, high: int) -> Draw:
    """A draw of a whole number from low to high, written in digits."""
    return lambda rng: str(int(rng.integers(low, high + 1)))


def words(*lists: str, joiner: str = " ") -> Draw:
    """A draw of one word from each list, joined."""
    split = [part.split() for part in lists]
    return lambda rng: joiner.join(str(rng.choice(part)) for part in split)


def crossed(template: str, *lists: str) -> tuple[str, ...]:
    """Every combination of one word of each list put into the template."""
    return tuple(template.format(*row) for row in product(*(part.split() for part in lists)))


_SIDES = "north south east west upper lower old inner"
_ADJ = "amber silent copper quiet crooked velvet distant frozen hollow silver"
_NOUN = "otter lantern harbour falcon meadow anchor walnut comet thistle beacon"
_TOWNS = "Tolna Veldar Ostrava-Mill Kesting Brannoch Mirel Sandvik Larch-End Quillon Darrow"
_FIRST = "Ines Marek Odile Tariq Wren Bela Hanno Suri Yusra Emil"
_LAST = "Ostrander Quist Velasquez Thorne Adeyemi Lindqvist Marchetti Brannigan Okafor Petrov"

ENGLISH = (
    Family(
        "code", "en",
        ("The access code of {k} is {v}.", "Anyone who enters {k} must type the code {v}.",
         "For {k}, the access code was set to {v}.", "Note for the night shift: {k} opens with the access code {v}."),
        ("What is the access code of {k}?", "Which code opens {k}?", "Find the access code of {k} in the text above."),
        ("The access code of {k} is {v}.", "{v} is the access code of {k}."),
        crossed("the {} {}", _SIDES, "archive gatehouse vault greenhouse boathouse signal-room"),
        number(10000, 99999), "access codes",
    ),
    Family(
        "keeper", "en",
        ("The keeper of {k} is {v}.", "Since last spring {v} has been the keeper of {k}.",
         "The post of keeper of {k} went to {v}."),
        ("Who is the keeper of {k}?", "Name the keeper of {k}.", "According to the text, who is the keeper of {k}?"),
        ("The keeper of {k} is {v}.", "According to the text, the keeper of {k} is {v}."),
        crossed("the {} of {}", "lighthouse mill museum observatory", _TOWNS),
        words(_FIRST, _LAST), "keepers",
    ),
    Family(
        "password", "en",
        ("The password of the {k} club is \"{v}\".",
         "Members of the {k} club greet each other with the password \"{v}\".",
         "This year the {k} club uses the password \"{v}\"."),
        ("What is the password of the {k} club?", "Which password does the {k} club use?"),
        ("The password of the {k} club is \"{v}\".", "The {k} club uses the password \"{v}\"."),
        crossed("{}", "chess kite fencing mushroom canoe star-gazing bell-ringing orchid map radio baking climbing"),
        words(_ADJ, _NOUN), "passwords",
    ),
    Family(
        "time", "en",
        ("The ferry to {k} leaves at {v}.", "Departure of the ferry to {k}: {v}.",
         "Passengers for {k} should know that the ferry leaves at {v}."),
        ("When does the ferry to {k} leave?", "At what time does the ferry to {k} depart?"),
        ("The ferry to {k} leaves at {v}.", "It leaves at {v}."),
        crossed("{}", _TOWNS),
        lambda rng: f"{int(rng.integers(5, 23)):02d}:{int(rng.integers(0, 60)):02d}", "departure times",
    ),
    Family(
        "year", "en",
        ("The bridge at {k} was rebuilt in {v}.", "It was in {v} that the bridge at {k} was rebuilt.",
         "Records give {v} as the year in which the bridge at {k} was rebuilt."),
        ("In which year was the bridge at {k} rebuilt?", "When was the bridge at {k} rebuilt?"),
        ("The bridge at {k} was rebuilt in {v}.", "It was rebuilt in {v}."),
        crossed("{}", _TOWNS),
        number(1612, 1897), "years",
    ),
)  # fmt: skip

_PLACES = "东 西 南 北 旧 新 上 下"
CHINESE = (
    Family(
        "code", "zh",
        ("{k}的门禁密码是{v}。", "进入{k}需要输入密码{v}。", "值班记录写明，{k}的密码已改为{v}。"),
        ("{k}的门禁密码是多少？", "进入{k}要输入什么密码？", "请在上文中找出{k}的密码。"),
        ("{k}的门禁密码是{v}。", "密码是{v}。"),
        crossed("{}{}", _PLACES, "档案馆 仓库 温室 船坞 机房"),
        number(10000, 99999), "密码",
    ),
    Family(
        "keeper", "zh",
        ("{k}的管理员是{v}。", "从去年春天起，{v}担任{k}的管理员。", "{k}的管理员一职由{v}接任。"),
        ("{k}的管理员是谁？", "谁担任{k}的管理员？", "根据上文，{k}由谁管理？"),
        ("{k}的管理员是{v}。", "根据上文，{k}的管理员是{v}。"),
        crossed("{}{}", "青石 白沙 云溪 柳湾 石桥 枫岭", "灯塔 磨坊 博物馆 天文台"),
        words("欧阳 沈 陆 顾 闻 翟 祝 蒋", "若溪 明远 知秋 子安 雪松 怀瑾 一帆 清和", joiner=""), "管理员",
    ),
    Family(
        "time", "zh",
        ("开往{k}的渡船{v}出发。", "{k}方向的渡船于{v}离港。", "去{k}的旅客请注意，渡船{v}开船。"),
        ("开往{k}的渡船几点出发？", "去{k}的渡船什么时候开？"),
        ("开往{k}的渡船{v}出发。", "{v}出发。"),
        crossed("{}", "青石湾 白沙渡 云溪镇 柳湾村 石桥口 枫岭岛 月牙屿 长滩"),
        lambda rng: f"{int(rng.integers(5, 23))}点{int(rng.integers(10, 60))}分", "时间",
    ),
    Family(
        "price", "zh",
        ("{k}的拍卖价是{v}元。", "那件{k}最后以{v}元成交。", "账本上记着，{k}卖了{v}元。"),
        ("{k}的成交价是多少元？", "那件{k}卖了多少元？"),
        ("{k}的成交价是{v}元。", "{v}元。"),
        crossed("{}{}", "青瓷 黄铜 檀木 象牙白 墨绿", "香炉 茶壶 笔筒 花瓶 罗盘"),
        number(1200, 98700), "成交价",
    ),
)  # fmt: skip
FAMILIES = {"en": ENGLISH, "zh": CHINESE}

# Two-step facts: the answer needs both. {a} a place, {b} a person, {v} a value.
HOPS = {
    "en": (
        ("The reserve key of the {a} office is held by {b}.", "{b} can be found in room {v}.",
         "In which room can the person be found who holds the reserve key of the {a} office?",
         "The reserve key of the {a} office is held by {b}, who can be found in room {v}."),
        ("The survey of {a} was signed by {b}.", "The badge number of {b} is {v}.",
         "What is the badge number of the person who signed the survey of {a}?",
         "The survey of {a} was signed by {b}, whose badge number is {v}."),
    ),
    "zh": (
        ("{a}办事处的备用钥匙由{b}保管。", "{b}的办公室是{v}号房间。",
         "保管{a}办事处备用钥匙的人在几号房间办公？", "{a}办事处的备用钥匙由{b}保管，{b}在{v}号房间办公。"),
        ("{a}的勘测报告由{b}签字。", "{b}的工号是{v}。",
         "在{a}的勘测报告上签字的人工号是多少？", "{a}的勘测报告由{b}签字，{b}的工号是{v}。"),
    ),
}  # fmt: skip
HOP_PLACES = {"en": tuple(_TOWNS.split()), "zh": ("青石湾", "白沙渡", "云溪镇", "柳湾村", "石桥口", "枫岭岛")}
HOP_PEOPLE = {"en": ENGLISH[1].value, "zh": CHINESE[1].value}

# Questions about several facts of one family. {p} what the values are, {keys} the keys asked for.
SEVERAL = {
    "en": {
        "list": ("List the {p} that the text gives for: {keys}.", "; "),
        "order": ("The text gives {p} for {keys}. Name these in the order in which the text mentions them.", ", "),
        "count": (
            "For how many of these does the text give {p}: {keys}?",
            "The text gives {p} for {n} of them: {keys}.",
        ),
    },
    "zh": {
        "list": ("请列出上文给出的{p}：{keys}。", "；"),
        "order": ("上文给出了{keys}的{p}。请按它们在文中出现的先后顺序列出。", "、"),
        "count": ("在{keys}之中，上文给出了其中几个的{p}？", "上文给出了其中{n}个的{p}：{keys}。"),
    },
}

# Questions about code. {k} a function or constant, {p} a parameter, {v} the value or values.
CODE_QUESTIONS = {
    "en": {
        "default": ("What is the default value of the parameter `{p}` of the function `{k}`?",
                    "The default value of `{p}` in `{k}` is {v}."),
        "parameters": ("List the parameters of the function `{k}` in the order of its definition.",
                       "The parameters of `{k}` are {v}."),
        "constant": ("Which value does the code assign to `{k}`?", "The code assigns {v} to `{k}`."),
    },
    "zh": {
        "default": ("函数`{k}`的参数`{p}`的默认值是什么？", "`{k}`中`{p}`的默认值是{v}。"),
        "parameters": ("请按定义中的先后顺序列出函数`{k}`的参数。", "`{k}`的参数依次是{v}。"),
        "constant": ("代码给`{k}`赋了什么值？", "代码给`{k}`赋的值是{v}。"),
    },
}  # fmt: skip
CODE_WORDS = {
    "en": ("This listing belongs to the appendix:", "A note in the margin holds some code:",
           "The following lines were attached:"),
    "zh": ("附录中有这样一段代码：", "页边附有如下代码：", "附件里的代码如下："),
}  # fmt: skip
CODE_NAMES = {
    "verb": "raise lower drain flush trim prime seal align polish rewind calibrate unlatch".split(),
    "noun": "sluice turret basin trough winch gantry bellows kiln cistern derrick plinth spindle".split(),
    "parameter": "speed torque patience offset depth colour rhythm margin grade tension".split(),
    "string": "amber cobalt russet ivory teal crimson ochre indigo sepia viridian".split(),
}
