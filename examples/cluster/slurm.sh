#!/bin/bash
# Two nodes of eight GPUs under Slurm:   sbatch examples/cluster/slurm.sh grpo run.yaml
#
# One launcher (torchrun) per node, which starts a process for each GPU. This script is sent SIGUSR1 five minutes before
# the time is up: the ranks save after the step they are in, the job is queued again, and goes on from that checkpoint.
# A job that is cancelled saves as well, and is not queued again.
#SBATCH --job-name=fastalign
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=fastalign-%j.log

METHOD=${1:?usage: sbatch slurm.sh METHOD run.yaml [settings]}
CONFIG=$(realpath "${2:?usage: sbatch slurm.sh METHOD run.yaml [settings]}")
shift 2

export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / 8))
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240  # seconds in which the ranks may save, where 30 is the default
# Name the network of the nodes when NCCL does not find it (`ip addr`), and look at what it chose:
# export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5 NCCL_DEBUG=INFO

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" \
    -m fastalign "$METHOD" --config "$CONFIG" --run.resume true "$@" &
RANKS=$!

again() {
    scancel --signal=TERM "$SLURM_JOB_ID.0"  # to the launchers, which pass it on to the ranks
    wait "$RANKS"
    scontrol requeue "$SLURM_JOB_ID"
}
trap again USR1
wait "$RANKS"
