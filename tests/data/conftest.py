"""A small prepared data directory that the tests of this folder share."""

import pytest

from megatron_lccp.config.tree import Config
from megatron_lccp.data.prepare import prepare
from megatron_lccp.data.tokenizers.base import Tokenizer
from megatron_lccp.data.tokenizers.load import load_tokenizer
from tests.data.small import small_config


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> Config:
    """A configuration whose data is prepared; tests leave it as it is."""
    made = small_config(tmp_path_factory.mktemp("data"))
    prepare(made, say=lambda line: None)
    return made


@pytest.fixture(scope="session")
def tokenizer(config) -> Tokenizer:
    return load_tokenizer(config.data.tokenizer.path)
