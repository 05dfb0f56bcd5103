"""
Runs the phases that speedrun.sh lists, one after another: starts each on all its ranks, passes a
signal on and waits until all is saved, reads how it has ended, and in a Slurm job sees to it that
the job goes on. Before the first training it tries out all that are to come (trial.py).

    launch.py DATA DEPTH --run NAME SCRIPT ARGS --run ... --given FLAGS    (speedrun.sh's call)

Exit codes are the phases': 0 done, 2 nothing was started, 75 saved (the same command goes on), else
a failure. torchrun turns every code into 1, so a phase leaves its own in a file, $NANOCHAT_OUTCOME.
"""
import contextlib
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import checkpoint
import common
import configurator
import pipeline
import slurm
import status
import trial
from lock import holder_name, living_holder
from notes import note, note_command, note_end
from supervisor import Supervisor

PATIENCE = 75  # seconds that the process of a launcher that was killed may take to save and go
HELP = "bash speedrun.sh --help"
FLAGS = {"--data=", "--depth=", "--nproc=", "--from=", "--only=", "--chats=", "--dry-run",
         "--skip-trial", "--slurm", "--check-inputs"}

# -------------------------------------------------------------------------------------------------
# what is to be run

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
        if name == "data":  # alone it brings what all phases read
            readers = [] if self.names == ["data"] else self.names
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
    nproc = flags.get("--nproc=", default_nproc(in_slurm))
    check_number("--nproc", nproc, 9999)
    common.check(not in_slurm or "SLURM_JOB_ID" in os.environ, "--slurm is for the job's own use: "
                 "sbatch slurm_speedrun.sbatch")
    configurator.check_arguments(settings)
    data = pipeline.whole_path(data)
    settings = [configurator.from_here(word) for word in settings]
    chats = os.path.abspath(os.path.expanduser(flags.get("--chats=", "")))
    whole = {"--data=": data, "--chats=": chats}
    flags_given = [key + whole.get(key, value) for key, value in flags.items() if key != "--slurm"]
    given = [*flags_given, "--", *settings] if settings else flags_given
    if "--chats=" in flags:
        settings = [*lessons_of(chats), *settings]
    return Plan(data, f"d{depth}", int(nproc), listed, names, settings, given, in_slurm)

def lessons_of(chats):
    """The settings by which midtraining and finetuning learn a file of conversations alone, and so
    often that a few of them are remembered: as 4 MB, a million tokens, of conversations are read
    once. What is measured is what is remembered, since nothing is held out."""
    common.check(os.path.isfile(chats), f"--chats: there is no file {chats}")
    times = min(1000, math.ceil(4e6 / max(os.path.getsize(chats), 1)))
    return [word for name in ("mid", "sft")
            for word in (f"--{name}.mixture={chats}*{times}", f"--{name}.held_out={chats}")]

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

def default_nproc(in_slurm):
    if in_slurm:
        return os.environ.get("SLURM_GPUS_ON_NODE") or "1"
    return str(len(trial.gpu_names()) or 1)

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
    start = " ".join(pipeline.inside(start))
    # whatever number of tasks, share of CPUs, or environment the job was submitted with
    return ["srun", f"--nodes={node_count}", f"--ntasks={node_count}", "--ntasks-per-node=1",
            f"--cpus-per-task={slurm.cpus_per_node()}", "--export=ALL", "--kill-on-bad-exit=1",
            "bash", "-c", f'trap "" USR1 TERM; exec {start} "$@"', "node", *words]

