# depthcut on a CPU: inspect, prune, compare and generate with ONNX files.
#   docker build -f docker/cpu.Dockerfile -t depthcut:cpu .
#   docker run --rm -v "$PWD:/models" depthcut:cpu prune model.onnx -o pruned.onnx --drop attention:3
# With EXTRAS=torch,cpu it scores and exports too (1.5 GB more; several with pip's CUDA build).
ARG BASE=debian:trixie-slim

FROM ${BASE} AS build
ARG EXTRAS=cpu
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
ENV PATH=/opt/depthcut/bin:/usr/local/bin:/usr/bin:/bin
USER 10001
WORKDIR /models
HEALTHCHECK --interval=5m --timeout=60s CMD ["depthcut", "doctor", "--health", "cpu"]
ENTRYPOINT ["depthcut"]
CMD ["--help"]
