#!/bin/bash
# A sweep: sbatch --array=0-14 slurm/experiments.sh --sweep S [a.b=v ...]; then, for the table,
# sbatch --dependency=afterany:JOB slurm/experiments.sh --sweep S --merge [a.b=v ...]. Without an array, all in one job.
#SBATCH --job-name=experiments --nodes=1 --ntasks=1 --gpus=1 --cpus-per-task=8 --time=8:00:00
#SBATCH --requeue --open-mode=append
set -euo pipefail
source "${RQVAE_CODE:-$SLURM_SUBMIT_DIR}/slurm/environment.sh"
task=()
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then task=(--task-index "$SLURM_ARRAY_TASK_ID" --num-tasks "$SLURM_ARRAY_TASK_COUNT"); fi
exec python "$RQVAE_CODE/launch/experiments.py" "${task[@]}" "$@"
