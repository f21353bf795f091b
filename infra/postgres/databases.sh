#!/bin/sh
# The roles and databases of MLflow and Prefect: made where they are missing, with the passwords that the environment
# says. Running it again changes passwords and nothing else. psql finds the server through PGHOST, PGPORT and PGUSER (the
# administrator). A role's password is a file of secrets in a container, a variable elsewhere. The administrator has one in
# containers only.
set -eu
folder=${SECRETS_FOLDER:-/run/secrets}

from_file() {
    if [ -r "$folder/$1" ]; then cat "$folder/$1"; else printenv "$1" || { echo "$1 is not set" >&2; exit 2; }; fi
}
MLFLOW_DATABASE_PASSWORD=$(from_file MLFLOW_DATABASE_PASSWORD)
PREFECT_DATABASE_PASSWORD=$(from_file PREFECT_DATABASE_PASSWORD)
export MLFLOW_DATABASE_PASSWORD PREFECT_DATABASE_PASSWORD
unset POSTGRES_PASSWORD
if [ -r "$folder/POSTGRES_PASSWORD" ]; then
    POSTGRES_PASSWORD=$(cat "$folder/POSTGRES_PASSWORD")
    export POSTGRES_PASSWORD
fi

# Passwords reach psql through the environment, so that `ps` does not show them, and no statement is logged.
psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --dbname postgres <<'SQL'
\getenv mlflow_password MLFLOW_DATABASE_PASSWORD
\getenv prefect_password PREFECT_DATABASE_PASSWORD
\getenv administrator_password POSTGRES_PASSWORD
SET log_statement = 'none';
SET log_min_error_statement = 'panic';
SET log_min_duration_statement = -1;
SELECT 'CREATE ROLE mlflow LOGIN' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'mlflow') \gexec
SELECT 'CREATE ROLE prefect LOGIN' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'prefect') \gexec
ALTER ROLE mlflow PASSWORD :'mlflow_password';
ALTER ROLE prefect PASSWORD :'prefect_password';
\if :{?administrator_password}
ALTER ROLE postgres PASSWORD :'administrator_password';
\endif
SELECT 'CREATE DATABASE mlflow OWNER mlflow' WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'mlflow') \gexec
SELECT 'CREATE DATABASE mlflow_auth OWNER mlflow'
    WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'mlflow_auth') \gexec
SELECT 'CREATE DATABASE prefect OWNER prefect' WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'prefect') \gexec
REVOKE CONNECT ON DATABASE mlflow, mlflow_auth, prefect FROM PUBLIC;
SQL
