# docker build -t nnprune . && docker run --rm --gpus all -v "$PWD:/work" -v "$HOME/.cache:/home/ubuntu/.cache" nnprune pruner=wanda sparsity=2:4
FROM nvidia/cuda:12.8.1-base-ubuntu24.04
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/nnprune
ENV PATH=/opt/nnprune/bin:$PATH
COPY . /src
RUN pip install --no-cache-dir -c /src/constraints.txt "/src[parallel]" && rm -rf /src
USER ubuntu
WORKDIR /work
ENTRYPOINT ["nnprune"]
