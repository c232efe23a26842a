#!/bin/bash
# Any other command of the project: sbatch slurm/run.sh launch/convert_checkpoint.py runs/X/rqvae runs/X/model/rqvae --to safetensors
#SBATCH --job-name=run --nodes=1 --ntasks=1 --cpus-per-task=8 --time=4:00:00
#SBATCH --requeue --open-mode=append
set -euo pipefail
source "${RQVAE_CODE:-$SLURM_SUBMIT_DIR}/slurm/environment.sh"
exec python "$RQVAE_CODE/$1" "${@:2}"
