"""How SQuAD compares an answer with the right one (Rajpurkar et al. 2016, arXiv 1606.05250): without case, punctuation and
articles."""

from __future__ import annotations

import re
import string
from collections import Counter


def words(text: str) -> list[str]:
    """What of an answer is compared."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def exactly(answer: str, right: str) -> float:
    """1 where the words are the same in the same order, else 0."""
    return float(words(answer) == words(right))


def overlap(answer: str, right: str) -> float:
    """F1 of the words, as often as they occur; where either has none, 1 if both have none, else 0."""
    said, true = words(answer), words(right)
    if not said or not true:
        return float(said == true)
    common = sum((Counter(said) & Counter(true)).values())
    return 2 * common / (len(said) + len(true))
