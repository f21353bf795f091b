# A worker: bivlm with its flows, and the programs for deployments, backups and restores.
# Built from the top of the repository: docker build -f infra/images/worker.Dockerfile .
FROM python:3.11-slim-bookworm

# PostgreSQL's clients, of the server's own version, for backups.
RUN apt-get update && apt-get install --yes --no-install-recommends postgresql-client-15 \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /opt/bivlm

# torch comes first and pinned, so that nothing else pulls in another build of it. Without TORCH_INDEX it is the one
# for CUDA.
ARG TORCH_INDEX=""
COPY constraints.txt ./
RUN pip install -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch

COPY pyproject.toml README.md LICENSE prefect.yaml bivlm_command.py ./
COPY bivlm ./bivlm
COPY tasks ./tasks
COPY flows ./flows
COPY infra ./infra
# In place, so that prefect.yaml's entry points and what is imported are the same files.
RUN pip install -c constraints.txt -e '.[kubernetes,pipeline,servers]'

RUN useradd --create-home --uid 10001 bivlm && mkdir /cache /outputs /backups && chown bivlm:bivlm /cache /outputs /backups
USER bivlm
ENTRYPOINT ["sh", "infra/images/with-secrets.sh"]
CMD ["python", "-m", "prefect", "worker", "start", "--pool", "cpu", "--type", "process"]
