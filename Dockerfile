# A CPU image. PyPI's torch brings CUDA along; to leave it out, build with
#   --build-arg TORCH_INDEX=<address of PyTorch's CPU wheel index>
FROM python:3.11-slim

ARG TORCH_INDEX=""
# PYTHONSAFEPATH keeps the working directory off sys.path (docs/decisions/0001-import-name.md).
ENV PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    HF_HOME=/data/hub \
    ONEPLUSN_DATA=/data

WORKDIR /app
COPY constraints.txt ./
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml LICENSE README* ./
COPY oneplusn oneplusn
RUN pip install -c constraints.txt . \
    && useradd --system --uid 10001 --no-create-home oneplusn \
    && install -d -o oneplusn -g oneplusn /data

USER oneplusn
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health/ready', timeout=2)"]
CMD ["oneplusn", "serve", "--host", "0.0.0.0"]
