"""The zoo's skills: right answers, and splits that share no prompt."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from evomerge.zoo.skills import (
    COMPARE_ANSWERS,
    TARGET_SKILLS,
    Item,
    Split,
    distinct_items,
    make_skills,
    split_of,
)
from evomerge.zoo.vocabulary import encode

_SKILLS = make_skills(0)


def _items(name: str, split: Split, count: int = 300) -> list[Item]:
    return distinct_items(_SKILLS[name], split, count, Random(f"test {name} {split}"))


@pytest.mark.parametrize("name", TARGET_SKILLS)
def test_splits_share_no_prompt(name: str) -> None:
    prompts = [{item.prompt for item in _items(name, split, 150)} for split in Split]
    assert all(len(of_one_split) == 150 for of_one_split in prompts)
    assert len(set.union(*prompts)) == 450


def test_a_prompt_stays_in_its_split() -> None:
    # Golden: items that a released zoo tested on must never train a later one.
    prompts = ("r abcdef=", "r fedcba=", "s zebra=", "k 123?456=")
    assert [split_of(prompt).value for prompt in prompts] == [
        "train",
        "train",
        "test",
        "validation",
    ]


def test_splits_have_the_promised_shares() -> None:
    splits = [split_of(f"r {number}=") for number in range(8000)]
    shares = [splits.count(split) / len(splits) for split in Split]
    assert shares == pytest.approx([0.5, 0.125, 0.375], abs=0.02)


def test_compare_orders_numbers() -> None:
    seen = set()
    for item in _items("compare", Split.TEST):
        left, right = item.prompt.removeprefix("k ").removesuffix("=").split("?")
        order = COMPARE_ANSWERS[int(left) > int(right)]
        assert item.answer == order
        seen.add(order)
    assert seen == set(COMPARE_ANSWERS)


def test_reverse_and_sort() -> None:
    for item in _items("reverse", Split.TRAIN):
        assert item.prompt == f"r {''.join(reversed(item.answer))}="
    for item in _items("sort", Split.TRAIN):
        letters = item.prompt.removeprefix("s ").removesuffix("=")
        assert list(item.answer) == sorted(letters)


def test_lexicon_is_one_function_of_forty_words() -> None:
    meanings: dict[str, str] = {}
    for item in _items("lexicon", Split.TRAIN, 700):
        words = item.prompt.removeprefix("t ").removesuffix("=").split()
        for word, meaning in zip(words, item.answer.split(), strict=True):
            assert meanings.setdefault(word, meaning) == meaning
    assert len(meanings) == 40
    assert len(set(meanings.values())) == 40


def test_lexicon_depends_on_the_seed() -> None:
    drawn = [make_skills(seed)["lexicon"](Random(0)).answer for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def _is_balanced(text: str) -> str:
    while "()" in text:
        text = text.replace("()", "")
    return "n" if text else "y"


def _continue_period(text: str) -> str:
    period = 2 if text[:2] == text[2:4] else 3
    return "".join(text[(len(text) + offset) % period] for offset in range(3))


_REFERENCE: dict[str, Callable[[str], str]] = {
    "copy": lambda text: text,
    "shift": lambda text: "".join(chr((ord(c) - 97 + 1) % 26 + 97) for c in text),
    "swap": lambda text: text[3:] + text[:3],
    "maximum": lambda text: str(max(int(c) for c in text)),
    "periodic": _continue_period,
    "brackets": _is_balanced,
}


@pytest.mark.parametrize("name", list(_REFERENCE))
def test_auxiliary_skills(name: str) -> None:
    for item in _items(name, Split.TRAIN, 10):
        assert item.answer == _REFERENCE[name](item.prompt[2:-1])


@pytest.mark.parametrize("name", list(_SKILLS))
def test_every_character_has_a_token(name: str) -> None:
    for item in _items(name, Split.TRAIN, 10):
        encode(item.prompt + item.answer)
