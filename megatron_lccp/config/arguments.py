"""Command lines whose errors are one line each: for `lccp` and for the tools.

In: what argparse takes. Out: a parser that says what is wrong in one line and exits with code 2; types of arguments.
"""

from __future__ import annotations

import argparse
import math
from typing import NoReturn

from megatron_lccp.files import one_line


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, as every other error is said."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.partition(' ')[0]}: {one_line(message)}; see {self.prog} --help\n")


def a_path(text: str) -> str:
    """A path, which has a name."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a path")
    return text


def a_count(text: str) -> int:
    """A whole number of at least 1."""
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def a_size(text: str) -> float:
    """A number above 0 that has an end."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number
