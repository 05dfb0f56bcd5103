#!/usr/bin/env bash
# The whole pipeline, from nothing to a ChatGPT of your own and its report. See --help.
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1
if [ -z "${NANOCHAT_SLURM:-}" ] && [ -f site.env ]; then . ./site.env; fi  # the same state folder as the job's; a job has read it already
set -euo pipefail

usage() {
    cat <<'HELP'
bash speedrun.sh [flags] [-- --key=value ...]      all phases in order; run it again at any time: what is done is skipped

  phases: data tok base base-eval mid mid-eval sft sft-eval rl rl-eval report
  --skip-PHASE       do not run it (--skip-tok, --skip-base, ...); later phases use what it made earlier
                     (--skip-trial: not try all training phases to come, at their real shapes, before the first of them)
  --from=PHASE       skip what comes before PHASE
  --only=PHASE[,..]  run only these (setup: only make .venv)
  --data=NAME        toy (default: needs no download), fineweb_edu, climbmix, or a folder of .parquet, .jsonl(.gz), .txt
  --depth=N          layers of the model (toy: 4, else 20)
  --nproc=N          processes on this machine (default: the GPUs visible, or 1)
  --dry-run          print the commands and do nothing
  -- --key=value     settings for every phase that has them, e.g. -- --device_batch_size=8 --time_limit=60;
                     for one phase alone: -- --rl.num_steps=100 --sft.mixture=smoltalk,gsm8k

  state goes to $NANOCHAT_BASE_DIR (default ~/.cache/nanochat)
  exit codes: 0 done, 2 bad settings or missing inputs, 75 interrupted but saved: run the same command again, else a failure
HELP
}

bad() { echo "error: $1 (bash speedrun.sh --help)" >&2; exit 2; }

PHASES=(data tok base base-eval mid mid-eval sft sft-eval rl rl-eval report)
data=toy depth="" nproc="" from="" only="" dry="" skip=" " rest=()
while [ $# -gt 0 ]; do
    case "$1" in
        --help|-h) usage; exit 0 ;;
        --skip-*) skip+="${1#--skip-} "; [[ " trial ${PHASES[*]} " == *" ${1#--skip-} "* ]] || bad "no such phase: ${1#--skip-}" ;;
        --from=*) from="${1#*=}"; [[ " ${PHASES[*]} " == *" $from "* ]] || bad "no such phase: $from" ;;
        --only=*) only="${1#*=}"
                  for p in ${only//,/ }; do [[ " setup ${PHASES[*]} " == *" $p "* ]] || bad "no such phase: $p"; done ;;
        --data=*) data="${1#*=}" ;;
        --depth=*) depth="${1#*=}" ;;
        --nproc=*) nproc="${1#*=}" ;;
        --dry-run) dry=1 ;;
        --) shift; rest=("$@"); break ;;
        *) bad "unknown flag: $1" ;;
    esac
    shift
done
[ -n "$data" ] || bad "--data is empty"
[[ "$depth" =~ ^([1-9][0-9]?)?$ ]] || bad "--depth takes a whole number from 1 to 99, not '$depth'"
[[ "$nproc" =~ ^([1-9][0-9]*)?$ ]] || bad "--nproc takes a whole number, not '$nproc'"

child="" asked=""
stop() {  # a signal to this script asks the phase to save and stop; torchrun itself must not get it: it would kill its workers
    asked=1
    [ -n "$child" ] || return 0
    case "${command[0]}" in
        srun) kill -USR1 "$child" 2>/dev/null || true ;;  # srun passes it on to all processes on all nodes
        torchrun) pkill -TERM -P "$child" 2>/dev/null || true ;;
        *) kill -TERM "$child" 2>/dev/null || true ;;  # not its children: a sandbox that dies is an answer that counts as wrong
    esac
}
told=""
trap 'told=1; stop' TERM
trap stop INT USR1

