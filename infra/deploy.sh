#!/bin/sh
# Work pools, all deployments of prefect.yaml, automations. Run again after every upgrade; nothing is there twice.
# Prefect's variables say where the server is. POOL_TYPE=kubernetes for the pools of infra/kubernetes.
set -eu
cd "$(dirname "$0")/.."
prefect() { "${PYTHON:-python}" -m prefect --no-prompt "$@"; }
type=${POOL_TYPE:-process}
for pool in gpu cpu; do
    if [ "$type" = kubernetes ]; then
        prefect work-pool create "$pool" --type "$type" --overwrite --base-job-template "infra/kubernetes/$pool-job.json"
    elif ! prefect work-pool inspect "$pool" >/dev/null 2>&1; then
        prefect work-pool create "$pool" --type "$type"
    fi
done
prefect deploy --all
"${PYTHON:-python}" -m infra.automations
