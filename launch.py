"""
Runs the phases that speedrun.sh lists, one after another: starts each on all its ranks, passes a
signal on and waits until all is saved, reads how it has ended, and in a Slurm job sees to it that
the job goes on. Before the first training it tries out all that are to come (trial.py).

    launch.py DATA DEPTH --run NAME SCRIPT ARGS --run ... --given FLAGS    (speedrun.sh's call)

Exit codes are the phases': 0 done, 2 nothing was started, 75 saved (the same command goes on), else
a failure. torchrun turns every code into 1, so a phase leaves its own in a file, $NANOCHAT_OUTCOME.
"""
import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import checkpoint
import common
import configurator
import pipeline
import slurm
import trial
from lock import holder_name, living_holder
from records import load_record

PATIENCE = 75  # seconds that the process of a launcher that was killed may take to save and go

# -------------------------------------------------------------------------------------------------
# what is to be run

@dataclass
class Plan:
    data: str
    tag: str
    nproc: int       # processes on a machine
    lines: dict      # {phase: [script, arguments]} of those that are to run
    settings: list   # behind the --, for every phase that has them
    given: list      # speedrun.sh's own arguments
    in_slurm: bool = False
    dry_run: bool = False
    trial: bool = True
    launches: int = 0

    def phases(self, *kinds):
        return [p for p in pipeline.PHASES if p.name in self.lines and p.kind in kinds]

    def words(self, name):
        """The script of a phase and all its arguments."""
        own = configurator.accepted(pipeline.find_phase(name), self.settings)
        if name == "data":  # alone it brings what all phases read
            names = [] if list(self.lines) == ["data"] else self.lines
            own = [f"--phases={','.join(names)}", *own]
        return [*self.lines[name], *own]

    def folder(self, name):
        return pipeline.state_path(name, self.data, self.tag)

    def is_done(self, name):
        record = load_record(self.folder(name))
        return bool(record) and record["status"] == "done"

def split_at(words, mark):
    """example: (["a", "-", "b", "c"], "-") -> [["a"], ["b", "c"]]"""
    parts = [[]]
    for word in words:
        if word == mark:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts

def make_plan(words):
    """This script's arguments -> Plan. Failure (code 2) where a flag or setting makes no sense."""
    at = words.index("--given")
    (data, depth), *listed = split_at(words[:at], "--run")
    given = words[at + 1:]
    flag_words, *rest = split_at(given, "--")
    settings = rest[0] if rest else []
    lines = {name: line for name, *line in listed}
    flags, skipped = {}, set()
    for word in flag_words:
        key, _, value = word.partition("=")
        if word.startswith("--skip-"):
            skipped.add(word.removeprefix("--skip-"))
        else:
            flags[key] = value
    unknown = flags.keys() - {"--data", "--depth", "--nproc", "--from", "--only", "--dry-run",
                              "--slurm"}
    common.check(not unknown, f"unknown flag: {' '.join(unknown)} (bash speedrun.sh --help)")
    only = [name for name in flags.get("--only", "").split(",") if name]
    first = flags.get("--from") or "data"
    for name in [*only, first, *skipped - {"trial"}]:
        common.check(name in lines, f"no such phase: {name} (bash speedrun.sh --help)")
    names = list(lines)
    names = [name for name in names[names.index(first):]
             if name not in skipped and (not only or name in only)]
    common.check(names, "these flags leave nothing to run (bash speedrun.sh --help)")
    common.check(data, "--data is empty")
    common.check(re.fullmatch(r"[1-9][0-9]?", depth),
                 f"--depth takes a whole number from 1 to 99, not '{depth}'")
    nproc = flags.get("--nproc") or str(default_nproc("--slurm" in flags))
    common.check(re.fullmatch(r"[1-9][0-9]{0,3}", nproc),
                 f"--nproc takes a whole number, not '{nproc}'")
    configurator.check_arguments(settings)
    return Plan(pipeline.whole_path(data), f"d{depth}", int(nproc),
                {name: lines[name] for name in names}, settings,
                [word for word in given if word != "--slurm"],
                "--slurm" in flags, "--dry-run" in flags, "trial" not in skipped)

