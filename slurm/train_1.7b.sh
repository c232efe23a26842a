#!/bin/bash
# The codec of Qwen3-1.7B: sbatch slurm/train_1.7b.sh [--stage STAGE] [a.b=value ...]; see slurm/README.md.
#SBATCH --job-name=qwen3_1.7b
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64 --mem=0 --exclusive
#SBATCH --time=24:00:00 --signal=B:USR2@300 --requeue --open-mode=append
set -euo pipefail
source "${RQVAE_CODE:-$SLURM_SUBMIT_DIR}/slurm/environment.sh"
exec python -m slurm.train --config "$RQVAE_CODE/configs/qwen3_1.7b.yaml" --stage rqvae "$@"
