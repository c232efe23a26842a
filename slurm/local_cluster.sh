#!/usr/bin/env bash
# A two-node Slurm on this machine, for the tests and for trying the scripts out. Not for real work.
#
#   slurm/local_cluster.sh start [DIRECTORY]     install what is missing, start, wait until both nodes are idle
#   slurm/local_cluster.sh env [DIRECTORY]       what to set: eval "$(slurm/local_cluster.sh env)"
#   slurm/local_cluster.sh status [DIRECTORY]    nodes and jobs
#   slurm/local_cluster.sh kill-node NODE        end a node's daemon and all its processes, as a power cut would
#   slurm/local_cluster.sh start-node NODE       bring it back
#   slurm/local_cluster.sh stop [DIRECTORY]      cancel all jobs, end all daemons
#
# Nodes n1 and n2 in the partitions batch (default) and urgent, whose jobs preempt those of batch. Needs root and
# Debian's packages; no systemd, no accounting, nothing written to /etc.
set -euo pipefail

action=${1:-}
node=
case $action in
  kill-node | start-node) node=${2:?which node, n1 or n2} && shift ;;
esac
directory=${2:-${RQVAE_LOCAL_CLUSTER:-/tmp/rqvae-slurm}}
packages=(munge slurmctld slurmd slurm-client)
base_port=${RQVAE_LOCAL_CLUSTER_PORT:-17600}
export SLURM_CONF=$directory/slurm.conf

fail() {
  printf 'local_cluster: %s\n' "$1" >&2
  exit 1
}

install_packages() {
  if command -v munged slurmctld slurmd sbatch >/dev/null; then return; fi
  [[ $(id -u) = 0 ]] || fail "not installed: ${packages[*]}; install them, or run this as root"
  command -v apt-get >/dev/null || fail "not installed: ${packages[*]}; no apt-get here to install them with"
  echo "local_cluster: installs ${packages[*]}" >&2
  export DEBIAN_FRONTEND=noninteractive
  apt-get install -y -qq --no-install-recommends "${packages[@]}" >&2 \
    || { apt-get update -qq >&2 && apt-get install -y -qq --no-install-recommends "${packages[@]}" >&2; } \
    || fail "apt-get could not install ${packages[*]}; the messages above say why"
}

is_alive() { [[ -s $1 ]] && kill -0 "$(<"$1")" 2>/dev/null; }

write_configuration() {
  mkdir -p "$directory"/{munge,state,spool-n1,spool-n2}
  cat >"$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmctldPort=$base_port
SlurmdPort=$((base_port + 1))
AuthType=auth/munge
AuthInfo=socket=$directory/munge/socket,cred_expire=3
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool-%n
SlurmctldPidFile=$directory/slurmctld.pid
SlurmdPidFile=$directory/slurmd-%n.pid
SlurmctldLogFile=$directory/slurmctld.log
SlurmdLogFile=$directory/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
SlurmdTimeout=15
KillWait=60
ReturnToService=2
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((base_port + 1)) CPUs=4
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((base_port + 2)) CPUs=4
PartitionName=batch Nodes=n1,n2 Default=YES MaxTime=INFINITE PriorityTier=1
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE PriorityTier=10
CONF
}

start_munge() {
  local munge=$directory/munge
  is_alive "$munge/pid" && return
  # munged refuses a key that others can read.
  [[ -s $munge/key ]] || (umask 077 && head -c 1024 /dev/urandom >"$munge/key")
  chown -R munge: "$munge"
  chmod 711 "$munge"
  runuser -u munge -- munged --socket="$munge/socket" --key-file="$munge/key" --log-file="$munge/log" \
    --pid-file="$munge/pid" --seed-file="$munge/seed" || fail "munged does not start; see $munge/log"
}

start_node() { is_alive "$directory/slurmd-$1.pid" || slurmd -f "$SLURM_CONF" -N "$1"; }

wait_until_idle() {
  for _ in {1..60}; do
    [[ $(sinfo --noheader --Node --partition=batch --states=idle 2>/dev/null | wc -l) = 2 ]] && return
    sleep 0.5
  done
  sinfo >&2 || true
  fail "the nodes are not idle after 30 s; see $directory/*.log"
}

start() {
  install_packages
  write_configuration
  start_munge
  is_alive "$directory/slurmctld.pid" || slurmctld -f "$SLURM_CONF"
  start_node n1
  start_node n2
  wait_until_idle
  echo "export SLURM_CONF=$SLURM_CONF"
}

end_process() {
  is_alive "$1" || return 0
  local pid
  pid=$(<"$1")
  kill "$pid"
  for _ in {1..50}; do
    kill -0 "$pid" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -9 "$pid" 2>/dev/null || true
}

# Processes of this cluster whose environment has a line that matches as a whole.
processes_with() {
  { grep -lzx -- "$1" /proc/[0-9]*/environ || true; } 2>/dev/null \
    | { xargs -r grep -lzx -- "SLURM_CONF=$SLURM_CONF" || true; } 2>/dev/null | cut -d/ -f3
}

# Every process whose environment says that it belongs to a step on this node of this cluster, and the daemon.
kill_node() {
  local pids pid
  mapfile -t pids < <(processes_with "SLURMD_NODENAME=$node")
  kill -9 "$(<"$directory/slurmd-$node.pid")" || true
  for pid in "${pids[@]}"; do
    # The step's own daemon has no such environment; it is the parent of its tasks.
    parent=$(ps -o ppid= -p "$pid" 2>/dev/null | tr -d ' ') || continue
    if [[ $(ps -o comm= -p "${parent:-0}" 2>/dev/null) = slurmstepd ]]; then kill -9 "$parent" 2>/dev/null || true; fi
    kill -9 "$pid" 2>/dev/null || true
  done
  rm -f "$directory/slurmd-$node.pid"
}

# What is left of this cluster's jobs, once nobody looks after them.
kill_jobs() {
  local pid
  for pid in $(processes_with 'SLURM_JOB_ID=.*'); do
    kill -9 "$pid" 2>/dev/null || true
  done
}

stop() {
  [[ -f $SLURM_CONF ]] || return 0
  if is_alive "$directory/slurmctld.pid"; then
    scancel --user="$(id -un)" 2>/dev/null || true
    for _ in {1..20}; do
      [[ -z $(squeue --noheader 2>/dev/null) ]] && break
      sleep 0.5
    done
    scancel --signal=KILL --full --user="$(id -un)" 2>/dev/null || true
  fi
  for name in slurmd-n1.pid slurmd-n2.pid slurmctld.pid munge/pid; do
    end_process "$directory/$name"
  done
  kill_jobs
}

case $action in
  start) start ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  status) sinfo && squeue ;;
  kill-node) kill_node ;;
  start-node) start_node "$node" ;;
  stop) stop ;;
  *) sed -n '2,12s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
