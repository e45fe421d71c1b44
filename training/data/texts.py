# ruff: noqa: RUF001 - Chinese has its own punctuation
"""Tasks of text alone: small sums, looking up what was just said, saying a code again soon or late.

Held out are sums (two numbers and what is done with them), sets of facts, and codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from chiasm.training.data.names import COLOUR_NAMES, COLOURS, Bilingual, Phrasings, lines
from chiasm.training.data.sample import Draft, Key, Task

_ALPHABET = "ABCDEFGHJKLMNPQRSTUVWXYZ0123456789"
_MAX_SENTENCES = 4
_MANY_SENTENCES = (8, 48)
"""Between a code and the question for it, at least and at most, where it is far away."""
_TEN = 10
_SMALL = 0.3
"""Of the sums, how many begin with a number below 20 for sure."""

_PLUS = Phrasings(
    en=("What is {a}+{b}?", "{a}+{b}=", "Add {a} and {b}."),
    zh=("{a}+{b}等于多少？", "{a}+{b}=", "请计算{a}加{b}。"),
)
_MINUS = Phrasings(
    en=("What is {a}-{b}?", "{a}-{b}=", "Take {b} from {a}."),
    zh=("{a}-{b}等于多少？", "{a}-{b}=", "请计算{a}减{b}。"),
)

PEOPLE = (
    Bilingual("Tom", "小明"),
    Bilingual("Amy", "小红"),
    Bilingual("Ben", "小刚"),
    Bilingual("Eva", "小丽"),
    Bilingual("Max", "小华"),
    Bilingual("Lily", "小兰"),
)
NUMBERS = tuple(
    Bilingual(name, str(number))
    for number, name in enumerate(
        ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    )
)
_ROW = Bilingual("{name} {value}", "{name}{value}")
_APPLES, _COLOURS = Bilingual("apples", "苹果"), Bilingual("colour", "颜色")
_HOW_MANY = Phrasings(
    en=("{facts}\nHow many apples does {name} have?", "{facts}\nAnd the apples of {name}?"),
    zh=("{facts}\n{name}的苹果是几个？", "{facts}\n请问{name}的苹果有多少个？"),
)
_WHICH_COLOUR = Phrasings(
    en=("{facts}\nWhich colour does {name} like?", "{facts}\nAnd the colour of {name}?"),
    zh=("{facts}\n{name}的颜色是什么？", "{facts}\n请问{name}的颜色是哪种？"),
)
_FILLER = (
    Bilingual("The sun is warm today.", "今天阳光很暖和。"),
    Bilingual("A small dog runs in the park.", "一只小狗在公园里跑。"),
    Bilingual("My sister reads a long book.", "我的妹妹在读一本长长的书。"),
    Bilingual("The train leaves at noon.", "火车中午出发。"),
    Bilingual("Rain falls on the old roof.", "雨落在旧屋顶上。"),
    Bilingual("We drink tea after lunch.", "我们午饭后喝茶。"),
    Bilingual("The cat sleeps near the window.", "猫在窗户旁边睡觉。"),
    Bilingual("They walk to the river.", "他们走到河边。"),
    Bilingual("Snow covers the high mountain.", "雪盖住了高山。"),
    Bilingual("The baker opens early.", "面包店很早开门。"),
)
_CODE = Phrasings(
    en=(
        "The code is {code}. {filler}What is the code?",
        "Remember {code}. {filler}Repeat it.",
    ),
    zh=("密码是{code}。{filler}密码是什么？", "请记住{code}。{filler}请重复一遍。"),
)


def _draft_sum(rng: Random) -> Draft:
    """The answer adds or takes ones before it says the whole sum, as on paper: 7+8=15, 57+8=65.

    So ten times as few sums are to be known by heart, and each comes ten times as often.
    """
    # Small numbers have rows of their own (8-1 is not 28-1 without its ten), and are few.
    a = rng.randrange(20 if rng.random() < _SMALL else 100)
    b = rng.randrange(10)
    is_plus = a < b or rng.random() < 0.5
    steps = [_sum(a, b, is_plus)]
    if (ones := _ones(a, b, is_plus)) != a:
        steps.insert(0, _sum(ones, b, is_plus))
    return Draft(
        key=("+" if is_plus else "-", a, b),
        phrasings=_PLUS if is_plus else _MINUS,
        answer=Bilingual.same(", ".join(steps)),
        fields={"a": Bilingual.same(a), "b": Bilingual.same(b)},
    )


def _ones(a: int, b: int, is_plus: bool) -> int:
    """What is left of `a` without its tens, one of which stays where `b` could not be taken."""
    ones = a % _TEN
    return ones if is_plus or ones >= b else ones + _TEN


def _sum(a: int, b: int, is_plus: bool) -> str:
    return f"{a}+{b}={a + b}" if is_plus else f"{a}-{b}={a - b}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Who has how many apples, or likes which colour."""

    pairs: tuple[tuple[Bilingual, Bilingual], ...]
    """Name and value; all differ."""
    is_number: bool

    @property
    def key(self) -> Key:
        return tuple((name.en, value.en) for name, value in self.pairs)

    @property
    def table(self) -> Bilingual:
        """A row each below a head."""
        return lines([_APPLES if self.is_number else _COLOURS, *map(row, self.pairs)])


def row(pair: tuple[Bilingual, Bilingual]) -> Bilingual:
    """A name and, right behind it, its value: what follows a name is found by the name alone."""
    name, value = pair
    return _ROW.filled(name=name, value=value)


def any_facts(rng: Random) -> Facts:
    """Facts of three to five people."""
    people = rng.sample(PEOPLE, rng.randint(3, 5))
    is_number = rng.random() < 0.5
    values = (
        rng.sample(NUMBERS, len(people))
        if is_number
        else [COLOUR_NAMES[colour] for colour in rng.sample(tuple(COLOURS), len(people))]
    )
    return Facts(pairs=tuple(zip(people, values, strict=True)), is_number=is_number)


def _draft_lookup(rng: Random) -> Draft:
    """The answer is the row that was asked for."""
    facts = any_facts(rng)
    asked = rng.choice(facts.pairs)
    return Draft(
        key=facts.key,
        phrasings=_HOW_MANY if facts.is_number else _WHICH_COLOUR,
        answer=row(asked),
        fields={"facts": facts.table, "name": asked[0]},
    )


def _draft_copy(rng: Random) -> Draft:
    return _draft_code(_any_code(rng), rng.sample(_FILLER, rng.randint(0, _MAX_SENTENCES)))


def _draft_recall(rng: Random) -> Draft:
    """Hundreds of tokens later."""
    return _draft_code(_any_code(rng), rng.choices(_FILLER, k=rng.randint(*_MANY_SENTENCES)))


def _any_code(rng: Random) -> str:
    """Three or four letters and digits."""
    return "".join(rng.choice(_ALPHABET) for _ in range(rng.randint(3, 4)))


def _draft_code(code: str, filler: Sequence[Bilingual]) -> Draft:
    """The code, then sentences about something else, then a question for the code."""
    between = Bilingual(
        "".join(f"{sentence.en} " for sentence in filler),
        "".join(sentence.zh for sentence in filler),
    )
    return Draft(
        key=(code,),
        phrasings=_CODE,
        answer=Bilingual.same(code),
        fields={"code": Bilingual.same(code), "filler": between},
    )


TASKS = (
    Task(name="sums", threshold=0.98, draft=_draft_sum),
    Task(name="lookup", threshold=0.98, draft=_draft_lookup),
    Task(name="copy", threshold=0.98, draft=_draft_copy),
    Task(name="recall", threshold=0.98, draft=_draft_recall),
)
