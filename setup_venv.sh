# Sourced by speedrun.sh and tests/run.sh: makes .venv from the requirements file $1 unless it
# matches already, and puts it first in PATH. Inside a Slurm job (compute nodes have no internet,
# and many jobs may share the folder) or with NANOCHAT_OFFLINE nothing is installed.
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
    echo "error: bash 4.4 or newer is needed, this is $BASH_VERSION: install one and start it by" \
         "its path" >&2
    exit 2
fi
# Which Python is first in PATH counts only until .venv is there: that one may differ on a node.
python_of_venv=python3
if .venv/bin/python -c "" 2>/dev/null; then
    python_of_venv=$PWD/.venv/bin/python
elif [ -n "${SLURM_JOB_ID:-}" ] && [ -e .venv/matches ]; then
    echo "error: .venv was made with $(readlink -f .venv/bin/python || readlink .venv/bin/python)," \
         "which does not run on $(uname -n): load the same Python here (module load, in site.env)," \
         "or make .venv anew with one that all nodes have: rm -r .venv; bash speedrun.sh" \
         "--only=setup" >&2
    exit 2
fi
if ! "$python_of_venv" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: Python 3.11 or newer is needed and python3 is" \
         "$(python3 --version 2>/dev/null || echo missing): put a newer one first in PATH (under" \
         "Slurm: module load, in site.env)" >&2
    exit 2
fi
setup_venv() {
    local minor sum version
    if [ -n "${NANOCHAT_CONTAINER:-}" ]; then  # nothing is installed: it has what is needed, or not
        if ! "$python_of_venv" -c 'import os, shlex, sys
words = [*shlex.split(os.environ["NANOCHAT_CONTAINER"]), *sys.argv[1:]]
os.execvp(words[0], words)' python -c "import sys, torch, tiktoken, numpy, requests, pyarrow
assert sys.version_info >= (3, 11), sys.version"; then
            echo "error: Python 3.11 and the packages of requirements.txt are not to be had behind" \
                 "NANOCHAT_CONTAINER ($NANOCHAT_CONTAINER): install them in the image" >&2
            exit 2
        fi
        return
    fi
    # the Python by its first two numbers: a node may have a newer third one under the same path
    minor="$("$python_of_venv" -c 'import sys; print("Python %d.%d" % sys.version_info[:2])')"
    sum=$(cat requirements.txt "$1" | cksum)
    if [ "$python_of_venv" = python3 ] ||
        ! grep -qxE "$minor(\.[^ ]*)? $sum" .venv/matches 2>/dev/null; then
        if [ -n "${SLURM_JOB_ID:-}" ] || [ "${NANOCHAT_OFFLINE:-0}" != 0 ]; then
            echo "error: .venv does not match $1 and nothing is installed inside a job or with" \
                 "NANOCHAT_OFFLINE; on the login node, where there is internet, run:" \
                 "bash speedrun.sh --only=setup" >&2
            exit 2
        fi
        echo "installing $1 into .venv (once; torch alone is a few hundred MB)"
        [ -e .venv/bin/python ] || rm -f .venv/bin/python*  # links to a Python that is gone
        # one whose creation was killed, or that another tool has made, may be without pip
        .venv/bin/python -m pip --version &>/dev/null ||
            .venv/bin/python -m ensurepip &>/dev/null || python3 -m venv .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1"
        # every requirements file includes requirements.txt
        version=$(.venv/bin/python --version)
        echo "$version $sum" > .venv/matches  # and no more what was installed before
        echo "$version $(cat requirements.txt requirements.txt | cksum)" >> .venv/matches
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}
