"""
What speedrun.sh's flags and settings ask for: which phases are to run, with which arguments, and by
which command each is started: python, torchrun, srun, in the site's container if it has one.
"""
import math
import os
import re
import shlex
import socket
from dataclasses import dataclass
from itertools import takewhile

import common
import configurator
import pipeline
import slurm
import status
import trial

HELP = "bash speedrun.sh --help"
FLAGS = {"--data=", "--depth=", "--nproc=", "--from=", "--only=", "--chats=", "--dry-run",
         "--skip-trial", "--slurm", "--check-inputs"}

@dataclass
class Plan:
    data: str
    tag: str
    nproc: int       # processes on a machine
    listed: dict     # {phase: [script, arguments]} of all phases
    names: list      # of those that are to run
    settings: list   # behind the --, for every phase that has them
    given: list      # speedrun.sh's own arguments
    in_slurm: bool

    def phases(self, *kinds):
        return [p for p in pipeline.PHASES if p.name in self.names and p.kind in kinds]

    def words(self, name):
        """The script of a phase and all its arguments."""
        own = configurator.accepted(pipeline.find_phase(name), self.settings)
        if name == "data":  # alone it brings what all phases of the run read
            readers = self.listed if {*self.names} <= {"data", "report"} else self.names
            own = [f"--phases={','.join(readers)}", *own]
        script, *words = self.listed[name]
        return [script, f"--data={self.data}", *words, *own]

    def input_check(self):
        """What starts a launcher that looks at the inputs of the same plan."""
        listed = [word for name, line in self.listed.items() for word in ("--run", name, *line)]
        slurm_flag = ["--slurm"] if self.in_slurm else []
        return ["launch.py", self.data, self.tag.removeprefix("d"), *listed,
                "--given", "--check-inputs", *slurm_flag, *self.given]

    def to_type(self, flags):
        """The command that a person types to run this with the flags."""
        if self.in_slurm:
            return shlex.join(slurm.sbatch_command(flags))
        return shlex.join(["bash", "speedrun.sh", *flags])

    def folder(self, name):
        return pipeline.state_path(name, self.data, self.tag)

    def lock_folder(self, name):
        """Where the lock of the process that writes the state of a phase is."""
        folder = self.folder(name)
        is_result = pipeline.find_phase(name).kind == "evaluation"
        return pipeline.lock_of_result(folder) if is_result else folder

    def is_done(self, name):
        state, _ = status.state_of(pipeline.find_phase(name), self.data, self.tag)
        return state in ("done", "stale")

def split_at(words, mark):
    """example: (["a", "-", "b", "c"], "-") -> [["a"], ["b", "c"]]"""
    parts = [[]]
    for word in words:
        if word == mark:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts

def check_number(flag, text, most):
    numbers = [str(n) for n in range(1, most + 1)]
    common.check(text in numbers, f"{flag} takes a whole number from 1 to {most}, not {text!r}")

def make_plan(words):
    """This script's arguments -> Plan. Failure (code 2) where a flag or setting makes no sense."""
    common.check("--given" in words, "launch.py is not started by hand", "bash speedrun.sh")
    at = words.index("--given")
    (data, depth), *lines = split_at(words[:at], "--run")
    listed = {name: line for name, *line in lines}
    given = words[at + 1:]
    end = given.index("--") if "--" in given else len(given)
    settings = given[end + 1:]
    flags = {}
    for word in given[:end]:
        key, equals, value = word.partition("=")
        flags[key + equals] = value

    others = flags.keys() - FLAGS
    unknown = [flag for flag in others if not flag.startswith("--skip-")]
    common.check(not unknown, f"unknown flag: {', '.join(sorted(unknown))} (write --depth=4; "
                 "settings of phases go behind --, as in: bash speedrun.sh -- --num_steps=3; "
                 f"{HELP} prints all flags)")
    skipped = {flag.removeprefix("--skip-") for flag in others}
    only = flags["--only="].split(",") if "--only=" in flags else listed
    first = flags.get("--from=", "data")
    for name in [*only, first, *skipped]:
        common.check(name != "setup", "setup is no phase: bash speedrun.sh --only=setup, alone")
        common.check(name in listed, f"no such phase: {name!r}; the phases are {' '.join(listed)}")
    names = list(listed)
    names = [n for n in names[names.index(first):] if n in only and n not in skipped]
    common.check(names, f"--from, --only and --skip-... leave nothing to run ({HELP})")
    common.check(data, "--data is empty: give toy, fineweb_edu, climbmix or a folder")
    check_number("--depth", flags.get("--depth=", depth), configurator.RANGES["depth"][1])
    in_slurm = "--slurm" in flags
    gpus = gpus_here(in_slurm, settings)
    usual = default_nproc(gpus)
    if int(usual) < gpus and not {"--nproc=", "--check-inputs"} & flags.keys():
        common.print0(f"{usual} of {gpus} GPUs are used, so that all can share a batch: "
                      f"--nproc={gpus} takes all, with a --total_batch_size that fits them")
    nproc = flags.get("--nproc=", usual)
    check_number("--nproc", nproc, 9999)
    common.check(not in_slurm or "SLURM_JOB_ID" in os.environ, "--slurm is for the job's own use: "
                 "sbatch slurm_speedrun.sbatch")
    configurator.check_arguments(settings)
    data = pipeline.whole_path(data)
    settings = [configurator.from_here(word) for word in settings]
    chats = os.path.abspath(os.path.expanduser(flags.get("--chats=", "")))
    whole = {"--data=": data, "--chats=": chats}
    flags_given = [key + whole.get(key, value) for key, value in flags.items()
                   if key not in ("--slurm", "--check-inputs")]
    given = [*flags_given, "--", *settings] if settings else flags_given
    if "--chats=" in flags:
        settings = [*lessons_of(chats, settings), *settings]
    return Plan(data, f"d{depth}", int(nproc), listed, names, settings, given, in_slurm)

