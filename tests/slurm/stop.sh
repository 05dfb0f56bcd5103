#!/usr/bin/env bash
# Stops the Slurm that start.sh started: its jobs, then its daemons, each by the number in its file.
set -uo pipefail
folder=${SLURM_TEST_FOLDER:-/tmp/speedrun-slurm}
[ -f "$folder/env" ] || exit 0
. "$folder/env"
timeout 10 scancel --user=root 2>/dev/null
timeout 10 scancel --full --signal=KILL --user=root 2>/dev/null
for _ in $(seq 100); do
    [ -n "$(timeout 5 squeue -h -o %A 2>/dev/null)" ] || break
    sleep 0.2
done
for name in slurmd.n1 slurmd.n2 slurmctld slurmdbd mariadbd munged; do
    pid=$(cat "$folder/run/$name.pid" 2>/dev/null) || continue
    [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "${name%.*}" ] || continue
    kill "$pid" 2>/dev/null
    for _ in $(seq 50); do
        grep -q '^State:.[^Z]' "/proc/$pid/status" 2>/dev/null || break
        sleep 0.2
    done
done
kept=$(grep -v '# speedrun-slurm$' /etc/hosts) && printf '%s\n' "$kept" > /etc/hosts
rm -rf "$folder"
