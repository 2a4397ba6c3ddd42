"""Where documents come from; name one in YAML as `megatron_lccp.data.sources.NAME`.

A source gives `documents(vocab_size)`, the same documents in the same order every time, as text or as token ids. One of
your own is a frozen dataclass deriving from `config.tree.Source` with that one method. Two more are optional:
`split_key(document) -> str`, where documents with equal keys must stay on one side of the held-out split (otherwise
only equal documents do), and `inputs() -> str`, which changes when what it reads has changed.
"""

from megatron_lccp.data.sources.files import JsonLines, TextFiles
from megatron_lccp.data.sources.generated import Biographies, RepeatedSegments
from megatron_lccp.data.sources.stdlib import PythonStdlib

__all__ = ["Biographies", "JsonLines", "PythonStdlib", "RepeatedSegments", "TextFiles"]
