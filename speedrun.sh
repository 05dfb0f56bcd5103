#!/usr/bin/env bash
# The whole pipeline, from nothing to a ChatGPT of your own and its report: bash speedrun.sh --help
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1
from_where() {  # a relative state folder is meant from where it was given: here or in site.env
    case ${NANOCHAT_BASE_DIR:-/} in
        /* | "~"*) ;;
        *) export NANOCHAT_BASE_DIR="$1/$NANOCHAT_BASE_DIR" ;;
    esac
}
from_where "$here"
if [ -f site.env ]; then  # the same state folder on the login node and in a job
    # without the line ends, and the mark at the start, that Windows writes; exported all the same
    site=$(LC_ALL=C sed $'1s/^\xef\xbb\xbf//; s/\r$//' site.env)
    if ! bash -n <<< "$site"; then  # what bash does not read would leave the usual state folder
        echo "error: site.env is no bash: fix the line above" >&2
        exit 2
    fi
    set -a
    . <(echo "$site")
    set +a
fi
from_where "$PWD"
set -euo pipefail

usage() {
    cat <<'HELP'
bash speedrun.sh [flags] [-- --key=value ...]
All phases in their order; run it again at any time: what is done is skipped.

  phases: data tok base base-eval mid mid-eval sft sft-eval rl rl-eval report
  --skip-PHASE        do not run it (--skip-tok, --skip-base, ...); later phases use what it made
                      earlier (--skip-trial: no trial run before the first training)
  --from=PHASE        skip what comes before PHASE
  --only=PHASE[,..]   run only these (--only=setup, alone: only make .venv)
  --data=NAME         toy (default: needs no download), fineweb_edu, climbmix, or a folder of
                      .parquet, .jsonl, .jsonl.gz or .txt files
  --chats=FILE        your own conversations: a small model of --data that has learned them, in
                      minutes (config/own_*.py); it reads nothing else, so nothing else is measured
  --depth=N           layers of the model (toy and --chats: 2, else 20)
  --nproc=N           processes on this machine (default: one a GPU, 4 where there are 6; else 1)
  --dry-run           print the commands and do nothing
  --status            what is done, what died and why, what to run next (status.py)
  --rehearse          two minutes: a time limit, a kill, a continuation, the bits (rehearse.py)
  -- --key=value      settings for every phase that has them: -- --device_batch_size=8
                      for one phase alone: -- --rl.num_steps=100 --sft.mixture=smoltalk,gsm8k
                      to start one over (the old one is put aside): -- --sft.start_over=True

State goes to $NANOCHAT_BASE_DIR (default ~/.cache/nanochat). Exit codes: 0 done, 2 bad settings or
missing inputs, 75 interrupted but saved: run the same command again; anything else is a failure.
HELP
}

data=toy
chats=""
depth=""
dry_run=""
for flag; do
    case "$flag" in
        --help|-h) usage; exit 0 ;;
        --data=*) data=${flag#*=} ;;
        --chats=*) chats=${flag#*=} ;;
        --depth=*) depth=${flag#*=} ;;
        --dry-run) dry_run=1 ;;
        --) break ;;
    esac
done

. ./setup_venv.sh
others=()  # all flags but these two, which run something else
for flag; do
    case "$flag" in --status|--rehearse) ;; *) others+=("$flag") ;; esac
done
case " $* " in
    *" --status "*)  # behind a run's own flags: of them it needs the data set
        repo=$PWD
        cd "$here"
        asked=()
        for flag in "${others[@]}"; do
            case "$flag" in
                --) break ;;
                --depth=*|--nproc=*|--chats=*|--from=*|--only=*|--skip-*|--dry-run) ;;
                *) asked+=("$flag") ;;
            esac
        done
        exec "$python_of_venv" "$repo/status.py" "${asked[@]}" ;;
    *" --rehearse "*)
        setup_venv requirements.txt
        exec "$python_of_venv" rehearse.py "${others[@]}" ;;
esac
if [ "$*" = --only=setup ]; then
    setup_venv requirements.txt
    exit 0
fi

# What the toy world is trained with stands in config/toy_*.py, a small model of one's own texts and
# conversations in config/own_*.py, for every size of model; other data sets take the defaults of
# the scripts.
recipes=""
if [ "$data" = toy ]; then recipes=config/toy; fi
if [ -n "$chats" ]; then recipes=config/own; fi
recipe() { if [ -n "$recipes" ]; then echo "${recipes}_$1.py"; fi; }
if [ -n "$recipes" ]; then depth=${depth:-2}; else depth=${depth:-20}; fi
tag=d$depth

plan=()
run() {  # PHASE SCRIPT ARGUMENTS...: notes a phase
    plan+=(--run "$@")
}
run_public() {  # the same for one that reads public tasks
    if [ -z "$chats" ]; then run "$@"; fi
}

run data             prepare_data.py --depth="$depth"
run tok              tok_train.py    $(recipe tok)
run base             base_train.py   $(recipe base) --depth="$depth"
run_public base-eval base_eval.py    $(recipe base_eval) --tag="$tag"
run mid              mid_train.py    $(recipe mid) --tag="$tag"
run_public mid-eval  chat_eval.py    $(recipe chat_eval) --tag="$tag" --source=mid
run sft              chat_sft.py     $(recipe sft) --tag="$tag"
run_public sft-eval  chat_eval.py    $(recipe chat_eval) --tag="$tag" --source=sft
run_public rl        chat_rl.py      $(recipe rl) --tag="$tag"
run_public rl-eval   chat_eval.py    $(recipe chat_eval) --tag="$tag" --source=rl
run report           report.py       --tag="$tag"

repo=$PWD
cd "$here" || exit 1  # the user's own paths are as seen from there
if [ -z "$dry_run" ]; then
    if [ -z "${SLURM_JOB_ID:-}" ]; then  # what makes no sense is refused before pip begins
        "$python_of_venv" "$repo/launch.py" "$data" "$depth" "${plan[@]}" --given --dry-run "$@" \
            >/dev/null
    fi
    cd "$repo"
    setup_venv requirements.txt
    cd "$here"
fi
# The phases are started one after another by launch.py, which takes the place of this shell: a
# signal to this script is then one to it, and it passes it on.
exec "$python_of_venv" "$repo/launch.py" "$data" "$depth" "${plan[@]}" --given "$@"
