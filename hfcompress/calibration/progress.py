"""Progress of what takes long: a tqdm bar in a terminal; in a log file, a pipe or a notebook a line every half a minute."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

EVERY = 30.0
"""Seconds between two lines where there is no terminal."""


def progress(iterable: Iterable[Any] | None = None, *, what: str, total: int | None = None, shown: bool = True) -> Any:
    """A tqdm: iterate over it, or `update()` and `close()` it; `set_postfix(loss=..., refresh=False)` says more.

    `shown`: false for all processes but one.
    """
    if not shown or sys.stderr.isatty():
        return tqdm(iterable, desc=what, total=total, leave=False, disable=not shown)
    return _Lines(iterable, desc=what, total=total, leave=False, delay=EVERY, mininterval=EVERY, maxinterval=EVERY, miniters=1)


class _Lines(tqdm):
    """What a bar would show, in lines that stay."""

    def __str__(self) -> str:
        share = f"{self.n} done"
        if self.total:
            share = f"{100 * self.n / self.total:.0f} % done"
            if self.n:
                pace = self.format_dict["rate"] or self.n / self.format_dict["elapsed"]
                share += f", {self.format_interval((self.total - self.n) / pace)} left"
        return f"{self.desc.removesuffix(': ')}: {share}" + (f", {self.postfix}" if self.postfix else "")

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """False, so that tqdm doesn't think there was something to wipe away."""
        if msg is None:
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return False
