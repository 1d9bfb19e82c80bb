"""Short sums in words, with worked answers, which a small model learns in one or two minutes.

The numbers of an answer follow from its question, and the words around them are random. So some tokens of an answer
matter for its result and others do not.
"""

import random

_NAMES = ("Ada", "Ben", "Hugo", "Kim")
_ITEMS = ("apples", "cards", "coins", "shells")
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


def generate(draw: random.Random) -> tuple[str, str]:
    """Returns one problem of two or three steps: the question, and an answer that ends in "#### <number>"."""
    name, item, count = draw.choice(_NAMES), draw.choice(_ITEMS), draw.randrange(3, 10)
    story, working = [f"{name} has {count} {item}."], []
    for _ in range(draw.randrange(2, 4)):
        number = draw.randrange(1, _MOST_AT_ONCE + 1)
        more = count <= number or (count + number <= _MOST and draw.random() < 0.5)
        sign, total = ("+", count + number) if more else ("-", count - number)
        story.append(draw.choice(_MORE if more else _LESS).format(name=name, number=number))
        working.append(draw.choice(_WORKING).format(sum=f"{count} {sign} {number}", count=total))
        count = total
    return f"{' '.join(story)} How many now?", "\n".join([*working, f"#### {count}"])