run=()  # the phases to run
started=""
for p in "${PHASES[@]}"; do
    [ -z "$from" ] || [ "$p" != "$from" ] || started=1
    [ -z "$from" ] || [ -n "$started" ] || continue
    [[ "$skip" != *" $p "* ]] || continue
    [ -z "$only" ] || [[ ",$only," == *",$p,"* ]] || continue
    run+=("$p")
done
[ ${#run[@]} -gt 0 ] || [ "$only" = setup ] || bad "these flags leave nothing to run"

. ./setup_venv.sh
if [ -n "$dry" ]; then PATH="$PWD/.venv/bin:$PATH"; else setup_venv requirements.txt; fi
[ "$only" != setup ] || exit 0
python=$([ -x .venv/bin/python ] && echo python || echo python3)
[ -n "$nproc" ] || nproc=${NANOCHAT_SLURM:+${SLURM_GPUS_ON_NODE:-1}}
[ -n "$nproc" ] || nproc=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
[ "${nproc:-0}" -ge 1 ] || nproc=1
depth=${depth:-$([ "$data" = toy ] && echo 4 || echo 20)}
tag=d$depth

# What the toy world is trained with: about 20 minutes on two CPU cores. Every other data set uses the scripts' defaults.
toy() { [ "$data" != toy ] || echo "$*"; }
args() {
    local rates="--matrix_lr=0.08 --embedding_lr=0.6 --unembedding_lr=0.016"
    case "$1" in
        data)      echo "--depth=$depth --phases=$([ "${run[*]}" = data ] || (IFS=,; echo "${run[*]}"))" ;;  # alone: what all phases read
        tok)       toy --vocab_size=2048 ;;
        base)      echo "--depth=$depth"; toy --max_seq_len=256 --total_batch_size=8192 --num_steps=1000 --eval_every=250 --eval_tokens=200000 --matrix_lr=0.12 --embedding_lr=1.8 --unembedding_lr=0.024 ;;
        base-eval) echo "--tag=$tag"; toy --eval_tokens=200000 ;;
        mid)       echo "--tag=$tag"; toy --mixture=smoltalk,mmlu_aux:2500,arc_easy:800,arc_challenge:800,gsm8k,identity,simplespelling:800,spellingbee:4500 --eval_every=0 --eval_tokens=100000 $rates ;;
        sft)       echo "--tag=$tag"; toy --mixture=smoltalk:6000,mmlu_aux:1200,arc_easy:600,arc_challenge:600,gsm8k:1200,identity,simplespelling:200,spellingbee:1500 --lr_fraction=0.3 --eval_every=0 --eval_tokens=100000 $rates ;;
        rl)        echo "--tag=$tag"; toy --lr_fraction=0.02 --num_steps=40 --max_new_tokens=64 --device_batch_size=32 --rollout_rows=256 --eval_every=0 $rates ;;
        trial)     echo "--depth=$depth --phases=$training" ;;
        report)    echo "--tag=$tag" ;;
        *-eval)    echo "--tag=$tag --source=${1%-eval}"; toy --max_new_tokens=96 --rows=128 ;;
    esac
}
script() {
    case "$1" in
        data) echo prepare_data.py ;; tok) echo tok_train.py ;; base) echo base_train.py ;; base-eval) echo base_eval.py ;;
        mid) echo mid_train.py ;; sft) echo chat_sft.py ;; rl) echo chat_rl.py ;; *-eval) echo chat_eval.py ;; trial) echo trial.py ;; report) echo report.py ;;
    esac
}
slurm_launcher() {  # one task a node; torchrun ignores the signals that Slurm sends to all processes of a step: its workers save and stop by themselves
    local port=$((12000 + (SLURM_JOB_ID * 97 + ${SLURM_RESTART_COUNT:-0} * 13 + ++launches) % 20000))  # a dead run may still hold the one before
    launcher=(python)
    [ -n "${1:-}" ] || [ $((nproc * SLURM_NNODES)) -eq 1 ] || launcher=(torchrun "--nnodes=$SLURM_NNODES" "--nproc_per_node=$nproc" --signals-to-handle=SIGQUIT --node_rank=NODE
        "--master_addr=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)" "--master_port=$port")
    # shellcheck disable=SC2016  # $SLURM_NODEID is each node's own
    launcher=(srun --ntasks-per-node=1 "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1
        bash -c 'trap "" USR1 TERM; exec "${@/#--node_rank=NODE/--node_rank=$SLURM_NODEID}"' node "${launcher[@]}")
}
launches=0
command_of() {  # fills the array `command` for a phase; data, tok and report are single processes, the others run on all
    local mine=() launcher=("$python") accepted=""
    [ ${#rest[@]} -eq 0 ] || accepted=$("$python" configurator.py accepted "$1" "$(script "$1")" "${rest[@]}")
    [ -z "$accepted" ] || mapfile -t mine <<< "$accepted"
    [ "$1" != trial ] || mine=("${rest[@]}")  # it knows the settings of all phases
    case "$1" in data|tok|report) ;; *) [ "$nproc" -eq 1 ] || launcher=(torchrun --standalone "--nproc_per_node=$nproc" --signals-to-handle=SIGQUIT); [ -z "${NANOCHAT_SLURM:-}" ] || slurm_launcher ;; esac
    # shellcheck disable=SC2207  # the settings hold no spaces
    set -f  # the * of a mixture is no pattern
    work=("$(script "$1")" "--data=$data" $(args "$1") "${mine[@]}")
    set +f
    command=("${launcher[@]}" "${work[@]}")
}

