# pitstop with CUDA. Its data and its runs are mounted below /work:
#   docker build --tag pitstop .
#   docker run --rm --gpus all --ipc host -v /data:/data -v "$PWD/runs:/work/runs" \
#       pitstop train standard --data /data/imagenet
# `docker stop --timeout 120` lets it save what it has trained.
FROM nvidia/cuda:12.8.1-base-ubuntu24.04

# gcc and Python's headers: torch.compile builds its launchers with them
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/pitstop/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PITSTOP_CACHE=/work/cache

WORKDIR /opt/source
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN python3 -m venv /opt/pitstop \
    && pip install --no-cache-dir '.[aws,track,export]'

WORKDIR /work
STOPSIGNAL SIGTERM
ENTRYPOINT ["pitstop"]
CMD ["--help"]
