# GPU image: Python 3.12, Megatron-Core 0.19.2, and the torch, Transformer Engine and Apex of the NGC PyTorch image.
# Not yet built in CI, which has no Docker engine.
#
#   docker build --build-arg NGC=<host of the NGC registry> -t megatron_lccp .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD/data:/opt/megatron_lccp/data" \
#     -v "$PWD/runs:/opt/megatron_lccp/runs" megatron_lccp bash examples/pretrain_lccp.sh
#
# NGC       registry to pull from, or a mirror of it
# NGC_TAG   release of the image; setup.py needs its torch to be 2.10 or newer (26.02 and later)
# APEX_REF  commit or tag of Apex to build; by default the image's own is kept
ARG NGC
ARG NGC_TAG=26.06-py3
FROM ${NGC}/nvidia/pytorch:${NGC_TAG}

ARG APEX_REF=""
# The image pins every package it was built with. We pin only those compiled against one another (tools/setup_env.sh),
# since the rest would refuse newer requirements. The image's Python is the system's, hence the second variable.
ENV PIP_CONSTRAINT="" \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_NO_CACHE_DIR=1 \
    LCCP_VENV=system \
    LCCP_EXTRAS=container,convert

RUN if [ -n "${APEX_REF}" ]; then \
      git init -q /tmp/apex && cd /tmp/apex && \
      git fetch -q --depth 1 https://github.com/NVIDIA/apex "${APEX_REF}" && git checkout -q FETCH_HEAD && \
      git submodule update -q --init --recursive --depth 1 && \
      APEX_CPP_EXT=1 APEX_CUDA_EXT=1 python3 -m pip install --no-build-isolation --no-deps --force-reinstall . && \
      rm -rf /tmp/apex; \
    fi

WORKDIR /opt/megatron_lccp

# What the set-up depends on comes first, so that a change of code does not install everything anew.
COPY setup.py pyproject.toml LICENSE ./
COPY tools/setup_env.sh tools/
COPY megatron_lccp/__init__.py megatron_lccp/
RUN bash tools/setup_env.sh

COPY . .

# Fails the build, not the run, if torch was replaced or one of the parts does not load.
RUN python3 -c 'import torch, transformer_engine.pytorch, apex, amp_C, megatron.core, megatron_lccp.cli; \
    assert torch.version.cuda, "the CUDA build of torch is gone"; \
    print(torch.__version__, transformer_engine.__version__, megatron.core.__version__)'
