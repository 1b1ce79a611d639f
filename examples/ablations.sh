#!/usr/bin/env bash
# The ablations of PathSegDiff (arXiv:2504.06950): timesteps, single blocks, learning rate. Each run
# is one command, so each loop can be stopped and started again (--resume), or cut in pieces.
#   examples/ablations.sh DATA/glas runs/pretrain/extractor.safetensors runs/ablations
# Further words are passed to every training, such as --set loop.steps=50.
set -euo pipefail
data=$1 extractor=$2 out=$3
shift 3
config=configs/train/small/pathsegdiff.yaml

one() { # name of the run, then its settings
    local run=$out/$1
    shift
    wsiseg train --dataset glas --data "$data" --extractor "$extractor" --config "$config" \
        --out "$run" --resume "$@"
    tail -n 1 "$run/validation.csv"
}

for t in 1 50 100 200 400; do # figure 4
    one "timestep-$t" --set "extractor.timesteps=[$t]" "$@"
done
for tap in 0 1 2 3 4 5 6 7 8 9 10 11 12; do # figure 5; 0 is the middle block
    one "block-$tap" --set "extractor.taps=[$tap]" "$@"
done
for rate in 1.0e-3 1.0e-4 1.0e-5; do # table 5
    one "rate-$rate" --set "loop.learning_rate=$rate" "$@"
done