def lessons_of(chats, given):
    """The settings by which midtraining and finetuning learn a file of conversations alone, and so
    often that a few of them are remembered: as 4 MB, a million tokens, of conversations are read
    once. What is measured is what is remembered, since nothing is held out. given: settings of the
    user's, which these leave as they are."""
    common.check(os.path.isfile(chats), f"--chats: there is no file {chats}")
    times = min(1000, math.ceil(4e6 / max(os.path.getsize(chats), 1)))
    usual = {"mixture": f"{chats}*{times}", "held_out": chats}
    given = {word.split("=")[0].replace("-", "_") for word in given}
    return [f"--{name}.{key}={value}" for name in ("mid", "sft") for key, value in usual.items()
            if f"__{key}" not in given]

def check_settings(plan):
    """What each phase would be started with -> {phase: its Settings}. Failure (code 2) where that
    makes no sense, before the first one begins."""
    status.check_folder(plan.data)
    found = {}
    for name in plan.names:
        script, *words = plan.words(name)
        found[name] = configurator.read(pipeline.REPO / script, words, of_phases=name == "data")
    return found

def start_over_command(plan, reason):
    """The whole command that starts the phase over of which a message says that it must; None where
    it says no such thing."""
    found = re.search(r"-- --(\S+)\.start_over=True", reason)
    if not found:
        return None
    name, (flags, *settings) = found[1], split_at(plan.given, "--")
    if name not in plan.names:
        flags = [f for f in flags if not f.startswith(("--from=", "--only=", "--skip-"))]
        flags.append(f"--from={name}")
    settings = settings[0] if settings else []
    return plan.to_type([*flags, "--", *settings, f"--{name}.start_over=True"])

def default_nproc(gpus):
    """As many processes as there are GPUs, but a power of two: the rows of a batch mostly are one,
    and all processes have to share them evenly.  examples: 8 -> "8";  6 -> "4";  0 -> "1" """
    return str(2 ** (max(gpus, 1).bit_length() - 1))

def gpus_here(in_slurm, settings=()):
    """How many GPUs this machine, or the job on each of its machines, has for a run with these
    settings."""
    if in_slurm:
        return int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    if "--device=cpu" in settings:
        return 0
    listed, visible = len(trial.gpu_names()), os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return listed
    # CUDA reads them up to the first that is none, such as -1
    names = takewhile(lambda name: re.match(r"\d|GPU-|MIG-", name.strip()), visible.split(","))
    return min(listed, len(list(names)))

def command_for(plan, name, words):
    """What starts a phase: python, torchrun for several ranks, srun in a Slurm job."""
    single = pipeline.find_phase(name).kind == "single"
    if plan.in_slurm and not single:
        return srun(plan, words)
    if plan.nproc == 1 or single:
        return pipeline.inside("python", *words)
    # torchrun must not hear of signals: it would kill its workers, which save by themselves
    return pipeline.inside("torchrun", "--standalone", f"--nproc_per_node={plan.nproc}",
                           "--signals-to-handle=SIGQUIT", *words)

def srun(plan, words, alone=False):
    """One task a node, which ignores the signals that Slurm sends to all processes of a step;
    torchrun's workers hear them. alone: one process a node."""
    node_count = int(os.environ["SLURM_NNODES"])
    start = "python"
    if not alone and plan.nproc * node_count > 1:
        start = (f"torchrun --nnodes={node_count} --nproc_per_node={plan.nproc} "
                 f"--signals-to-handle=SIGQUIT --node_rank=$SLURM_NODEID "
                 f"--master_addr={slurm.nodes()[0]} --master_port={free_port()}")
    # whatever number of tasks, share of CPUs, or environment the job was submitted with
    return ["srun", f"--nodes={node_count}", f"--ntasks={node_count}", "--ntasks-per-node=1",
            f"--cpus-per-task={slurm.cpus_per_node()}", "--export=ALL", "--kill-on-bad-exit=1",
            *pipeline.inside("bash", "-c", f'trap "" USR1 TERM; exec {start} "$@"', "node", *words)]

def free_port():
    """A port of this node, the first of the job, where the ranks meet."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
