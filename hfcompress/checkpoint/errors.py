"""The one exception: a mistake, told in one sentence that says where, what was written, what is possible, what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

INSTALL = "is on no package index yet: run `pip install .` in a checkout of its repository"
"""How to get hfcompress: cards and errors say it in these words, and it is written here alone."""


class CompressionError(ValueError):
    """Something the user can mend. The message says where, what was written, what is possible and what to do."""

    def __init__(self, message: str = "") -> None:
        super().__init__(without_password(message))


def without_password(text: str) -> str:
    """Addresses without the user and password in them, such as HF_ENDPOINT may hold."""
    return re.sub(r"(?<=://)[^\s/@]*@", "", text)


def shown(value: object, most: int = 80) -> str:
    """A value as an error repeats it: its repr, cut in the middle where it is long, without what a terminal would obey."""
    if isinstance(value, list | tuple | dict | set) and len(value) > most:
        return f"{type(value).__name__} of {len(value)} entries"
    text = repr(value[: most * 4] if isinstance(value, str | bytes) else value)
    text = printable(text)
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 4 :]}"


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line without its full stop, to stand inside a sentence."""
    lines = str(error).strip().splitlines()
    return (lines[0].strip().rstrip(".:")[:200] if lines else "") or type(error).__name__


def printable(text: object) -> str:
    """A text of a file as a terminal may print it: what a terminal would obey becomes a question mark."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))


def did_you_mean(word: str, possible: Iterable[str]) -> str:
    """` Did you mean 'x'?` where a possible word is close, else ` Possible: a, b, c.`; starts with a blank."""
    possible = sorted(possible)
    close = difflib.get_close_matches(word, possible, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {shown(close[0])}?"
    told = [shown(one)[1:-1] for one in possible[:60]] + ["..."] * (len(possible) > 60)
    return f" Possible: {', '.join(told)}." if told else ""


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Say where a `CompressionError` happened: `with explained("step 2 of 5, prune_heads"): ...`."""
    try:
        yield
    except CompressionError as error:
        raise CompressionError(f"{where}: {error}") from error
