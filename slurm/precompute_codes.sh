#!/bin/bash
# Code shards: sbatch --array=0-63%16 slurm/precompute_codes.sh --config C --checkpoint MODEL/rqvae [a.b=v ...].
# launch/submit.py --job precompute_codes submits only what is missing. The last task completes the codes.
#SBATCH --job-name=precompute_codes --nodes=1 --ntasks=1 --gpus=1 --cpus-per-task=8 --time=8:00:00
#SBATCH --requeue --open-mode=append
set -euo pipefail
source "${RQVAE_CODE:-$SLURM_SUBMIT_DIR}/slurm/environment.sh"
task=()
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then task=(--task-index "$SLURM_ARRAY_TASK_ID" --num-tasks "$SLURM_ARRAY_TASK_COUNT"); fi
exec python "$RQVAE_CODE/launch/precompute_codes.py" "${task[@]}" "$@"
