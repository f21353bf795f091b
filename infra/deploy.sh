#!/bin/sh
# Work pools, all deployments of prefect.yaml, automations. Run again after every upgrade; nothing is there twice.
# Prefect's variables say where the server is. POOL_TYPE=kubernetes for the pools of infra/kubernetes, whose runs have the
# images BIVLM_IMAGE and BIVLM_GPU_IMAGE. A pool that is there stays paused and keeps its limit.
set -eu
cd "$(dirname "$0")/.."
prefect() { "${PYTHON:-python}" -m prefect --no-prompt "$@"; }
type=${POOL_TYPE:-process}
template=$(mktemp)
trap 'rm -f "$template"' EXIT
for pool in gpu cpu; do
    set --
    if [ "$type" = kubernetes ]; then
        sed -e "s|\${BIVLM_IMAGE}|${BIVLM_IMAGE:?}|" -e "s|\${BIVLM_GPU_IMAGE}|${BIVLM_GPU_IMAGE:?}|" \
            "infra/kubernetes/$pool-job.json" >"$template"
        set -- --base-job-template "$template"
    fi
    if ! prefect work-pool inspect "$pool" >/dev/null 2>&1; then
        prefect work-pool create "$pool" --type "$type" "$@"
    elif [ "$type" = kubernetes ]; then
        prefect work-pool update "$pool" "$@"
    fi
done
prefect deploy --all
"${PYTHON:-python}" -m infra.automations
