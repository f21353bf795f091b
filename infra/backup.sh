#!/bin/sh
# Copies what cannot be made again into FOLDER: MLflow's and Prefect's databases into a new folder named by the time, and
# the objects in S3 into FOLDER/s3, which all backups share. Databases first: what they name is then among the objects.
# Servers and workers may be at work meanwhile. psql's variables say where the databases are, those of rclone's remote
# `stack` where the objects are: `. .servers/admin.env`.
set -eu
umask 077
folder=${1:?usage: infra/backup.sh FOLDER}
now=$(date -u +%Y-%m-%dT%H-%M-%SZ)
partial="$folder/.partial-$now"
mkdir -p "$partial" "$folder/s3"
trap 'rm -rf "$partial"' EXIT
for database in mlflow mlflow_auth prefect; do
    pg_dump --format=custom --file="$partial/$database.dump" "$database"
done
for bucket in bivlm mlflow; do
    # Nothing is deleted here: an older backup's databases still find their objects.
    rclone copy --quiet "stack:$bucket" "$folder/s3/$bucket"
done
sync
mv "$partial" "$folder/$now"  # a folder with a time as its name is whole
echo "$folder/$now"
