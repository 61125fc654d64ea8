# Three images from one file: `producer` and `gateway` (small: no torch), and `worker`.
#
#   docker build --target producer -t ingine-producer .
#   docker build --target gateway -t ingine-gateway .
#   docker build --target worker -t ingine-worker .
#
# On Linux the torch of the default index brings CUDA, some gigabytes. For a CPU-only worker give the index of
# torch's CPU builds: --build-arg PIP_EXTRA_INDEX_URL=...

FROM python:3.12-slim AS producer
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY ingine ingine
COPY gateway gateway
COPY producer producer
COPY worker worker
RUN pip install --constraint constraints.txt . && useradd --create-home ingine
USER ingine
ENTRYPOINT ["ingine"]

FROM producer AS gateway
USER root
RUN pip install --constraint constraints.txt '.[gateway]'
USER ingine
# It starts only with INGINE_GATEWAY_KEYS, or with INGINE_GATEWAY_WITHOUT_KEYS=true.
ENV INGINE_GATEWAY_HOST=0.0.0.0
EXPOSE 8000
CMD ["gateway"]

FROM producer AS worker
ARG PIP_EXTRA_INDEX_URL
USER root
# g++ compiles the CPU kernels for the machine that the worker runs on, when it first starts there.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/* \
    && pip install --constraint constraints.txt '.[worker]' \
    && install --directory --owner ingine /models
USER ingine
# Downloaded and converted models, and compiled kernels. A volume keeps them for the next container.
ENV INGINE_CACHE_DIR=/models HF_HOME=/models/huggingface TRITON_CACHE_DIR=/models/triton
ENV INGINE_HTTP_HOST=0.0.0.0
VOLUME /models
EXPOSE 9464
CMD ["worker"]