[ ${#rest[@]} -eq 0 ] || "$python" configurator.py check "${rest[@]}"
if [ -n "$dry" ]; then
    for p in "${run[@]}"; do command_of "$p"; echo "${command[*]}"; done
    exit 0
fi

# What a phase builds on and this run does not make must be there, whole, before anything starts.
parent() { case "$1" in base) echo tok ;; mid|base-eval) echo base ;; sft|mid-eval) echo mid ;; rl|sft-eval) echo sft ;; rl-eval) echo rl ;; esac; }
for p in "${run[@]}"; do
    needed=$(parent "$p")
    [ -n "$needed" ] && [[ " ${run[*]} " != *" $needed "* ]] || continue
    "$python" checkpoint.py "$needed" "$data" "$([ "$needed" = tok ] || echo "$tag")"
done

export NANOCHAT_OUTCOME
if [ -z "${NANOCHAT_SLURM:-}" ]; then NANOCHAT_OUTCOME=$(mktemp); else
    NANOCHAT_OUTCOME=$("$python" -c 'import common; common.base_dir().mkdir(parents=True, exist_ok=True); print(common.base_dir())')/outcome-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}  # seen by all nodes; an earlier run has its own
    true > "$NANOCHAT_OUTCOME"
fi
trap 'rm -f "$NANOCHAT_OUTCOME"' EXIT

ready=(preflight.py "--data=$data" "--depth=$depth" "--nproc=$nproc")
# A run that cannot succeed fails in its first minute, a job also where it is to bring data: only the toy world is made in the job itself.
if [[ " ${run[*]} " != *" data "* && "${run[*]}" != report ]] || [ "${NANOCHAT_SLURM:+$data}" != "${NANOCHAT_SLURM:+toy}" ]; then
    command_of data
    "${command[@]}" --check=True
fi
if [ -n "${NANOCHAT_SLURM:-}" ]; then
    slurm_launcher python
    "${launcher[@]}" "${ready[@]}" < /dev/null
fi
training=$(printf '%s\n' "${run[@]}" | grep -xE 'base|mid|sft|rl' | paste -sd, || true)
mapfile -t steps < <(for p in "${run[@]}"; do [ "$p" != "${training%%,*}" ] || [[ "$skip" == *" trial "* ]] || echo trial; echo "$p"; done)  # tried before the first training

