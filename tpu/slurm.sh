#!/usr/bin/env bash
# One run on nodes of a Slurm cluster, here two with eight GPUs each. From the root of a clone
# on a disk that all nodes share, with .venv, made by pip install -c constraints.txt -e ".[cuda]":
#
#   sbatch tpu/slurm.sh --config configs/llama3_8b.yaml
#
# JAX finds the other processes through Slurm. Five minutes before the time is up every process gets SIGTERM, saves and ends with 75; the
# job is then queued again and continues. Cancelling sends SIGTERM too, and does not queue it again.
#
# The nodes are taken whole: without --exclusive and --mem=0 a job has the cluster's default of CPUs and memory, often one CPU a task.
#SBATCH --job-name=pe-rlhf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=pe-rlhf-%j.log
set -euo pipefail
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu} # without its GPU the run fails, rather than training on the CPU; tpu,cpu on TPUs

code=0
# --kill-on-bad-exit=0: the others are to save, or to say whom they lost, rather than to be killed.
# --cpus-per-task: from Slurm 22.05 on srun takes no number of CPUs over from sbatch; the nodes are alike, each task has all of its own.
srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_ON_NODE" .venv/bin/pe-rlhf "$@" || code=$?
if ((code == 75)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