def default_nproc(in_slurm):
    if in_slurm:
        return int(os.environ.get("SLURM_GPUS_ON_NODE") or "1")
    return len(trial.gpu_names()) or 1

def command_for(plan, name, words):
    """What starts a phase: python, torchrun for several ranks, srun in a Slurm job."""
    if pipeline.find_phase(name).kind == "single":
        return ["python", *words]
    if plan.in_slurm:
        return srun(plan, words)
    if plan.nproc == 1:
        return ["python", *words]
    # torchrun must not hear of signals: it would kill its workers, which save by themselves
    return ["torchrun", "--standalone", f"--nproc_per_node={plan.nproc}",
            "--signals-to-handle=SIGQUIT", *words]

def srun(plan, words, alone=False):
    """One task a node, which ignores the signals that Slurm sends to all processes of a step;
    torchrun's workers hear them. alone: one process a node."""
    node_count = int(os.environ["SLURM_NNODES"])
    if alone or plan.nproc * node_count == 1:
        inner = ["python", *words]
    else:
        plan.launches += 1  # a dead one may still hold the port of the one before
        job = int(os.environ["SLURM_JOB_ID"])
        port = 12000 + (job * 97 + slurm.attempt() * 13 + plan.launches) % 20000
        inner = ["torchrun", f"--nnodes={node_count}", f"--nproc_per_node={plan.nproc}",
                 "--signals-to-handle=SIGQUIT", "--node_rank=NODE",
                 f"--master_addr={slurm.nodes()[0]}", f"--master_port={port}", *words]
    shell = 'trap "" USR1 TERM; exec "${@/#--node_rank=NODE/--node_rank=$SLURM_NODEID}"'
    return ["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=1",
            f"--cpus-per-task={os.environ.get('SLURM_CPUS_PER_TASK') or 1}",
            "bash", "-c", shell, "node", *inner]

def shown(plan, name, words):
    """The command of a phase as it is printed: what srun and torchrun are told is of no use."""
    if plan.in_slurm and pipeline.find_phase(name).kind != "single":
        return f"{shlex.join(words)} on {os.environ['SLURM_NNODES']} x {plan.nproc} processes"
    return shlex.join(command_for(plan, name, words))

# -------------------------------------------------------------------------------------------------
# running one command

@dataclass
class Supervisor:
    """Runs one command at a time; a signal asks it to save and stop."""
    outcome_path: Path
    popen: object = subprocess.Popen
    asked: bool = False         # a signal came
    told_to_end: bool = False   # it was SIGTERM, as from scancel or a preemption
    child: object = None
    command: tuple = ()

    def on_signal(self, signum, frame):
        self.asked = True
        self.told_to_end = self.told_to_end or signum == signal.SIGTERM
        self.tell()

    def tell(self):
        """Asks the processes of the phase itself to save and stop."""
        if self.child is None:
            return
        if self.command[0] == "torchrun":
            subprocess.run(["pkill", "-TERM", "-P", str(self.child.pid)], check=False)
        elif self.command[0] == "srun":
            self.child.send_signal(signal.SIGUSR1)  # passed on to all processes on all nodes
        else:  # not its children: a sandbox that dies is an answer that counts as wrong
            self.child.send_signal(signal.SIGTERM)

    def run(self, command):
        """-> (exit code, outcome: what the phase has left of its end, {} for nothing)"""
        self.outcome_path.unlink(missing_ok=True)
        environment = {**os.environ, "NANOCHAT_OUTCOME": str(self.outcome_path)}
        self.command = command
        self.child = self.popen(command, env=environment, stdin=subprocess.DEVNULL,
                                preexec_fn=end_with_parent)
        while True:
            if self.asked:
                self.tell()  # again and again, in case it was not yet listening
            try:
                code = self.child.wait(timeout=3)
                break
            except subprocess.TimeoutExpired:
                continue
        self.child = None
        outcome = common.read_json(self.outcome_path) or {}
        # what the phase itself has said also holds where a signal hit it after its end
        code = outcome.get("code", code if code >= 0 else 128 - code)
        if code in (128 + signal.SIGINT, 128 + signal.SIGUSR1, 128 + signal.SIGTERM):
            code = 75  # before its handlers stood: it had not begun
        if self.asked and code == 0:
            code = 75
        return code, outcome

