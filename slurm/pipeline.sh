#!/bin/bash
# The whole chain as jobs that depend on each other: bash slurm/pipeline.sh --config C [--training=--nodes=8] [a.b=v ...],
# or by sbatch, where the login node must not read the data.
#SBATCH --job-name=pipeline --nodes=1 --ntasks=1 --cpus-per-task=2 --time=1:00:00
#SBATCH --requeue --open-mode=append
set -euo pipefail
export SLURM_SUBMIT_DIR=${SLURM_SUBMIT_DIR:-$PWD}
source "${RQVAE_CODE:-$SLURM_SUBMIT_DIR}/slurm/environment.sh"
exec python -m slurm.pipeline "$@"
