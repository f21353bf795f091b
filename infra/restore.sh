#!/bin/sh
# Puts a backup of backup.sh back: objects first, then the databases, each of them whole or not at all. It may be run
# again if it was interrupted. MLflow, Prefect and the workers must be down; PostgreSQL and S3 must be up, and hold the
# empty databases of a first start or those to be replaced. The passwords are those of the running stack, not the backup's.
set -eu
backup=${1:?usage: infra/restore.sh FOLDER/TIME}
for database in mlflow mlflow_auth prefect; do
    if [ ! -r "$backup/$database.dump" ]; then
        echo "restore: $backup/$database.dump is not there; expected a folder that backup.sh has printed" >&2
        exit 2
    fi
done
used="SELECT count(*) FROM pg_stat_activity WHERE datname IN ('mlflow', 'mlflow_auth', 'prefect')"
if [ "$(psql -XAtqc "$used" postgres)" != 0 ]; then
    echo "restore: the databases are in use; expected MLflow, Prefect and the workers to be down" >&2
    exit 2
fi
for bucket in bivlm mlflow; do
    if [ -d "$backup/../s3/$bucket" ]; then
        rclone copy --quiet "$backup/../s3/$bucket" "stack:$bucket"
    fi
done
for database in mlflow mlflow_auth prefect; do
    owner=${database%_auth}
    pg_restore --exit-on-error --single-transaction --clean --if-exists --no-owner --role="$owner" \
        --dbname="$database" "$backup/$database.dump"
done
echo "restored; start MLflow and Prefect, which upgrade what an older version has written"
