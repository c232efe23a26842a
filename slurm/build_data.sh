#!/bin/bash
# Token shards: sbatch --array=0-63%16 slurm/build_data.sh --config C [data.x=v ...], then sbatch slurm/build_data.sh --merge --config C.
# With data.deduplicate first the same two with `slurm/build_data.sh deduplicate`.
# launch/submit.py --job build_data does all of it, for what is missing.
#SBATCH --job-name=build_data --nodes=1 --ntasks=1 --cpus-per-task=4 --time=8:00:00
#SBATCH --requeue --open-mode=append
set -euo pipefail
source "${RQVAE_CODE:-$SLURM_SUBMIT_DIR}/slurm/environment.sh"
command=build
if [[ ${1:-} == deduplicate ]]; then command=$1; shift; fi
task=()
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then task=(--task-index "$SLURM_ARRAY_TASK_ID" --num-tasks "$SLURM_ARRAY_TASK_COUNT"); fi
exec python -m data_pipeline "$command" "${task[@]}" "$@"
