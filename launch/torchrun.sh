#!/bin/bash
# One node of several, without a scheduler: the same line on every node   (explained in docs/launch/torchrun.md)
#   launch/torchrun.sh NODES RANKS_PER_NODE HOST:PORT CONFIG [key=value ...]
set -eu

if (($# < 4)); then
    echo "usage: launch/torchrun.sh NODES RANKS_PER_NODE HOST:PORT CONFIG [key=value ...]" >&2
    exit 2
fi
nodes=$1 ranks=$2 endpoint=$3
shift 3

# Else torchrun hands the addresses of dead ranks to those that it starts in their place.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun --nnodes "$nodes" --nproc-per-node "$ranks" \
    --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id longreach \
    --max-restarts 3 --shutdown-timeout 600 \
    -m longreach.launch.train "$@"
