# Controller, command line, dashboard and Ray head: everything but models. From the checkout's root:
#   docker build -f docker/controller.Dockerfile -t evomerge-controller .
FROM python:3.11-slim-bookworm

COPY . /src
RUN /src/docker/install-controller.sh /src && rm -rf /src

RUN useradd --create-home --uid 1000 evomerge
USER evomerge
WORKDIR /home/evomerge
ENV PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token

# of the dashboard; whoever runs something else in this image says how that is checked
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/dashboard', timeout=8)"]
EXPOSE 8080 6379 8265
CMD ["evomerge", "dashboard", "--host", "0.0.0.0", "--port", "8080"]