done_already() {  # $1: a phase that its record calls done verifies that in one process here, sooner than processes on all nodes have met
    local p said
    [ "${command[0]}" != "$python" ] || return 1
    for p in $([ "$1" = trial ] && echo "${training//,/ }" || echo "$1"); do
        [ "$("$python" -c 'import sys, common, status; print(status.unit(common.data_root(sys.argv[1]), *sys.argv[2:])[0])' "$data" "$p" "$tag")" = done ] || return 1
    done
    said=$(NANOCHAT_ASK=1 "$python" "${work[@]}" 2>/dev/null) && echo "$said"
}

unless_given_up() {  # where this run of the job has lost its node to Slurm's knowledge it lives on, while the next is there already
    local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}  # the number of an array's last element stands for all of them
    [ -n "${NANOCHAT_SLURM:-}" ] && [[ "$(scontrol show job -o "${job:-$SLURM_JOB_ID}" 2>/dev/null)" =~ \ Restarts=([0-9]+) ]] && [ "${BASH_REMATCH[1]}" != "${SLURM_RESTART_COUNT:-0}" ] || return 0
    echo "Slurm has given this run up and started another: going no further"
    exit 1
}

failed_evals=()
finish() {  # $1: exit code, $2: the last line
    echo
    "$python" status.py "--data=$data" || true
    [ -z "${NANOCHAT_SLURM:-}" ] || "$python" "${ready[@]}" "--ended=$([ "$told$1" = 175 ] && echo 143 || echo "$1")" || exit 1  # the guard against runs without progress
    echo "$2"
    exit "$1"
}
for p in "${steps[@]}"; do
    unless_given_up
    command_of "$p"
    [ -z "$asked" ] || finish 75 "stopped before $p with everything saved: run the same command again"
    echo
    echo "=== $p: $([ "${command[0]}" != srun ] && echo "${command[*]}" || echo "${work[*]} on $SLURM_NNODES x $nproc processes")"
    true > "$NANOCHAT_OUTCOME"
    ! done_already "$p" || continue
    "${command[@]}" < /dev/null &
    child=$!
    [ -z "$asked" ] || stop  # a signal that came since
    while :; do
        code=0
        wait "$child" || code=$?
        kill -0 "$child" 2>/dev/null || break
        # the wait was broken by a signal, and the phase is still saving; it is told again, in case it was not yet listening
        while kill -0 "$child" 2>/dev/null; do sleep 3 & wait -n "$child" $! || true; stop; done
    done
    child=""
    # torchrun turns every code into 1, so a phase leaves its own in a file: what stands there also holds where a signal hit it after its end
    recorded=$(sed -n 's/^{"code": \([0-9]*\),.*/\1/p' "$NANOCHAT_OUTCOME" 2>/dev/null || true)
    code=${recorded:-$code}
    case "$code" in 130|138|143) code=75 ;; esac  # INT, USR1, TERM before its handlers stood: it had not begun
    [ -z "$asked" ] || [ "$code" -ne 0 ] || code=75
    [ "$code" -ne 0 ] || continue
    [ "$code" -eq 75 ] || unless_given_up
    if [ "$code" -eq 75 ]; then
        finish 75 "stopped in $p with everything saved: run the same command again"
    elif [[ "$p" == *-eval || "$p" = report ]]; then
        echo "$p failed with code $code; going on, since the models do not depend on it" >&2
        failed_evals+=("$p")
    else
        [[ "$p" = @(data|tok|trial) ]] || [[ " ${run[*]} " != *" report "* ]] || "$python" report.py "--data=$data" || true
        finish "$code" "$p failed with code $code; mend what it says above and run the same command again: what is done stays done"
    fi
done
[ ${#failed_evals[@]} -eq 0 ] || finish 1 "done, but these failed: ${failed_evals[*]}; run the same command again"
finish 0 "all done; talk to it: $python chat_cli.py"
