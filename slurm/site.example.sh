# shellcheck shell=bash
# What this cluster needs; copy to slurm/site.sh (not under version control) and keep what applies. Every script of
# this directory sources it at its start. Partition and account come from the environment of sbatch:
#   export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=project     (in ~/.bashrc, before submitting)

# The environment of the project, or modules.
# module load cuda/12.8
# (From where the job was submitted: RQVAE_CODE may be a snapshot of the program, without an environment.)
# shellcheck source=/dev/null
source "$SLURM_SUBMIT_DIR/.venv/bin/activate"

# Places. TMPDIR is the node-local scratch; the caches should not fill a home directory.
# export TMPDIR=/scratch/$USER
# export HF_HOME=/project/$USER/huggingface
# export TORCH_EXTENSIONS_DIR=/project/$USER/torch-extensions
# export TRITON_CACHE_DIR=$TMPDIR/triton

# Copies of the training data on every node's own disk, kept from job to job; where it is unset, data are read in place.
# export RQVAE_STAGE_DIR=/scratch/$USER/rqvae-data

# A container, by the options that your srun takes for it.
# export RQVAE_SRUN_OPTIONS="--container-image=/project/images/rqvae.sqsh --container-mounts=/project:/project"

# Network: proxies for the model hub on compute nodes, interfaces of NCCL and gloo, where theirs are not the right ones.
# export HTTPS_PROXY=http://proxy:3128
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export HF_HUB_OFFLINE=1

# Weights & Biases, where compute nodes have no network: `wandb sync` from a login node later.
# export WANDB_MODE=offline

# Checks before every start: full, local (no all-reduce) or off; GB/s that neighbouring nodes must reach; free GiB.
# export RQVAE_PREFLIGHT=full RQVAE_MIN_BANDWIDTH_GBS=20 RQVAE_MIN_FREE_GIB=20

# Seconds for a step and a checkpoint once a job is asked to end; ask for a KillWait as long where it is preempted.
# export RQVAE_SHUTDOWN_S=300

# How long a job goes on by itself.
# export RQVAE_MAX_REQUEUES=100 RQVAE_MAX_STARTS_WITHOUT_PROGRESS=3