def end_with_parent():
    """In a new process: where the one that started it is killed outright, it is told to save and
    stop instead of running on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

def run_phase(plan, supervisor, name, words):
    """Runs a phase, once more with fewer rows where it says that memory is out. -> (exit code, the
    arguments that were added, outcome)"""
    fewer = []
    while True:
        code, outcome = supervisor.run(command_for(plan, name, [*words, *fewer]))
        retry = outcome.get("retry_with")
        if code in (0, 75) or not retry or fewer:
            break
        print(f"{name} runs out of memory; trying it once with {' '.join(retry)}", flush=True)
        fewer = retry
    if code == 128 + signal.SIGKILL:
        print(f"{name} was killed (SIGKILL), probably because the host ran out of memory: fewer "
              "rows at once (--device_batch_size) need less", file=sys.stderr, flush=True)
    return code, fewer, outcome

def wait_for_holder(plan, name, sleep=time.sleep):
    """Where the process of a killed launcher is still saving, it is given time to do so."""
    folder = plan.folder(name)
    holder = living_holder(folder)
    if holder:
        print(f"waiting for {holder_name(holder)}, which writes in {folder}", flush=True)
    for _ in range(2 * PATIENCE):
        if not living_holder(folder):
            return
        sleep(0.5)

def said_done_already(plan, supervisor, name, words):
    """A phase that its record calls done verifies that in one process, long before processes on all
    nodes would have met; where it finds that it is not it stops at once."""
    alone = command_for(plan, name, words)[0] == "python"
    if alone or not plan.is_done(name):
        return False
    code, _ = supervisor.run(["python", *words, "--time_limit=0"])
    return code == 0

def without_start_over(plan, name, words):
    """--start_over=True holds for one beginning: what this very command has begun anew and is done
    is left alone."""
    record = load_record(plan.folder(name)) or {}
    kept = [word for word in words if not word.startswith("--start_over=")]
    same = record.get("command") == shlex.join(["python", *kept])
    began_so = same and record.get("free", {}).get("start_over")
    return kept if began_so and record.get("status") == "done" else words

def check_inputs(plan, supervisor):
    """What the phases build on and this run does not make must be there, whole, before anything
    starts. -> exit code"""
    import models  # which needs the packages; a dry run does not
    for phase in plan.phases("training", "evaluation"):
        if phase.parent in plan.lines:
            continue
        if phase.parent == "tok":
            models.tok.load_tokenizer(plan.data)
            continue
        folder = plan.folder(phase.parent)
        if checkpoint.made_by_nanochat(folder) not in (None, *checkpoint.steps(folder)):
            code, _ = supervisor.run(["python", "adopt.py", f"--data={plan.data}",
                                      f"--stage={phase.parent}"])
            if code:
                return code
        models.find_model(phase.parent, plan.data, plan.tag)
    # only the toy world is made in a job itself: there is no network
    brings = "data" in plan.lines and not (plan.in_slurm and plan.data != "toy")
    if brings or list(plan.lines) == ["report"]:
        return 0
    words = ["prepare_data.py", f"--data={plan.data}", f"--depth={plan.tag[1:]}",
             f"--phases={','.join(plan.lines)}"]
    own = configurator.accepted(pipeline.find_phase("data"), plan.settings)
    return supervisor.run(["python", *words, *own, "--check=True"])[0]

# -------------------------------------------------------------------------------------------------

def run_all(plan, supervisor):
    """Runs the plan. -> (exit code, None where another attempt of the job is there; the last line
    to print). Failure (code 2) where it cannot begin."""
    code = check_inputs(plan, supervisor)
    if code == 0 and plan.in_slurm:
        slurm.guard(plan.data, plan.tag)
        code = check_nodes(plan, supervisor)
    if code:
        return code, "nothing was started: mend what it says above"
    failed, fewer, tried = [], {}, not plan.trial
    for name in plan.lines:
        phase = pipeline.find_phase(name)
        if plan.in_slurm and slurm.given_up():
            return None, "Slurm has given this attempt up and started another: going no further"
        if supervisor.asked:
            return 75, f"stopped before {name} with everything saved"
        if phase.kind == "training" and not tried:
            tried = True
            code, fewer = trial.try_out(plan, lambda *call: run_phase(plan, supervisor, *call))
            if code == 75:
                return 75, "stopped while trying out the trainings to come"
            if code:
                return code, f"the trial ended with code {code}; mend what it says above"
        words = without_start_over(plan, name, [*plan.words(name), *fewer.get(name, [])])
        print(f"\n=== {name}: {shown(plan, name, words)}", flush=True)
        if said_done_already(plan, supervisor, name, words):
            continue
        wait_for_holder(plan, name)
        code, _, _ = run_phase(plan, supervisor, name, words)
        if code == 75:
            return 75, f"stopped in {name} with everything saved"
        if code and (phase.kind == "evaluation" or name == "report"):
            print(f"{name} failed with code {code}; going on, since the models do not depend on it",
                  file=sys.stderr, flush=True)
            failed.append(name)
        elif code:
            if plan.in_slurm and slurm.given_up():
                return None, "Slurm has given this attempt up: going no further"
            if phase.kind == "training" and "report" in plan.lines:
                supervisor.run(["python", *plan.words("report")])
            return code, (f"{name} failed with code {code}; mend what it says above and run the "
                          "same command again: what is done stays done")
    if failed:
        return 1, f"done, but these failed: {', '.join(failed)}; run the same command again"
    return 0, "all done; talk to it: python chat_cli.py"

def check_nodes(plan, supervisor):
    """-> exit code: whether all nodes of the job have what is needed"""
    mark = supervisor.outcome_path.with_suffix(".seen")
    mark.touch()
    code, _ = supervisor.run(srun(plan, ["slurm.py", str(plan.nproc), str(mark)], alone=True))
    mark.unlink()
    return code

def end_attempt(plan, supervisor, code):
    """In a Slurm job that is not done: what is to become of it. -> exit code"""
    ended = slurm.TOLD if code == 75 and supervisor.told_to_end else code
    try:
        slurm.guard(plan.data, plan.tag, ended)
    except common.Failure as e:  # the last of too many that got nothing done
        print(f"error: {e}", flush=True)
        code = 1
    if code == 0:
        return 0
    line, requeued = slurm.after_attempt(code, supervisor.told_to_end, plan.given)
    print(line, flush=True)
    supervisor.told_to_end = False
    for _ in range(300 if requeued else 0):  # Slurm ends this attempt now; nothing more may happen
        if supervisor.told_to_end:
            break
        time.sleep(1)
    return code

def main():
    plan = make_plan(sys.argv[1:])
    if plan.dry_run:
        for name in plan.lines:
            print(shlex.join(command_for(plan, name, plan.words(name))))
        return 0
    folder = Path(tempfile.gettempdir())
    if plan.in_slurm:  # seen by all nodes of the job; an earlier attempt has its own file
        folder = pipeline.base_dir()
        folder.mkdir(parents=True, exist_ok=True)
    number = os.environ.get("SLURM_JOB_ID", os.getpid())
    supervisor = Supervisor(folder / f"outcome-{number}-{slurm.attempt()}")
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, supervisor.on_signal)
    if plan.in_slurm:
        print(f"\n{slurm.describe_job(plan.given)}", flush=True)
    try:
        code, line = run_all(plan, supervisor)
    except common.Failure as e:
        if not plan.in_slurm:
            raise
        code, line = e.code, f"error: {e}"
    finally:
        supervisor.outcome_path.unlink(missing_ok=True)
    print(flush=True)
    if code is not None:
        said = subprocess.run(["python", "status.py", f"--data={plan.data}"], check=False,
                              capture_output=True, text=True).stdout
        # what comes next is the job's own business
        print(said.rpartition("next: ")[0] if plan.in_slurm else said, end="", flush=True)
    if code == 75 and not plan.in_slurm:
        line += ": run the same command again"
    print(line, flush=True)
    if code is not None and plan.in_slurm:
        code = end_attempt(plan, supervisor, code)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)  # what comes while Python winds up changes nothing
    return 1 if code is None else code

if __name__ == "__main__":
    sys.exit(main())
