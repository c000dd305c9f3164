# depthcut with TensorRT-RTX, TensorRT and ONNX Runtime for CUDA; the host brings the driver.
#   docker build -f docker/tensorrt.Dockerfile -t depthcut:tensorrt .
#   docker run --rm --gpus all -v "$PWD:/models" depthcut:tensorrt doctor
# pip takes TensorRT's libraries from NVIDIA's own server. Where that can't be reached,
# EXTRAS=rtx,cpu builds engines with TensorRT-RTX alone. A driver older than 580 takes
# EXTRAS=gpu-cu12,rtx-cu12. Without a card the image is unhealthy.
ARG BASE=debian:trixie-slim

FROM ${BASE} AS build
ARG EXTRAS=gpu,rtx
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-venv \
 && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml README.md CHANGELOG.md LICENSE /src/
COPY exporter /src/exporter
COPY graph_passes /src/graph_passes
RUN python3 -m venv /opt/depthcut \
 && /opt/depthcut/bin/pip install --no-cache-dir "/src[${EXTRAS}]"

FROM ${BASE}
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 depthcut \
 && mkdir /models \
 && chown depthcut /models
COPY --from=build /opt/depthcut /opt/depthcut
ENV PATH=/opt/depthcut/bin:/usr/local/bin:/usr/bin:/bin \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
WORKDIR /models
HEALTHCHECK --interval=5m --timeout=60s CMD ["depthcut", "doctor", "--health", "gpu"]
ENTRYPOINT ["depthcut"]
CMD ["--help"]
