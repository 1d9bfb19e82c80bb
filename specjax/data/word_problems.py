"""Generates any number of arithmetic word problems with worked answers from a seed.

`arithmetic` has several kinds of steps. `short_sums` has only small sums in words, which a small model learns in one or
two minutes; the words around its numbers are random, so some tokens of an answer matter for its result and others do
not.
"""

import random
from collections.abc import Callable

from specjax.data.corpora import stable_hash

VALIDATION_PROBLEMS = 512

_NAMES = (
    *("Ada", "Ben", "Chloe", "Daniel", "Elif", "Farid", "Grace"),
    *("Hugo", "Ines", "Jonas", "Kim", "Lena", "Marco", "Nadia"),
)
_ITEMS = ("apples", "beads", "cards", "coins", "marbles", "pencils", "shells", "stamps", "stickers", "tickets")
_BOXES = ("bags", "boxes", "jars", "packs")

Problem = tuple[str, str]
Splits = tuple[list[Problem], list[Problem]]


def generate_split(seed: int, size: int, generate: Callable[[random.Random], Problem]) -> Splits:
    """Returns `size` training and VALIDATION_PROBLEMS validation problems, as (question, answer), without duplicates.

    A hash of the question determines its split, so a training problem of one seed is never a validation problem of
    another. Validation problems do not depend on `size`.

    Args:
      generate: function that draws one problem.
    """
    draw = random.Random(f"word problems {seed}")
    train, validation, seen = [], [], set()
    while len(train) < size or len(validation) < VALIDATION_PROBLEMS:
        problem = generate(draw)
        if problem[0] in seen:
            continue
        seen.add(problem[0])
        split, wanted = (train, size) if stable_hash(problem[0]) % 10 else (validation, VALIDATION_PROBLEMS)
        if len(split) < wanted:
            split.append(problem)
    return train, validation


def arithmetic(draw: random.Random) -> Problem:
    """Returns one problem of two to four steps: the question, and an answer that ends in "#### <number>"."""
    name, friend = draw.sample(_NAMES, 2)
    item = draw.choice(_ITEMS)
    count = draw.randrange(5, 60)
    story, working = [f"{name} has {count} {item}."], []
    for _ in range(draw.randrange(2, 5)):
        kind = draw.choice(("buy", "find", "give", "double", "share"))
        sentence, work, count = _step(draw, kind, name, friend, item, count)
        story.append(sentence)
        working.append(work)
    if draw.random() < 0.3:
        price = draw.randrange(2, 10)
        story.append(f"{name} then sells all the {item} for {price} dollars each. How many dollars does {name} get?")
        working.append(f"Selling {count} {item} brings {count} * {price} = {count * price} dollars.")
        count *= price
    else:
        story.append(f"How many {item} does {name} have now?")
    return " ".join(story), "\n".join([*working, f"#### {count}"])


def _step(draw: random.Random, kind: str, name: str, friend: str, item: str, count: int) -> tuple[str, str, int]:
    """A sentence of the question, one of the worked answer, and the new count, which is positive."""
    divisors = [people for people in range(2, 9) if count % people == 0]
    if kind == "share" and not divisors:
        kind = "give"
    if kind == "give" and count < 2:
        kind = "find"
    if kind == "buy":
        number, each, boxes = draw.randrange(2, 10), draw.randrange(3, 13), draw.choice(_BOXES)
        bought, total = number * each, count + number * each
        sentence = f"{name} buys {number} {boxes} with {each} {item} in each."
        work = f"The {boxes} hold {number} * {each} = {bought} {item}, so there are {count} + {bought} = {total}."
    elif kind == "find":
        more = draw.randrange(2, 40)
        total = count + more
        sentence = f"{name} finds {more} more {item}."
        work = f"With those found there are {count} + {more} = {total}."
    elif kind == "give":
        number = draw.randrange(1, count)
        total = count - number
        sentence = f"{name} gives {number} {item} to {friend}."
        work = f"After giving some to {friend} there are {count} - {number} = {total}."
    elif kind == "double":
        total = count * 2
        sentence = f"{name} wins a game and doubles the number of {item}."
        work = f"Doubled, there are {count} * 2 = {total}."
    else:
        people = draw.choice(divisors)
        total = count // people
        sentence = f"{name} shares the {item} equally among {people} people and keeps one share."
        work = f"One share is {count} / {people} = {total}."
    return sentence, work, total


_FEW_NAMES = ("Ada", "Ben", "Hugo", "Kim")
_FEW_ITEMS = ("apples", "cards", "coins", "shells")
_MORE = ("{name} finds {number}.", "{name} gets {number}.")
_LESS = ("{name} loses {number}.", "{name} gives away {number}.")
_WORKING = (
    "That makes {sum} = {count}.",
    "Now there are {sum} = {count}.",
    "So {sum} is {count}.",
    "Then {sum} = {count}.",
)
# The largest count, and the largest number added or subtracted; they give about 100 different sums.
_MOST, _MOST_AT_ONCE = 15, 5


def short_sums(draw: random.Random) -> Problem:
    """Returns one problem of two or three steps: the question, and an answer that ends in "#### <number>"."""
    name, item, count = draw.choice(_FEW_NAMES), draw.choice(_FEW_ITEMS), draw.randrange(3, 10)
    story, working = [f"{name} has {count} {item}."], []
    for _ in range(draw.randrange(2, 4)):
        number = draw.randrange(1, _MOST_AT_ONCE + 1)
        more = count <= number or (count + number <= _MOST and draw.random() < 0.5)
        sign, total = ("+", count + number) if more else ("-", count - number)
        story.append(draw.choice(_MORE if more else _LESS).format(name=name, number=number))
        working.append(draw.choice(_WORKING).format(sum=f"{count} {sign} {number}", count=total))
        count = total
    return f"{' '.join(story)} How many now?", "\n".join([*working, f"#### {count}"])


GENERATORS = {"arithmetic": arithmetic, "short_sums": short_sums}
