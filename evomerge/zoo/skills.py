"""The skills of the zoo: procedurally drawn items, split into train, validation and test.

Four target skills, one per expert, and six auxiliary ones that give the base something to
share. Knows nothing of models or tokens: an item is a prompt and its one right answer. Which
split an item belongs to depends on its prompt alone, so the splits never share one.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from random import Random

TARGET_SKILLS = ("compare", "reverse", "lexicon", "sort")
COMPARE_ANSWERS = ("<", ">")
_LETTERS_PER_ITEM = 6
_LETTERS_TO_SORT = 5
_LEXICON_WORDS = 40


@dataclass(frozen=True)
class Item:
    """One line of a skill: `prompt` ends in `=`, `answer` follows it up to the end of text."""

    prompt: str
    answer: str


class Split(Enum):
    """Half of all prompts train; an eighth steers the base's training; the rest is tests."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


Draw = Callable[[Random], Item]


def split_of(prompt: str) -> Split:
    """Return the split that `prompt` belongs to, from the first byte of its BLAKE2b digest."""
    byte = hashlib.blake2b(prompt.encode(), digest_size=1).digest()[0]
    if byte < 128:
        return Split.TRAIN
    return Split.VALIDATION if byte < 160 else Split.TEST


def make_skills(seed: int) -> dict[str, Draw]:
    """Return every skill by name, the target skills first; the lexicon's words depend on `seed`."""
    return {
        "compare": _compare,
        "reverse": _reverse,
        "lexicon": partial(_lexicon, words=_make_lexicon(seed)),
        "sort": _sort,
        "copy": _copy,
        "shift": _shift,
        "swap": _swap,
        "maximum": _maximum,
        "periodic": _periodic,
        "brackets": _brackets,
    }


def draw_from(draw: Draw, split: Split, rng: Random) -> Item:
    """Draw items until one belongs to `split`."""
    while True:
        item = draw(rng)
        if split_of(item.prompt) is split:
            return item


def distinct_items(draw: Draw, split: Split, count: int, rng: Random) -> list[Item]:
    """Draw `count` items of `split` with `count` different prompts."""
    items: dict[str, Item] = {}
    while len(items) < count:
        item = draw_from(draw, split, rng)
        items.setdefault(item.prompt, item)
    return list(items.values())


def _letters(rng: Random, count: int = _LETTERS_PER_ITEM) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=count))


def _compare(rng: Random) -> Item:
    left, right = rng.sample(range(1000), 2)
    return Item(f"k {left:03}?{right:03}=", "<" if left < right else ">")


def _reverse(rng: Random) -> Item:
    letters = _letters(rng)
    return Item(f"r {letters}=", letters[::-1])


def _make_lexicon(seed: int) -> dict[str, str]:
    rng = Random(f"lexicon {seed}")
    return dict(zip(_words(rng), _words(rng), strict=True))


def _words(rng: Random) -> list[str]:
    consonants, vowels = "bdfgklmnprstvz", "aeiou"
    words: dict[str, None] = {}
    while len(words) < _LEXICON_WORDS:
        word = rng.choice(consonants) + rng.choice(vowels) + rng.choice(consonants)
        words[word] = None
    return list(words)


def _lexicon(rng: Random, *, words: dict[str, str]) -> Item:
    first, second = rng.choices(list(words), k=2)
    return Item(f"t {first} {second}=", f"{words[first]} {words[second]}")


def _sort(rng: Random) -> Item:
    letters = _letters(rng, _LETTERS_TO_SORT)
    return Item(f"s {letters}=", "".join(sorted(letters)))


def _copy(rng: Random) -> Item:
    letters = _letters(rng)
    return Item(f"c {letters}=", letters)


def _shift(rng: Random) -> Item:
    letters = _letters(rng)
    alphabet = string.ascii_lowercase
    return Item(
        f"h {letters}=", letters.translate(str.maketrans(alphabet, alphabet[1:] + alphabet[0]))
    )


def _swap(rng: Random) -> Item:
    letters = _letters(rng)
    half = len(letters) // 2
    return Item(f"w {letters}=", letters[half:] + letters[:half])


def _maximum(rng: Random) -> Item:
    digits = "".join(rng.choices(string.digits, k=5))
    return Item(f"m {digits}=", max(digits))


def _periodic(rng: Random) -> Item:
    period = _letters(rng, rng.randint(2, 3))
    line = period * 5
    return Item(f"p {line[:7]}=", line[7:10])


def _brackets(rng: Random) -> Item:
    brackets = _balanced(rng, 4)
    if rng.random() < 0.5:
        position = rng.randrange(len(brackets))
        flipped = ")" if brackets[position] == "(" else "("
        brackets = brackets[:position] + flipped + brackets[position + 1 :]
        return Item(f"b {brackets}=", "n")
    return Item(f"b {brackets}=", "y")


def _balanced(rng: Random, pairs: int) -> str:
    line, opened, depth = "", 0, 0
    while len(line) < 2 * pairs:
        opens = depth == 0 or (opened < pairs and rng.random() < 0.5)
        line, opened, depth = (
            (line + "(", opened + 1, depth + 1) if opens else (line + ")", opened, depth - 1)
        )
    return line
