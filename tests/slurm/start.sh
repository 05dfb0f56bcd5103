#!/usr/bin/env bash
# A real Slurm for the tests, on this one machine: a controller and two nodes, n1 and n2, over
# loopback, with accounting and the pretended size of the nodes that slurm_speedrun.sbatch asks for.
# As root.
#
#   bash tests/slurm/start.sh      # installs Debian's packages where they are missing, starts what
#   bash tests/slurm/stop.sh       # does not run; again at any time
#
# Everything lives in $SLURM_TEST_FOLDER (default /tmp/speedrun-slurm); in a shell:
# . $SLURM_TEST_FOLDER/env. One line of the hosts file, for the nodes' names, is the only trace
# outside of it, and stop.sh takes it out again.
set -euo pipefail
folder=${SLURM_TEST_FOLDER:-/tmp/speedrun-slurm}
port=${SLURM_TEST_PORT:-17900}
export PATH=$PATH:/usr/sbin:/sbin
export TMPDIR=$folder/sql  # the daemons run as users of their own
cannot() { echo "no Slurm here: $1" >&2; exit 77; }  # 77: the tests are skipped, but not in CI
trap 'echo "tests/slurm/start.sh: line $LINENO failed: $BASH_COMMAND" >&2' ERR
[ "$(id -u)" -eq 0 ] || cannot "only root can start one"

packages=(munge slurmctld slurmd slurm-client slurmdbd mariadb-server)
install() {
    apt-get update -qq || true
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        -o DPkg::Lock::Timeout=120 "${packages[@]}"
}
installed=$(dpkg-query -W -f '${db:Status-Status}\n' "${packages[@]}" 2>/dev/null |
    grep -c '^installed$' || true)
if [ "$installed" -ne ${#packages[@]} ]; then
    command -v apt-get > /dev/null || cannot "its packages are installed with apt-get"
    made=""
    if [ ! -e /usr/sbin/policy-rc.d ]; then  # no services of the packages' own
        printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
        chmod +x /usr/sbin/policy-rc.d
        made=1
    fi
    code=0
    install < /dev/null > /tmp/apt-slurm.log 2>&1 || code=$?
    [ -z "$made" ] || rm -f /usr/sbin/policy-rc.d
    if [ "$code" -ne 0 ]; then
        tail -n 5 /tmp/apt-slurm.log >&2
        cannot "apt-get could not install ${packages[*]}"
    fi
fi

mkdir -p "$folder"/{log,run,state,spool,sql,gpu}
touch "$folder"/gpu/gpu{0..7}
chmod 755 "$folder"
setpriv --reuid=mysql --clear-groups test -x "$folder" ||
    cannot "the user mysql cannot enter $folder: set SLURM_TEST_FOLDER to a folder that all can"
host=$(uname -n)
host=${host%%.*}
here() { getent ahostsv4 "$1" | grep -q '^127\.'; }  # a name server's n1 is another machine
name_nodes() {
    here n1 || echo "127.0.0.1 n1 n2 # speedrun-slurm" >> /etc/hosts
    getent ahostsv4 "$host" > /dev/null || echo "127.0.0.1 $host # speedrun-slurm" >> /etc/hosts
}
name_nodes || cannot "/etc/hosts cannot be written"
here n1 && here n2 || cannot "n1 and n2 do not lead to this machine: see /etc/hosts, nsswitch.conf"

# Short times: a requeued job waits for cred_expire (less than 5 counts as 120), a lost node is
# noticed after SlurmdTimeout. Without cgroups, for containers.
cat > "$folder/slurm.conf" <<CONF
ClusterName=speedrun
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/run/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
SlurmdParameters=config_overrides
KillWait=20
SlurmdTimeout=15
SlurmctldTimeout=10
MessageTimeout=10
ReturnToService=2
MinJobAge=3600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((port + 1))
AccountingStoragePass=$folder/run/munge.socket
GresTypes=gpu
NodeName=DEFAULT CPUs=64 RealMemory=16000 Gres=gpu:8
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 11))
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 12))
PartitionName=main Nodes=n1,n2 Default=YES PriorityTier=1
PartitionName=urgent Nodes=n1,n2 PriorityTier=9 PreemptMode=OFF
CONF
echo "NodeName=n[1-2] Name=gpu File=$folder/gpu/gpu[0-7]" > "$folder/gres.conf"
[ -s "$folder/password" ] ||
    (umask 077; od -An -N12 -tx1 /dev/urandom | tr -d ' \n' > "$folder/password")
