# One image a service, each a target:
#   docker build --target memory  -t quire-memory:0.1.0  .
#   docker build --target router  -t quire-router:0.1.0  .
#   docker build --target compute -t quire-compute:0.1.0 .
# Where no GPU is, a smaller torch: --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# For a GPU: --target compute-cuda -t quire-compute:0.1.0, in the place of the other.
#
# All run as user 10001 on a read-only root: what they write goes to $HOME, $TMPDIR and the folders that flags name.
# Kubernetes probes them over gRPC, so there is no HEALTHCHECK. `tools/exercise_dockerfile.py` runs these steps.

# The version that constraints.txt was made with.
ARG PYTHON_VERSION=3.11
FROM python:${PYTHON_VERSION}-slim-bookworm AS base
ENV PATH=/opt/quire/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

# A virtual environment with the libraries, in a layer that a change of our own code leaves alone: setuptools finds a
# package with nothing but a version in it.
FROM base AS libraries
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/quire
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY quire/__init__.py quire/
RUN pip install --constraint constraints.txt .

FROM libraries AS program
COPY . .
RUN pip install --no-deps --force-reinstall . \
 && pip uninstall --yes setuptools pip

FROM libraries AS compute-libraries
ARG PIP_EXTRA_INDEX_URL
RUN pip install --constraint constraints.txt '.[compute]'

FROM compute-libraries AS compute-program
COPY . .
RUN pip install --no-deps --force-reinstall . \
 && pip uninstall --yes pip

FROM base AS runtime
LABEL org.opencontainers.image.title="Quire" \
      org.opencontainers.image.description="An LLM serving system whose memory you can look into" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 quire \
 && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin quire
ENV HOME=/tmp
HEALTHCHECK NONE
ENTRYPOINT ["quire"]

FROM runtime AS memory
COPY --from=program /opt/quire /opt/quire
USER 10001:10001
EXPOSE 7072 7082
CMD ["memory"]

FROM runtime AS router
COPY --from=program /opt/quire /opt/quire
USER 10001:10001
EXPOSE 7071 7081
CMD ["router"]

# The OpenMP runtime that numba's kernels ask for by that name.
FROM runtime AS compute
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libgomp1 \
 && rm -rf /var/lib/apt/lists/*
COPY --from=compute-program /opt/quire /opt/quire
USER 10001:10001
EXPOSE 7073 7083
CMD ["compute"]

# Triton compiles the launcher of each kernel with a C compiler when it first meets it.
FROM compute AS compute-cuda
USER 0:0
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
USER 10001:10001
