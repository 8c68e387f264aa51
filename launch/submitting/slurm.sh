#!/bin/bash
# Made by launch/submit.py from launch/submitting/slurm.sh. For a script of your own copy that file, change it, and name it with
# template=FILE. Names in double braces are filled in; all of them are listed in docs/slurm.md.
#SBATCH --job-name={{name}}
#SBATCH --nodes={{nodes}}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={{gpus_per_node}}
#SBATCH --chdir={{here}}
#SBATCH --output={{log}}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@{{warn}}
{{sbatch}}

# ---- The run
{{seeds}}
RUN={{run}}
TRAIN=({{command}})
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}

# ---- The environment of the ranks
{{setup}}
# srun of SLURM 22.05 and later does not take --cpus-per-task from the job: data workers would share one core.
[ -n "${SLURM_CPUS_PER_TASK:-}" ] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# torchrun sets it and prints eight lines about it; run.threads says what a rank has.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Without it the reason of a failed connection is only "unhandled system error".
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# A link may be silent for 4 microseconds x 2^22 = 17 s before a send counts as lost, instead of 4 s (20): switches that reroute take longer.
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
# A rank that hangs inside CUDA ends this long after the collective that it hangs in was given up; torch waits for 480 s.
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=${TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC:-120}
# torchrun of torch 2.12 and later kills ranks this long after SIGTERM; without it, and before, after 30 s, though a checkpoint is being saved.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-{{warn}}}
# NCCL takes any interface that is up. Where nodes have some that lead nowhere, name the right one:
# export NCCL_SOCKET_IFNAME=eth0

# ---- One agent of torchrun on each node
# The script runs on the first node, where the agents meet. Jobs that share it have ports of their own.
export MEET=$(hostname):$((20000 + SLURM_JOB_ID % 10000))
# Another name for each start: an agent that is left over of the one before must not be met.
export MEETING=$JOB-${SLURM_RESTART_COUNT:-0}
# is_host: torchrun would compare host names, which may be long on one side and short on the other.
AGENT='[ "$SLURM_NODEID" = 0 ] && first=true || first=false
exec "$0" -m torch.distributed.run --nnodes="$SLURM_NNODES" --nproc-per-node={{gpus_per_node}} --max-restarts={{restarts}} \
    --rdzv-backend=c10d --rdzv-id="$MEETING" --rdzv-endpoint="$MEET" --rdzv-conf="is_host=$first,join_timeout=300" "$@"'
# kill-on-bad-exit: without an agent the others would wait for it. cpu-bind: data workers use all cores of the job.
SRUN=(srun --kill-on-bad-exit=1 --cpu-bind=none {{srun}})

# ---- Ask the run to stop
# USR1: the time limit is near, or a job of a higher partition wants the nodes. TERM: SLURM ends this job (scancel, requeue, the limit).
warned='' ended='' asking=''
trap 'warned=1' USR1
trap 'ended=1' TERM

ask_to_stop() {
    # Again and again: a run that is only beginning takes away the file of a start before it.
    for ((second = 1; ; second++)); do
        : >"$RUN/stop"
        # A run between two phases does not look for the file. All is saved then, and a signal ends it.
        [ "$second" = $(({{warn}} / 2)) ] && scancel --signal=TERM "$SLURM_JOB_ID"
        # What has not ended by now would be ended by SLURM at the limit, and the job not requeued. srun ends its step on TERM.
        [ "$second" = $(({{warn}} * 5 / 6)) ] && kill "$step"
        sleep 1
    done
}

"${SRUN[@]}" {{container}} bash -c "$AGENT" {{python}} "${TRAIN[@]}" &
step=$!
# A signal ends the waiting too.
while wait "$step"; code=$?; kill -0 "$step" 2>/dev/null; do
    [ -n "$asking" ] || { ask_to_stop & asking=$!; }
done
if [ -n "$asking" ]; then
    kill "$asking"
    wait "$asking" 2>/dev/null
    rm -f "$RUN/stop"
fi

# ---- What comes next
say() { echo "$(date '+%F %T') job $JOB: $*"; }
# torchrun turns all codes into 1: the run's folder has the one of the run. A line of status.json is one value.
field() { sed -n "s/^ \"$1\": \"\{0,1\}\([^\",]*\).*/\1/p" "$RUN/status.json" 2>/dev/null; }
stopped_after_step() { grep -q '^ "cause": ".*, which is saved",$' "$RUN/status.json"; }

if [ -n "$ended" ]; then
    # After scancel it must not come back, and what SLURM has preempted or requeued it starts again by itself.
    say "ended by SLURM"
    exit 1
fi
# A start has the name under which its agents meet. Another run that works in the folder writes there too.
case $(field start) in
"$MEETING"/*) ;;
*)
    say "the run has not begun (srun ended with $code): the lines above say why; not requeued"
    exit 1
    ;;
esac
case $(field code) in
0)
    say "done"
    exit 0
    ;;
2 | 93)
    say "not requeued: see $RUN/status.json"
    exit "$(field code)"
    ;;
75)
    # Who touches the file, or sends a signal, wants the run to end. SLURM says whether it was its own signal. With a node gone srun
    # fails and sends SIGTERM to the others, whose ranks have stopped too if no step was left to end and to save.
    if [ "$(field state)" = stopped ] && [ -z "$warned" ] && { [ "$code" = 0 ] || stopped_after_step; } &&
        scontrol show job -o "$JOB" | grep -q ' PreemptTime=None '; then
        say "stopped by hand: not requeued; go on with: scontrol requeue $JOB"
        exit 75
    fi
    ;;
esac
# Stopped in time, a hang, a rank or a node that is gone. A run that makes no progress ends itself with 93.
say "requeued"
if scontrol requeue "$JOB"; then
    # SLURM ends this script by SIGTERM, which bash sees to only while it waits.
    sleep 300 &
    wait $!
    exit 75
fi
say "SLURM did not requeue it: submit it again"
exit 75
