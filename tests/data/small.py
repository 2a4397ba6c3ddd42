"""The small configuration of data that the tests of this folder share."""

from pathlib import Path

from megatron_lccp.config.tree import Config, DataConfig, MixtureConfig, StageConfig, TokenizerConfig
from megatron_lccp.data.sources.generated import Biographies, RepeatedSegments
from megatron_lccp.data.sources.stdlib import PythonStdlib

MIXTURE = {
    "short": MixtureConfig(share=1.0, sources={"files": 1.0, "people": 1.0}),
    "long": MixtureConfig(share=3.0, sources={"packages": 2.0, "segments": 0.5, "people": 0.5}),
}


def small_config(root: Path, **data) -> Config:
    """Four sources of a few hundred kilobytes and one stage of 37 steps."""
    sources = {
        "files": PythonStdlib(max_bytes=300_000),
        "packages": PythonStdlib(grain="package", max_bytes=300_000),
        "people": Biographies(count=40, people_per_document=6, questions_per_document=3),
        "segments": RepeatedSegments(count=30, length_tok=500),
    }
    given = {"dir": str(root / "tokens"), "sources": sources, "heldout_share": 0.1}
    tokenizer = TokenizerConfig(path=str(root / "tok.model"), train_on=("files", "people"), vocab_size=1024)
    stage = StageConfig(tokens=37 * 1024 - 5, context_tok=128, global_batch_tok=1024, micro_batch=2, mixture=MIXTURE)
    return Config(data=DataConfig(**{**given, "tokenizer": tokenizer, **data}), stages={"lccp": stage})
