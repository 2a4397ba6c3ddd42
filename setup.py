"""Package metadata. In: the version in megatron_lccp/__init__.py. Out: the distribution and the command `lccp`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent

# Read, not imported: nothing of the package can be imported before its requirements are there.
(VERSION,) = re.findall(r'^__version__ = "(.+)"$', (HERE / "megatron_lccp/__init__.py").read_text(), re.MULTILINE)

# The two tested versions of Megatron-Core: the last one for Python 3.10 and 3.11, and one that needs 3.12.
MEGATRON = [
    "megatron-core==0.16.1; python_version < '3.12'",
    "megatron-core==0.19.2; python_version >= '3.12'",
]

# What training, measuring and planning need besides. Every extra below but `dev` brings it.
TRAIN = [
    # A floor (CVE-2026-24747: torch.load, even with weights_only) and no pin: which build fits a machine's GPU and
    # driver is not ours to choose, and a container's own must stay. tools/setup_env.sh installs the tested ones.
    "torch>=2.10",
    *MEGATRON,
    "pillow",
    "psutil",  # Megatron-Core cannot save a checkpoint without it, and does not declare it
    "safetensors",
    "sentencepiece",
    "tqdm",
    "wandb",
]

# What `make checks` runs, pinned, since a newer one finds something new. Stubs are for mypy alone.
CHECKS = [
    "mypy==2.4.1",
    "pre-commit==4.6.2; python_version < '3.11'",
    "pre-commit==4.7.0; python_version >= '3.11'",
    "ruff==0.17.6",
    "scipy-stubs==1.17.1.5; python_version >= '3.11'",
    "types-PyYAML==6.0.12.20261122",
    "types-psutil==7.2.2.20261111",
    "types-setuptools==84.2.0.20261104",
    "types-tqdm==4.70.0.20261106",
]

# Every extra is for Linux on x86_64 with glibc 2.28 or newer (RHEL 8, Debian 10, Ubuntu 20.04), as the wheels of torch
# are, and Python 3.10 to 3.12; tests/test_extras.py resolves them there. Of `gpu` only Transformer Engine's part for
# torch is compiled where it is installed. nvidia-resiliency-ext, which Megatron-Core names for its own loop, is not
# among them: its wheels want glibc 2.39, and nothing here imports it.
setup(
    name="megatron_lccp",
    version=VERSION,
    description="Long-context continual pre-training on Megatron-Core that says, as it runs, whether it has converged",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_lccp", "megatron_lccp.*"]),
    # The mark that the package is typed; the report's style, script and plotly.js.
    package_data={"megatron_lccp": ["py.typed"], "megatron_lccp.analysis": ["assets/*"]},
    entry_points={"console_scripts": ["lccp = megatron_lccp.cli:main"]},
    # Enough for report, verdict, export and watch, which need neither torch nor Megatron-Core.
    install_requires=[
        "jsonargparse[signatures]>=4.49",
        "matplotlib",
        "numpy",
        "pandas",
        "pyarrow",
        "pyyaml",
        "scipy",
    ],
    extras_require={
        "train": TRAIN,
        # A GPU machine without a container. Of Transformer Engine 2.11 is the newest that Megatron-Core 0.16.1 takes;
        # 0.19.2 gives no range: the newest that passed tests/model/test_transformer_engine.py, built and run on a CPU.
        "gpu": [
            *TRAIN,
            "transformer-engine[core_cu13,pytorch]==2.11.0; python_version < '3.12'",
            "transformer-engine[core_cu13,pytorch]==2.20.2; python_version >= '3.12'",
            "nvidia-modelopt",
        ],
        # An NGC PyTorch container, which brings Transformer Engine and Apex built for its own torch.
        "container": [
            *TRAIN,
            "nvidia-modelopt",
        ],
        "convert": [
            *TRAIN,
            "accelerate",  # transformers cannot read GGUF, or spread a model over devices, without it
            "gguf",
            "huggingface_hub",
            "tiktoken",
            "tokenizers",
            "transformers",
        ],
        # The site, with pinned versions, as a newer one warns of something new: these run on every Python from 3.10 on.
        "docs": [
            "furo==2025.12.19",
            "myst-parser==4.0.1",
            "sphinx==8.1.3",
        ],
        "test": [
            *TRAIN,
            "accelerate",
            "gguf",
            "huggingface_hub",
            "hypothesis",
            "jaxtyping",
            "nvidia-modelopt",
            "packaging",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "tiktoken",
            "tokenizers",
            "transformers",
            "uv",
        ],
        "dev": CHECKS,
    },
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
    ],
)
