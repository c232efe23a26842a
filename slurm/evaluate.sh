#!/bin/bash
# Quality on the test split: sbatch slurm/evaluate.sh --model runs/X/model --data DIR --json runs/X/report.json [--config C a.b=v ...]
#SBATCH --job-name=evaluate --nodes=1 --ntasks=1 --gpus=1 --cpus-per-task=8 --time=8:00:00
#SBATCH --requeue --open-mode=append
set -euo pipefail
source "${RQVAE_CODE:-$SLURM_SUBMIT_DIR}/slurm/environment.sh"
exec python "$RQVAE_CODE/launch/eval.py" "$@"
