"""Words for what is drawn, in both languages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Language(StrEnum):
    """Language of a question and its answer."""

    ENGLISH = "en"
    CHINESE = "zh"


@dataclass(frozen=True, slots=True)
class Bilingual:
    """The same words in English and in Chinese."""

    en: str
    zh: str

    @classmethod
    def same(cls, text: object) -> Bilingual:
        """What is written alike in both: numbers, codes."""
        return cls(str(text), str(text))

    def of(self, language: Language) -> str:
        """The words in a language."""
        return self.en if language is Language.ENGLISH else self.zh

    def filled(self, **words: Bilingual) -> Bilingual:
        """Both with their `str.format` placeholders replaced."""
        return Bilingual(
            self.en.format(**{name: word.en for name, word in words.items()}),
            self.zh.format(**{name: word.zh for name, word in words.items()}),
        )


def listed(items: Sequence[Bilingual]) -> Bilingual:
    """All of them, in order."""
    return Bilingual(", ".join(i.en for i in items), "、".join(i.zh for i in items))


def lines(said: Sequence[Bilingual]) -> Bilingual:
    """One below the other."""
    return Bilingual("\n".join(one.en for one in said), "\n".join(one.zh for one in said))


@dataclass(frozen=True, slots=True)
class Phrasings:
    """Ways to ask one thing, as `str.format` templates."""

    en: tuple[str, ...]
    zh: tuple[str, ...]

    def of(self, language: Language) -> tuple[str, ...]:
        """The templates of a language."""
        return self.en if language is Language.ENGLISH else self.zh


COLOURS = {
    "red": (215, 30, 35),
    "green": (25, 150, 60),
    "blue": (35, 70, 215),
    "yellow": (240, 205, 20),
    "orange": (245, 125, 15),
    "purple": (135, 45, 165),
    "pink": (250, 135, 190),
    "black": (25, 25, 25),
}
"""RGB. Far enough apart to stay themselves under the jitter of `drawing.tint`."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")

COLOUR_NAMES = {
    "red": Bilingual("red", "红色"),
    "green": Bilingual("green", "绿色"),
    "blue": Bilingual("blue", "蓝色"),
    "yellow": Bilingual("yellow", "黄色"),
    "orange": Bilingual("orange", "橙色"),
    "purple": Bilingual("purple", "紫色"),
    "pink": Bilingual("pink", "粉色"),
    "black": Bilingual("black", "黑色"),
}

SHAPE_NAMES = {
    "circle": Bilingual("circle", "圆形"),
    "square": Bilingual("square", "方形"),
    "triangle": Bilingual("triangle", "三角形"),
    "star": Bilingual("star", "星形"),
    "cross": Bilingual("cross", "十字形"),
    "diamond": Bilingual("diamond", "菱形"),
}
