# A Ray node that scores candidates, on CUDA where the host has it. From the checkout's root:
#   docker build -f docker/worker.Dockerfile -t evomerge-worker .
FROM python:3.11-slim-bookworm

# torch by its pin in a layer of its own: gigabytes that an edit of ours need not push again
COPY constraints.txt /src/
RUN python3 -m pip install --no-cache-dir "$(grep '^torch==' /src/constraints.txt)"
COPY . /src
RUN /src/docker/install-worker.sh /src && rm -rf /src

RUN useradd --create-home --uid 1000 evomerge
USER evomerge
WORKDIR /home/evomerge
ENV PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

HEALTHCHECK --interval=30s --timeout=10s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:52365/api/local_raylet_healthz', timeout=8)"]
CMD ["sh", "-c", "exec ray start --address=\"$RAY_ADDRESS\" --block"]
