#!/usr/bin/env bash
# Many slides on a Slurm cluster: every task of the array works on the same folder of outputs.
#   sbatch examples/slurm_array.sh slides/ masks/ [more options of wsiseg predict]
# A slide that one task has taken is passed over by the others (it is locked while it lasts), what is
# complete is skipped, and what was killed by the time limit goes on where it stopped: submit the same
# line again until `wsiseg report masks/` shows every slide. INPUT may be a folder, a pattern in
# quotes, a .txt list or a .csv, on a file system that all nodes see. A task with several GPUs (--gres=gpu:2
# below) takes all of them with `--gpus 0,1` among the options; see docs/cohorts.md.
#SBATCH --job-name=wsiseg
#SBATCH --array=0-7
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=12:00:00
#SBATCH --signal=INT@60
#SBATCH --output=wsiseg-%A_%a.log
set -euo pipefail
input=$1 out=$2
shift 2
cpus=${SLURM_CPUS_PER_TASK:-4}
exec srun --cpus-per-task="$cpus" wsiseg predict "$input" --out "$out" --device cuda --workers "$cpus" "$@"
