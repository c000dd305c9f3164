"""python probes.py FOLDER: writes four tasks that a cut may fail with hardly more perplexity."""

import json
import random
import sys
from pathlib import Path

WORDS = "apple bird boat book bread bridge chair cloud coat corn door farm fire fish hill king"
CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}


def arithmetic(draw):
    first, second = draw.randint(1, 99), draw.randint(1, 9)
    right = str(first + second)
    wrong = [right[:-1] + digit for digit in "0123456789" if digit != right[-1]]
    return f"3 + 4 = 7\n12 + 5 = 17\n47 + 2 = 49\n{first} + {second} =", right, wrong


def brackets(draw):
    text, unclosed = [], []
    while len(text) < 6 or not unclosed:
        if unclosed and draw.random() < 0.4:
            text.append(unclosed.pop())
        else:
            text.append(draw.choice([*CLOSING]))
            unclosed.append(CLOSING[text[-1]])
    wrong = [bracket for bracket in CLOSING.values() if bracket != unclosed[-1]]
    return "( [ ] )\n{ ( < > ) }\n" + " ".join(text), unclosed[-1], wrong


def copy(draw):
    words, place = draw.sample(WORDS.split(), 8), draw.randint(3, 6)
    wrong = [word for word in words if word not in words[place - 1 : place + 1]]
    return f"{' '.join(words)}.\n{' '.join(words[:place])}", words[place], wrong


def lookup(draw):
    words = draw.sample(WORDS.split(), 8)
    lines = [f"{key}: {value}" for key, value in zip(words[:4], words[4:], strict=True)]
    at = draw.randrange(4)
    return "\n".join([*lines, f"{words[at]}:"]), words[4 + at], words[4 : 4 + at] + words[5 + at :]


folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
for task in (arithmetic, brackets, copy, lookup):
    draw = random.Random(0)
    with (folder / f"{task.__name__}.jsonl").open("w") as file:
        for _ in range(100):
            query, right, wrong = task(draw)
            choices, gold = draw.sample(wrong, 3), draw.randrange(4)
            choices.insert(gold, right)
            file.write(json.dumps({"query": query, "choices": choices, "gold": gold}) + "\n")
