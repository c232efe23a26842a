"""What runs inside a Slurm job: the supervisor of training, the entry of each node, checks before the start.

Free of torch but for `allreduce`. The scripts beside these modules hold resources only.
"""
