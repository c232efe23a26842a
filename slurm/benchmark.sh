#!/bin/bash
# Speed: sbatch slurm/benchmark.sh inference --model runs/X/model --data DIR --report runs/X/report.json [--config C a.b=v ...]
#SBATCH --job-name=benchmark --nodes=1 --ntasks=1 --gpus=1 --cpus-per-task=8 --exclusive --time=4:00:00
#SBATCH --requeue --open-mode=append
set -euo pipefail
source "${RQVAE_CODE:-$SLURM_SUBMIT_DIR}/slurm/environment.sh"
exec python "$RQVAE_CODE/launch/benchmark.py" "$@"