(umask 077; cat > "$folder/slurmdbd.conf" <<CONF
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$((port + 1))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/run/munge.socket
PidFile=$folder/run/slurmdbd.pid
LogFile=$folder/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((port + 2))
StorageUser=slurm
StoragePass=$(cat "$folder/password")
StorageLoc=slurm_accounting
CONF
)
printf 'export SLURM_CONF=%s PATH=$PATH:/usr/sbin:/sbin\n' "$folder/slurm.conf" > "$folder/env"
. "$folder/env"

runs() {  # runs NAME FILE: the process whose number is in FILE runs, as NAME and no zombie
    local pid
    pid=$(cat "$folder/run/$2.pid" 2>/dev/null) || return 1
    [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ] && ! grep -q '^State:.Z' "/proc/$pid/status"
}
until_true() {  # until_true WHAT COMMAND...: tries for 40 s
    local what=$1 end=$((SECONDS + 40))
    shift
    until "$@" > /dev/null 2>&1; do
        if [ $SECONDS -ge $end ]; then
            tail -n 5 "$folder"/log/*.log >&2
            cannot "$what"
        fi
        sleep 0.2
    done
}
begin() {  # begin NAME FILE ARGUMENTS...: starts the daemon NAME unless it runs
    local name=$1 file=$2
    shift 2
    if runs "$name" "$file"; then return; fi
    rm -f "$folder/run/$file.pid"
    if ! "$name" "$@" < /dev/null > "$folder/log/$file.out" 2>&1; then
        cat "$folder/log/$file.out" >&2
        cannot "$name did not start"
    fi
}

[ -s "$folder/munge.key" ] || (umask 077; head -c 64 /dev/urandom > "$folder/munge.key")
begin munged munged --force --key-file="$folder/munge.key" --socket="$folder/run/munge.socket" \
    --pid-file="$folder/run/munged.pid" --log-file="$folder/log/munged.log" \
    --seed-file="$folder/run/munge.seed"
until_true "munged does not answer" munge -n -S "$folder/run/munge.socket"

if ! runs mariadbd mariadbd; then
    sql_flags=(--no-defaults --user=mysql --datadir="$folder/sql/data" --tmpdir="$folder/sql")
    chown mysql "$folder/sql"
    if [ ! -d "$folder/sql/data/mysql" ]; then
        mariadb-install-db "${sql_flags[@]}" --auth-root-authentication-method=socket \
            > "$folder/log/sql.log" 2>&1 || cannot "mariadb-install-db failed: $folder/log/sql.log"
    fi
    setsid mariadbd "${sql_flags[@]}" --socket="$folder/sql/socket" --bind-address=127.0.0.1 \
        --port=$((port + 2)) --innodb-buffer-pool-size=64M \
        < /dev/null > "$folder/log/mariadbd.log" 2>&1 &
    echo $! > "$folder/run/mariadbd.pid"
fi
sql() { mariadb --no-defaults -u root -S "$folder/sql/socket" -e "$1"; }
until_true "mariadbd does not answer" sql "select 1"
sql "create database if not exists slurm_accounting"
for user in "slurm@'127.0.0.1'" slurm@localhost; do
    sql "create user if not exists $user identified by '$(cat "$folder/password")'"
    sql "grant all on slurm_accounting.* to $user"
done

begin slurmdbd slurmdbd
until_true "slurmdbd does not answer" sacctmgr -n list cluster
if [ -z "$(sacctmgr -nP list cluster speedrun format=cluster)" ]; then
    sacctmgr -i add cluster speedrun > /dev/null
fi
begin slurmctld slurmctld
for node in n1 n2; do
    mkdir -p "$folder/spool/$node"
    begin slurmd slurmd.$node -N $node
done
ready() {
    [ "$(sinfo -h -N -p main -o %T | grep -cxE 'idle|mixed|allocated|completing')" -eq 2 ]
}
until_true "the nodes did not come up" ready
echo "Slurm runs in $folder"
