"""
Runs the phases that speedrun.sh lists, one after another: starts each on all its ranks, passes a
signal on and waits until all is saved, reads how it has ended, and in a Slurm job sees to it that
the job goes on. Before the first training it tries out all that are to come (trial.py).

    launch.py DATA DEPTH --run NAME SCRIPT ARGS --run ... --given FLAGS    (speedrun.sh's call)

Exit codes are the phases': 0 done, 2 nothing was started, 75 saved (the same command goes on), else
a failure. torchrun turns every code into 1, so a phase leaves its own in a file, $NANOCHAT_OUTCOME.
"""
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import checkpoint
import common
import configurator
import pipeline
import slurm
import trial
from lock import holder_name, living_holder, read_holder
from notes import note, note_command, note_end
from plan import check_settings, command_for, make_plan, srun, start_over_command
from supervisor import Supervisor

STOPPED = (75, 128 + signal.SIGINT)  # saved; by a second Ctrl-C: it had no time to
PATIENCE = 75  # seconds that the process of a launcher that was killed may take to save and go

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
    phases = plan.phases("training", "evaluation")
    commands = [plan.input_check()] if phases else []
    for parent in dict.fromkeys(phase.parent for phase in phases):
        if is_nanochats(plan, parent):
            commands.append(["adopt.py", f"--data={plan.data}", f"--stage={parent}"])
    # only the toy world is made in a job itself: there is no network
    brings = "data" in plan.names and not (plan.in_slurm and plan.data != "toy")
    if not brings and plan.names != ["report"]:
        commands.append([*plan.words("data"), "--check=True"])
    for words in commands:
        code, _ = supervisor.run(pipeline.inside("python", *words))
        if code:
            return code
    return 0

def is_nanochats(plan, parent):
    """Whether it is a model that nanochat has made, which adopt.py has yet to look at."""
    return parent != "tok" and parent not in plan.names and \
        checkpoint.made_by_nanochat(plan.folder(parent)) is not None

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
            if phase.parent in plan.names or is_nanochats(plan, phase.parent):
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
    if code in STOPPED:
        return 75, "stopped before the first phase"
    if code:
        reason = supervisor.outcome.get("reason", "a check before the first phase failed")
        note_end(plan, first_left(plan), code, reason)
        return code, "nothing was started: fix the error above and run the same command again"
    failed = []

    def try_phase(name, words):
        code, added, outcome = run_phase(plan, supervisor, name, words)
        if code not in (0, *STOPPED):
            note_end(plan, name, code, f"its trial: {outcome.get('reason', ended_by(code))}")
        return code, added, outcome
    added = {} if "--skip-trial" in plan.given else None  # {phase: arguments that make it fit}
    for name in plan.names:
        phase = pipeline.find_phase(name)
        if supervisor.stopping:
            return 75, f"stopped before {name} with everything saved"
        if phase.kind == "training" and added is None:
            code, added = trial.try_out(plan, try_phase)
            if code in STOPPED:
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
    wait_for_holder(plan.lock_folder(name), supervisor)
    if supervisor.stopping:
        return 75, "a signal came while waiting"
    if pipeline.inside():  # where nobody can ask whether the job that has left its lock is over
        holder = read_holder(plan.lock_folder(name) / "lock.json")
        if holder.get("job") and slurm.attempt_over(holder["job"], holder["restart"]):
            os.environ["NANOCHAT_JOB_OVER"] = f"{holder['job']} {holder['restart']}"
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
    with common.writing(mark):
        mark.touch()
    code, _ = supervisor.run(srun(plan, ["slurm.py", str(plan.nproc), str(mark)], alone=True))
    mark.unlink()
    return code

def end_attempt(plan, supervisor, code):
    """In a Slurm job that is not done: what is to become of it. -> exit code"""
    try:
        # where there is time of grace, only the steps get SIGTERM
        early = supervisor.terminated or slurm.preempted(slurm.show_this_job())
        slurm.guard(plan.data, plan.tag, slurm.KILLED if code == 75 and early else code)
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
    if "--check-inputs" in sys.argv:
        return check_inputs(plan)
    folder = Path(tempfile.gettempdir())
    if plan.in_slurm or pipeline.inside():  # which all nodes, or a container, see
        folder = pipeline.base_dir()
    is_new = not folder.exists()
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
    signals = common.stop_signals()
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
        if is_new:
            with contextlib.suppress(OSError):  # there is something in it
                folder.rmdir()
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
