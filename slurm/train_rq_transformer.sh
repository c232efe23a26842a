#!/bin/bash
# The latent model of any size: sbatch --nodes=N slurm/train_rq_transformer.sh --config configs/X.yaml [a.b=value ...]
#SBATCH --job-name=rq_transformer
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64 --mem=0 --exclusive
#SBATCH --time=24:00:00 --signal=B:USR2@300 --requeue --open-mode=append
set -euo pipefail
source "${RQVAE_CODE:-$SLURM_SUBMIT_DIR}/slurm/environment.sh"
exec python -m slurm.train --stage rq_transformer "$@"
