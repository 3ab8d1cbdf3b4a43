"""Needles: made-up sentences that are hidden in long documents, to teach and to test looking far back.

A needle says that a key, two words, has a secret number of five digits. The text holds it once and later again. The
second time the number can only be copied from the first. Training and evaluation have different keys, so a model that
finds the needles of evaluate.py has learned to look for them, not their numbers. It has learned nothing else by that:
needles say little about the understanding of long texts.

data/text.py --needles=N writes such documents for training; evaluate.py --tasks=needle asks for the numbers.
"""
if __name__ == "__main__":               # before the imports, so that the text comes at once
    print(__doc__.strip())
    raise SystemExit

import numpy as np

FIRST = ("amber ancient autumn bitter blue bold brave bright broken calm clever cold copper crimson curious dark deep "
         "distant dry early empty faint fierce frozen gentle golden green grey hidden hollow humble iron ivory late "
         "lonely lost loud misty narrow noble pale patient proud purple quiet rapid red restless").split()
SECOND = ("anchor arrow badger basket beacon bridge candle canyon castle cedar comet crow dolphin eagle ember falcon "
          "feather forest fountain fox garden glacier hammer harbor heron island jacket kettle ladder lantern lemon "
          "maple meadow mirror mountain otter owl pebble piano raven ribbon river saddle sparrow spider thunder tiger "
          "valley").split()
EVERY = 128                              # tokens of a training document for each of its needles
SHORTEST = 1024                          # tokens of a training document, if the text is long enough


def key_pool(training):
    """The keys of training or of evaluation, as a list of texts; no key is in both."""
    return [f"{first} {second}" for i, first in enumerate(FIRST) for j, second in enumerate(SECOND)
            if ((i + j) % 4 != 0) == training]


def question(key):
    """The sentence up to its number, with the line end before it."""
    return f"\nThe secret number of the {key} is"


def answer(rng):
    """A number as it follows a question: a space and five digits."""
    return f" {rng.integers(10_000, 100_000)}"


def training_document(ids, encode, limit, rng):
    """Ids of a document of at most `limit` tokens: a part of the text `ids` (N,) in which each needle stands twice.

    encode: a function from text to ids; rng: decides on the part, its length, the needles and their places.
    """
    longest = min(limit, max(len(ids), 1))
    length = int(longest * (min(SHORTEST, longest) / longest) ** rng.random())      # as many short ones as long ones
    keys = rng.choice(key_pool(training=True), min(max(1, length // EVERY), 256), replace=False)
    sentences = [encode(question(key) + answer(rng) + ".\n") for key in keys]
    room = max(0, length - 2 * sum(map(len, sentences)))
    start = rng.integers(0, len(ids) - room + 1)
    places = np.sort(rng.integers(0, room + 1, 2 * len(keys)))
    owners = rng.permutation(np.repeat(np.arange(len(keys)), 2))
    parts = np.split(ids[start:start + room], places)
    hidden = [part for owner, part in zip(owners, parts[1:]) for part in (sentences[owner], part)]
    return np.concatenate([parts[0], *hidden])[:limit].astype(ids.dtype)


def haystack(filler, needles, length, rng):
    """Ids of a document of `length` tokens that ends with a question, and the share of it before the asked needle.

    filler (N,): text of at least `length` tokens; needles: (depth, ids of a sentence) each, of which the first is asked
    for; the last tuple's ids are the question. The text between is cut to fit.
    """
    *hidden, (_, asked) = needles
    room = length - sum(len(ids) for _, ids in needles)
    start = rng.integers(0, len(filler) - room + 1)
    text, cuts = filler[start:start + room], [round(depth * room) for depth, _ in hidden]
    parts, at = [], 0
    for cut, (_, ids) in sorted(zip(cuts, hidden), key=lambda pair: pair[0]):
        parts += [text[at:cut], ids]
        at = cut
    return np.concatenate([*parts, text[at:], asked])
