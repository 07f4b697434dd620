# Two images:   docker build -t oneplusn:cpu .
#               docker build --build-arg VARIANT=cuda -t oneplusn:cuda .
# The package index's torch brings CUDA along. A CPU image without it takes
#   --build-arg TORCH_INDEX=<address of PyTorch's index of CPU wheels>
ARG VARIANT=cpu

FROM python:3.11-slim AS wheel
WORKDIR /src
COPY pyproject.toml LICENSE README.md ./
COPY oneplusn oneplusn
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .


FROM python:3.11-slim AS cpu-base
# The kernels of the CPU are compiled when they are first used, for the processor that is there.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
ENV XDG_CACHE_HOME=/data/cache


FROM cpu-base AS cpu-packages
ARG TORCH_INDEX=""
RUN python3 -m venv /opt/oneplusn
WORKDIR /src
COPY constraints.txt ./
RUN /opt/oneplusn/bin/pip install --no-cache-dir \
    ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' constraints.txt)"
COPY --from=wheel /wheels /wheels
# Triton is a third of the packages, and compiles for GPUs only.
RUN /opt/oneplusn/bin/pip install --no-cache-dir -c constraints.txt /wheels/*.whl \
    && /opt/oneplusn/bin/pip uninstall --yes triton


# torch's wheels hold CUDA's libraries; of this base only what makes the driver visible is used.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04 AS cuda-base
# Triton compiles a small C program for every kernel when it is first called. Kernels are kept in
# the volume: a /tmp in memory is often mounted so that nothing in it can run.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV TRITON_CACHE_DIR=/data/triton


FROM cuda-base AS cuda-packages
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/oneplusn
WORKDIR /src
COPY constraints.txt ./
COPY --from=wheel /wheels /wheels
RUN /opt/oneplusn/bin/pip install --no-cache-dir -c constraints.txt /wheels/*.whl


FROM ${VARIANT}-packages AS packages


FROM ${VARIANT}-base AS server
RUN groupadd --gid 10001 oneplusn \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data oneplusn \
    && install --directory --owner=10001 --group=10001 /data
COPY --from=packages /opt/oneplusn /opt/oneplusn
# PYTHONSAFEPATH keeps the working directory off sys.path (docs/decisions/0001-import-name.md).
ENV PATH=/opt/oneplusn/bin:$PATH \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/data/hub \
    ONEPLUSN_HOST=0.0.0.0 \
    ONEPLUSN_PORT=8000 \
    ONEPLUSN_DATA=/data/adapters \
    ONEPLUSN_LOG_FORMAT=json
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=180s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['ONEPLUSN_PORT'] + '/health/ready', timeout=2)"]
ENTRYPOINT ["oneplusn"]
CMD ["serve"]