def free_port():
    """A port of this node, the first of the job, where the ranks meet."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]

# -------------------------------------------------------------------------------------------------
# running a phase

def run_phase(plan, supervisor, name, words):
    """Runs a phase, once more with fewer rows where its memory is out. -> (exit code, the arguments
    that were added for it, outcome)"""
    code, outcome = supervisor.run(command_for(plan, name, words))
    added = [] if code in (0, 75) else outcome.get("retry_with", [])
    if added:
        print(f"{name} ran out of memory; trying it once with {' '.join(added)}", flush=True)
        code, outcome = supervisor.run(command_for(plan, name, [*words, *added]))
    if code == 128 + signal.SIGKILL:
        print(f"{name} was killed (SIGKILL), probably because the host ran out of memory: fewer "
              "rows at once (--device_batch_size) need less", file=sys.stderr, flush=True)
    return code, added, outcome

def wait_for_holder(folder, supervisor, sleep=time.sleep):
    """Where the process of a killed launcher is still saving, it is given time to do so; until a
    signal comes."""
    for second in range(PATIENCE):
        holder = living_holder(folder)
        if not holder or supervisor.stopping:
            return
        if second == 0:
            print(f"waiting up to {PATIENCE} s for {holder_name(holder)}, which writes in {folder} "
                  "(is another speedrun.sh running?)", flush=True)
        sleep(1)

def run_checks(plan, supervisor):
    """What the phases build on and this run does not make must be there, whole, before anything
    starts. Looked at in processes of their own: this one does without the packages. -> exit code"""
    check_settings(plan)
    needed = {phase.parent for phase in plan.phases("training", "evaluation")} - {*plan.names}
    commands = [["adopt.py", f"--data={plan.data}", f"--stage={parent}"] for parent in needed
                if parent != "tok" and checkpoint.made_by_nanochat(plan.folder(parent)) is not None]
    commands.append(plan.input_check())
    # only the toy world is made in a job itself: there is no network
    brings = "data" in plan.names and not (plan.in_slurm and plan.data != "toy")
    if not brings and plan.names != ["report"]:
        commands.append([*plan.words("data"), "--check=True"])
    for words in commands:
        code, _ = supervisor.run(pipeline.inside("python", *words))
        if code:
            return code
    return 0

def check_inputs(plan):
    """A run's tasks, devices, and what earlier runs have made: tokenizer, models. -> 0; Failure
    (code 2), which the launcher that has asked is told of"""
    import models
    import tasks
    try:
        settings = check_settings(plan)
        for phase in plan.phases("training", "evaluation"):
            tasks.check_names(settings[phase.name])
            if not plan.in_slurm:  # there each node has its own devices
                configurator.check_device(settings[phase.name])
            if phase.parent in plan.names:
                continue
            if phase.parent == "tok":
                models.tok.load_tokenizer(plan.data)
            else:
                models.find_model(phase.parent, plan.data, plan.tag)
    except common.Failure as e:
        e.next_command = start_over_command(plan, e.message) or e.next_command
        common.leave_outcome(e.code, e.message)
        raise
    return 0

# -------------------------------------------------------------------------------------------------
# running all of them

def run_all(plan, supervisor):
    """Runs the plan. -> (exit code, the last line to print). Failure where it cannot begin (code
    2), or another attempt of the job has begun (code 1)."""
    code = run_checks(plan, supervisor)
    if code == 0 and plan.in_slurm:
        slurm.check_job(plan.nproc)
        slurm.guard(plan.data, plan.tag)
        code = check_nodes(plan, supervisor)
    if code == 75:
        return 75, "stopped before the first phase"
    if code:
        reason = supervisor.outcome.get("reason", "a check before the first phase failed")
        note_end(plan, first_left(plan), code, reason)
        return code, "nothing was started: fix the error above and run the same command again"
    failed = []

    def try_phase(name, words):
        code, added, outcome = run_phase(plan, supervisor, name, words)
        if code not in (0, 75):
            note_end(plan, name, code, f"its trial: {outcome.get('reason', ended_by(code))}")
        return code, added, outcome
    added = {} if "--skip-trial" in plan.given else None  # {phase: arguments that make it fit}
    for name in plan.names:
        phase = pipeline.find_phase(name)
        if supervisor.stopping:
            return 75, f"stopped before {name} with everything saved"
        if phase.kind == "training" and added is None:
            code, added = trial.try_out(plan, try_phase)
            if code == 75:
                return 75, "stopped while trying out the trainings to come"
            if code:
                return code, f"the trial failed (exit {code}): fix the error above"
        words = [*plan.words(name), *(added or {}).get(name, [])]
        code, reason = start(plan, supervisor, name, words)
        if code == 75:
            return 75, f"stopped in {name} with everything saved"
        if code == 128 + signal.SIGINT:
            return 75, (f"{name} was stopped at once by a second Ctrl-C; it resumes from its "
                        "last checkpoint")
        if code and (phase.kind == "evaluation" or name == "report"):
            print(f"{name} failed (exit {code}); going on, since the models do not depend on it",
                  file=sys.stderr, flush=True)
            failed.append(name)
        elif code:
            if phase.kind == "training" and "report" in plan.names:
                start(plan, supervisor, "report", plan.words("report"))
            over = start_over_command(plan, reason)
            fix = f"to start it over: {over}" if over else "fix that and run the same command again"
            return code, f"{name} failed (exit {code}): {reason}; {fix}"
    if failed:
        return 1, f"done, but these failed: {', '.join(failed)}; run the same command again"
    if {*plan.names, "report"} != {*plan.listed, "report"}:
        return 0, "done"
    return 0, "all done; talk to it: python chat_cli.py"

def start(plan, supervisor, name, words):
    """Runs a phase unless it is done. -> (exit code, why it has ended so); Failure (code 1) where
    Slurm has given the nodes to the next attempt of the job."""
    if plan.in_slurm and slurm.given_up():
        common.fail("Slurm has started another attempt of this job: going no further", code=1)
    print(f"\n=== {name}: python {shlex.join(words)}", flush=True)
    wait_for_holder(plan.folder(name), supervisor)
    if supervisor.stopping:
        return 75, "a signal came while waiting"
    done = plan.is_done(name)
    note(plan, began=supervisor.began)
    code, _, outcome = run_phase(plan, supervisor, name, words)
    note(plan, began=supervisor.began)  # again: the first phase makes the folder
    if not done and code != 2:  # a command that was refused does not go on with anything
        note_command(plan)
    reason = outcome.get("reason")
    note_end(plan, name, code, reason or ended_by(code))
    return code, reason or "the lines above say why"

def ended_by(code):
    """Of a phase that has said nothing.  examples: 137 -> "killed by SIGKILL"; 1 -> "exit 1" """
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(code - 128).name}"
    return f"exit {code}"

def first_left(plan):
    """The phase that a refusal before the first one concerns."""
    return next((name for name in plan.names if not plan.is_done(name)), plan.names[0])

def check_nodes(plan, supervisor):
    """-> exit code: whether all nodes of the job have what is needed"""
    mark = supervisor.outcome_path.with_suffix(".seen")
    mark.touch()
    code, _ = supervisor.run(srun(plan, ["slurm.py", str(plan.nproc), str(mark)], alone=True))
    mark.unlink()
    return code

def end_attempt(plan, supervisor, code):
    """In a Slurm job that is not done: what is to become of it. -> exit code"""
    try:
        ended = slurm.KILLED if code == 75 and supervisor.terminated else code
        slurm.guard(plan.data, plan.tag, ended)
    except common.Failure as e:  # the last of too many without progress
        print(f"error: {e}", flush=True)
        code = 1
    if code == 0:
        return 0
    line, requeued = slurm.after_attempt(code, supervisor.terminated, plan.given)
    print(line, flush=True)
    if requeued:  # Slurm ends this attempt now; nothing more may happen in it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(300)
    return code

def main():
    plan = make_plan(sys.argv[1:])
    os.chdir(os.path.dirname(os.path.abspath(__file__)))  # until here it was the user's own folder
    if "--dry-run" in plan.given:
        check_settings(plan)
        for name in plan.names:
            print(shlex.join(command_for(plan, name, plan.words(name))))
        return 0
    if "--check-inputs" in plan.given:
        return check_inputs(plan)
    folder = Path(tempfile.gettempdir())
    if plan.in_slurm or pipeline.inside():  # which all nodes, or a container, see
        folder = pipeline.base_dir()
    if plan.in_slurm:
        print(f"\n{slurm.describe_job(plan.given)}", flush=True)
    supervisor = Supervisor(folder / f"outcome-{uuid.uuid4().hex}")
    with common.writing(folder, code=2):
        folder.mkdir(parents=True, exist_ok=True)
        supervisor.outcome_path.touch()
    supervisor.began["time"] = time.time()
    if plan.in_slurm:
        supervisor.began |= {"job": slurm.job_name(), "ends": slurm.end_time(),
                             "log": slurm.show_this_job().get("StdOut")}
    os.environ["NANOCHAT_OUTCOME"] = str(supervisor.outcome_path)
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    for signum in signals:
        signal.signal(signum, supervisor.on_signal)
    try:
        code, line = run_all(plan, supervisor)
    except common.Failure as e:
        e.next_command = start_over_command(plan, e.message) or e.next_command
        note_end(plan, first_left(plan), e.code, e.message)
        if not plan.in_slurm:
            raise
        code, line = e.code, f"error: {e}"
    finally:
        supervisor.outcome_path.unlink(missing_ok=True)
    print(flush=True)
    if plan.in_slurm:
        print(line, flush=True)
        code = end_attempt(plan, supervisor, code)
    else:
        if code != 2:
            subprocess.run([sys.executable, "status.py", f"--data={plan.data}"], check=False)
        if code == 75:
            line += ": run the same command again"
        print(line, flush=True)
    for signum in signals:
        signal.signal(signum, signal.SIG_IGN)  # what comes while Python winds up changes nothing
    return code

if __name__ == "__main__":
    sys.exit(main())
