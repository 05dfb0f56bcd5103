"""
Runs the command of a phase for launch.py: passes signals on to it until it has saved and ended, and
reads how.
"""
import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import common
import pipeline
import slurm

@dataclass
class Supervisor:
    """Runs one command at a time; a signal asks it to save and stop."""
    outcome_path: Path
    popen: object = subprocess.Popen
    stopping: bool = False     # a signal came
    terminated: bool = False   # it was SIGTERM, as from scancel or a preemption
    child: object = None
    command: tuple = ()
    began: dict = field(default_factory=dict)    # when, in which job: for status.py
    outcome: dict = field(default_factory=dict)  # what the last command has left of its end

    def on_signal(self, signum, frame):
        self.stopping = True
        self.terminated = self.terminated or signum == signal.SIGTERM
        self.pass_on()

    def pass_on(self):
        """Asks the processes of the phase itself to save and stop."""
        if self.child is None:
            return
        if self.command[0] == "srun":
            self.child.send_signal(signal.SIGUSR1)  # passed on to all processes on all nodes
        elif pipeline.inside() or self.command[0] == "torchrun":
            script = next(word for word in self.command if word.endswith(".py"))
            for pid in running(script, self.child.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
        else:  # not its children: a sandbox that dies is an answer that counts as wrong
            self.child.send_signal(signal.SIGTERM)

    def was_told(self, seconds=3.0):
        """Whether a signal has come; Slurm's may come to the phase a moment earlier."""
        end = time.monotonic() + seconds
        while not self.stopping and time.monotonic() < end:
            time.sleep(0.05)
        return self.stopping

    def run(self, command):
        """-> (exit code, outcome: what the phase has left of its end, {} for nothing). 75 where a
        signal came, 130 where a second Ctrl-C has ended it at once."""
        self.outcome_path.unlink(missing_ok=True)
        environment = {**os.environ, "NANOCHAT_OUTCOME": str(self.outcome_path)}
        if "torchrun" in command:  # which would do so itself, and print five lines about it
            environment.setdefault("OMP_NUM_THREADS", "1")
        ends = slurm.end_time() if pipeline.inside() else None
        if ends:  # a container has no scontrol to ask for it
            environment["SLURM_JOB_END_TIME"] = str(int(ends))
        self.command = command
        self.child = self.popen(command, env=environment, stdin=subprocess.DEVNULL,
                                preexec_fn=before_exec)
        code = None
        while code is None:
            if self.stopping:
                self.pass_on()  # again and again, in case it was not yet listening
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self.child.wait(timeout=3)
        self.child = None
        outcome = self.outcome = common.read_json(self.outcome_path)
        told = str(outcome.get("reason")).startswith("signal")
        if told and outcome["code"] == 75 and code not in (0, 75) and not self.was_told():
            # torchrun or srun has told the others, which have saved; the same command would lose
            # the same one again
            outcome.update(code=1, reason=f"one of its processes has died, the lines above say of "
                           f"what (exit {code}); {outcome['reason']}")
        # the phase's own word also holds where a signal hit it after its end
        code = outcome.get("code", code if code >= 0 else 128 - code)
        if code in (128 + signal.SIGUSR1, 128 + signal.SIGTERM):
            code = 75  # before its handlers stood: it had not begun
        # nor had workers that the signal has killed: of them torchrun says 1, and they say nothing
        not_begun = "torchrun" in command and code == 1 and not outcome
        if self.stopping and (code == 0 or not_begun):
            code = 75
        return code, outcome

def running(script, pid):
    """The processes under `pid` that run a script of ours, the topmost: of a container's own, and
    torchrun, nobody knows what they do with a signal."""
    if not Path("/proc").exists():  # macOS
        out = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True,
                             errors="replace", check=False)
        return list(map(int, out.stdout.split()))
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has ended, and so may each child
            for child in children.read_text("utf-8").split():
                words = read_words(child)
                is_ours = "python" in words[0] and script in words[1:3]  # python -u SCRIPT
                found += [int(child)] if is_ours else running(script, child)
    return found

def read_words(pid):
    """The words that a process was started with, [""] of one that has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    return [""]

def before_exec():
    """In a new process. Ctrl-C, and the end of the terminal, come to all its processes: one that
    does not handle them (torchrun, which would kill its workers) ignores them, and this launcher
    passes them on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    common.end_with_parent()
