# docker build -t dual-loop . && docker run --rm --gpus all -v "$PWD/outputs:/outputs" dual-loop doctor --quick
# torch's wheels bring CUDA 13 themselves; of the base image only the way to the driver is used.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      python3 python3-venv default-jre-headless && rm -rf /var/lib/apt/lists/*

WORKDIR /dual_loop
ENV VIRTUAL_ENV=/venv PATH=/venv/bin:$PATH PIP_NO_CACHE_DIR=1 DUAL_LOOP_EXTRAS=caption-eval,video,fast,archives,parquet
COPY pyproject.toml setup.py README.md LICENSE ./
COPY scripts scripts
COPY configs configs
COPY dual_loop dual_loop
RUN python3 -m venv /venv && bash scripts/setup_env.sh

# Nothing of the run needs the superuser.
RUN useradd --create-home loop && mkdir /outputs && chown loop /outputs
USER loop
WORKDIR /outputs
EXPOSE 7860
ENTRYPOINT ["dual-loop"]
CMD ["--help"]
