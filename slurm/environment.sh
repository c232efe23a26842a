# shellcheck shell=bash
# Sourced by every script of this directory: where the program is, then what the site needs.
# RQVAE_CODE is the program's directory: that of the snapshot which launch/submit.py made, or where sbatch was called.
export RQVAE_CODE=${RQVAE_CODE:-${SLURM_SUBMIT_DIR:?run it with sbatch, from the directory of the project}}
site=${RQVAE_SITE:-$SLURM_SUBMIT_DIR/slurm/site.sh}
if [[ ! -e $site ]]; then
  echo "error: no $site; copy slurm/site.example.sh there, or name another file in RQVAE_SITE" >&2
  exit 2
fi
# shellcheck source=slurm/site.example.sh
source "$site"
# Safe path: `python -m` takes modules from the working directory first otherwise, which is where a job was submitted,
# and the files there may have changed since.
export PYTHONSAFEPATH=1
export PYTHONPATH=$RQVAE_CODE${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
