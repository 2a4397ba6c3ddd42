"""Where documents come from; name one in YAML as `megatron_lccp.data.sources.NAME`.

One of your own is a frozen dataclass that derives from `config.tree.Source`; its methods are described there. An
installed package ships one by an entry point in the group megatron_lccp.sources; YAML then names it by its short name.
"""

from megatron_lccp.data.sources.files import JsonLines, TextFiles
from megatron_lccp.data.sources.generated import Biographies, RepeatedSegments
from megatron_lccp.data.sources.stdlib import PythonStdlib

__all__ = ["Biographies", "JsonLines", "PythonStdlib", "RepeatedSegments", "TextFiles"]
