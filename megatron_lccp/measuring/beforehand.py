"""What monitors are asked before anything runs: a window without a model, and what they say against it.

In: a configuration; its tokenizer and held-out text, or stand-ins for them where nothing is prepared. Out: a window of
which a monitor can be asked what it would run and what it cannot do, and those answers, one line each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np

from megatron_lccp.config.tree import Config
from megatron_lccp.data.haystacks import BUNDLED
from megatron_lccp.data.stages import trained_on
from megatron_lccp.data.tokenizers.base import Tokenizer
from megatron_lccp.measuring.engine import Engine, Sizes
from megatron_lccp.measuring.window import EvalWindow
from megatron_lccp.model.shape import Shape
from megatron_lccp.schema import Monitor

HAYSTACK_ID = 2**20
"""Id of every token of a stand-in text; a stand-in tokenizer never gets as far."""


class StandInTokenizer(Tokenizer):
    """Four characters a token, as English text has on average; gives a text back unchanged."""

    def __init__(self, begins: bool = False) -> None:
        super().__init__(Path("a stand-in"), "", vocab_size=HAYSTACK_ID, eod=-1)
        self.bos = HAYSTACK_ID - 1 if begins else None
        self._pieces: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone."""
        return [self._pieces.setdefault(text[i : i + 4], len(self._pieces)) for i in range(0, len(text), 4)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids."""
        pieces = list(self._pieces)
        return "".join(pieces[i] for i in ids)


def stand_in_text(config: Config) -> Callable[[str, int], np.ndarray]:
    """Held-out text of any length, of the sources that the configuration has; ValueError for another name."""

    def text(name: str, at_least_tok: int) -> np.ndarray:
        if name not in config.data.sources and name not in BUNDLED and config.data.sources:
            raise ValueError(f"{name!r} is not in data.sources, nor one of {', '.join(BUNDLED)}")
        return np.full(at_least_tok, HAYSTACK_ID, np.int32)

    return text


def planning_window(
    config: Config, shape: Shape, vocab_size: int, tokenizer: Tokenizer | None = None,
    text: Callable[[str, int], np.ndarray] | None = None,
) -> EvalWindow:  # fmt: skip
    """A window on a model of this shape that does not exist yet.

    Without tokenizer and text it has stand-ins for them, and one sample of each cell will do (`sketch`).
    """
    longest = max(stage.context_tok for stage in config.stages.values())
    sizes = Sizes(shape.layers, shape.heads, longest, vocab_size)
    unbuilt = cast(Engine, SimpleNamespace(sizes=sizes))  # a plan runs nothing, and talks to no ranks
    return EvalWindow(
        engine=unbuilt, run=config.name, tokenizer=tokenizer or StandInTokenizer(config.data.tokenizer.bos != "none"),
        config_hash="", stage="", step=0, tokens=0, text=text or stand_in_text(config), corpora=trained_on(config),
        sketch=text is None,
    )  # fmt: skip


def place(number: int, monitor: Monitor) -> str:
    """What a line about a monitor of a list begins with."""
    return f"monitors.{number} ({monitor.name})"


def monitor_problems(monitors: Sequence[Monitor], window: EvalWindow) -> list[str]:
    """What the monitors cannot do on the model or text of this window, all of it, one line each."""
    return [f"{place(k, one)}: {text}" for k, one in enumerate(monitors) for text in _against(one, window)]


def _against(monitor: Monitor, window: EvalWindow) -> Iterator[str]:
    try:
        yield from (" ".join(str(text).split()) for text in monitor.check(window))
    except Exception as error:  # a stranger's monitor; what it raises now, it would raise in every window
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        yield kind + " ".join(str(error).split())
