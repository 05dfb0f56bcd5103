"""
A run of a phase: one object in sight, from a script's first line to its last. It holds the folder
with its record and lock, the wish to stop, the clock, and the save in flight.

    run = Run.start("base_train")     # from here on a signal asks for a save and a stop
    run.ranks.join(device)            # under torchrun
    run.open_or_exit(directory, settings, inputs)   # ends the process if it is done or must not run
    run.begin_loop(step, num_steps, ...)
        run.should_stop(), run.should_save(), run.save(...), run.log(...), run.log_step(...)
    run.exit_interrupted(...) or run.exit_done(...)

A phase's folder (base_checkpoints/d4, tokenizer, ...) holds its checkpoints or other artefacts and

    phase.json     the record (records.py)
    lock.json      who writes here now (lock.py)
    metrics.jsonl  a line a step, appended; what is not a reading of the clock is reproducible
"""
import json
import math
import os
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import bands
import checkpoint
import common
import configurator
import records
import rewind
import slurm
import trial
from clock import Clock
from lock import Lock, check_free, put_aside, take_lock
from ranks import Ranks

TRY_OUT_STEPS = 4          # the first one compiles, the second is slow, too
TRIED_OUT = "tried out"    # why a run stops after them

@dataclass
class Run:
    name: str
    ranks: Ranks
    command: str = ""              # what goes on with this run
    settings: object = None        # the script's

    # the folder
    directory: Path | None = None
    record: dict = field(default_factory=dict)
    lock: Lock | None = None       # rank 0's
    metrics: object = None         # rank 0's open metrics.jsonl
    partial: Path | None = None    # of an evaluation, instead: the file of its pieces

    # the wish to stop; times in seconds since the epoch
    stop: str | None = None        # why, once something has asked for it
    signals: tuple = ()            # those that ask for it
    now: object = time.time
    limit: float = math.inf        # the end that --time_limit sets,
    job_end: float = math.inf      # and the end of the Slurm job,
    job_left: float = 0.0          # which was so many seconds ahead when it was asked for
    longest_save: float = 0.0      # seconds; 0: none was measured

    clock: Clock | None = None     # of a training loop
    try_out: bool = False          # --try_out=True: only the first steps, and what they need
    eval_seconds: float = 0.0

    # the save in flight
    saving: threading.Thread | None = None
    save_error: Exception | None = None
    saved_step: int | None = None

    alone_to_say: bool = False     # this rank, other than 0, may be the only one that knows why

    @classmethod
    def start(cls, name):
        """The one call at the head of a script, before anything large is imported: --help is
        answered here, and ends the process; a signal in the first seconds counts too. Those of
        common.stop_signals() only set a flag; a second SIGINT ends the process at once (under
        torchrun it does not: Ctrl-C may come there twice)."""
        configurator.exit_with_help(sys.argv[0])
        run = cls(name, Ranks(*common.rank_world()))
        came = set()

        def on_signal(signum, frame):
            if signum == signal.SIGINT and signum in came and not under_torchrun():
                os._exit(130)
            came.add(signum)
            run.stop = f"signal {signal.Signals(signum).name}"
        run.signals = common.stop_signals()
        for number in run.signals:
            signal.signal(number, on_signal)
        if under_torchrun():  # the launcher does the same for the process that it starts
            common.end_with_parent()
        sys.excepthook = run.end_process
        once = ("__start_over=", "__rewind=")  # what goes on with the run does neither again
        kept = [a for a in sys.argv[1:] if not a.replace("-", "_").startswith(once)]
        start = "python"
        nproc = os.environ.get("LOCAL_WORLD_SIZE", "1")
        if nproc == os.environ.get("WORLD_SIZE") != "1":  # several ranks on one machine
            start = f"torchrun --standalone --nproc_per_node={nproc}"
        run.command = f"{start} {shlex.join([os.path.basename(sys.argv[0]), *kept])}"
        return run

    # ---------------------------------------------------------------------------------------------
    # opening the phase's folder

    def open_or_exit(self, directory, settings, inputs, damage=None):
        """
        Takes the lock of the phase's folder and writes its record; done on rank 0. in: settings
        (configurator.Settings); inputs {"tokenizer": fingerprint, ...}; damage() -> None if the
        artefact is whole, else why not (without: the phase saves checkpoints, and saved_step is
        the one to go on from, None for a new run). Collective.
        Ends the process with 0 where the phase is done, and then changes nothing on disk; Failure
        with code 2 where its settings or inputs are others than those it was started with, where
        what it has saved is damaged, or another process writes here.
        """
        self.directory, self.settings = Path(directory), settings
        self.try_out = settings.get("try_out", False)
        opened = self.ranks.on_rank0(self._open, inputs, damage)
        if opened is None:
            self.leave(0, "done already")
        self.record, self.saved_step = opened

    def _open(self, inputs, damage):
        """-> (record, saved_step), or None where the phase is done"""
        directory, settings = self.directory, self.settings
        check_free(directory)
        if self.try_out:
            shutil.rmtree(directory, ignore_errors=True)  # of an earlier try-out
        found = records.load_record(directory)
        judged = records.judge(self.name, directory, settings, inputs, damage)
        if judged is None:
            common.print0(f"{self.name}: done already ({directory})")
            return None
        old, saved_step = judged
        back = rewind.asked_for(settings, directory, old)
        if back is not None:
            old, saved_step = rewind.went_back(directory, old, back), back
        with common.writing(directory, code=2):
            if settings["start_over"] and not old and directory.exists():
                put_aside(directory)
                found = None
            directory.mkdir(parents=True, exist_ok=True)
            lock = take_lock(directory)
        if records.load_record(directory) != found:
            lock.release()
            common.fail(f"another process just wrote in {directory}: run the same command again")
        origin = records.origin()
        if old.get("free"):  # else it is a new run, or its record was lost
            self.say_what_changed(old, origin)
        self.lock = lock
        if back is not None:
            with common.writing(directory):
                rewind.put_aside_later(directory, back)
        self.record = {
            **old, "phase": self.name, "status": "running", "reason": "", "next": self.command,
            "command": self.command, "begun_over": records.begun_over(old, settings["start_over"]),
            "settings": records.comparable(settings.defining, directory), "free": settings.free,
            "inputs": inputs, "host": socket.gethostname(), "pid": os.getpid(),
            "job": slurm.job_name(), **origin,
            "starts": [*old.get("starts", []), time.time()]}
        self.update_record()
        return self.record, saved_step

    def say_what_changed(self, old, origin):
        """Prints how the last attempt has ended, and what has changed since without counting for
        the result: settings, the source."""
        if old["status"] == "running":
            said = f"{self.name}: the last attempt was killed or ran out of memory"
            if "device_batch_size" in self.settings:
                said += " (if so, use a smaller --device_batch_size)"
            common.print0(said)
        of_one_call = ("start_over", "rewind", "try_out", "time_limit")
        keys = [k for k in self.settings.free if k in old["free"] and k not in of_one_call]
        before = {k: old["free"][k] for k in keys} | {"commit": old.get("commit")}
        now = {k: self.settings.free[k] for k in keys} | {"commit": origin["commit"]}
        changed = records.differences(before, now)
        if origin["difference"] != old.get("difference"):
            changed.append("the uncommitted part of the source code")
        for line in changed:
            common.print0(f"{self.name}: changed since the last attempt: {line}")

    def update_record(self, **facts):
        """Adds facts (for instance what a start-up probe chose) to the record; rank 0's on disk.
        Failure (code 1) where it cannot be written, or another process has taken over."""
        self.check_lock()
        self.record.update(facts, updated=time.time())
        if self.lock:
            text = json.dumps(self.record, indent=1)
            with common.writing(self.directory):
                common.atomic_write(self.directory / "phase.json", text)

    def check_lock(self):
        """Failure with code 1 where another process has taken the folder over: this one is an old
        attempt that has woken up, and must not write over the new one."""
        if self.lock and not self.lock.mine():
            common.fail(f"lost the lock of {self.lock.path.parent} to another process; stopping "
                        "without writing", code=1)

    # ---------------------------------------------------------------------------------------------
    # stopping

    def set_deadline(self, time_limit=None):
        """From here on it also stops when `time_limit` minutes have passed, and in time before the
        end of the Slurm job."""
        if time_limit is not None:
            self.limit = self.now() + 60.0 * time_limit
        end = slurm.end_time() if self.ranks.rank == 0 else None
        if end is not None:
            self.job_end, self.job_left = end, end - self.now()

    def deadline(self):
        """When to stop; infinity for never. Before the end of a Slurm job: three of the longest
        saves, two steps, half a minute (two minutes while no save was measured), but without the
        saves never more than a quarter of what the job had left: short jobs must get on, too."""
        step = self.clock.step_seconds() if self.clock and self.clock.steps else 0.0
        usual = 2 * step + (30.0 if self.longest_save else 120.0)
        margin = min(usual, max(0.0, self.job_left) / 4)
        return min(self.limit, self.job_end - margin - 3 * self.longest_save)

    def stop_reason(self):
        """Why this process should stop ("signal SIGTERM", "deadline"), or None. Not collective."""
        if self.lock and self.lock.lost:
            self.check_lock()
        if self.stop is None and self.now() >= self.deadline():
            self.stop = "deadline"
        if self.try_out and self.clock and len(self.clock.steps) == TRY_OUT_STEPS:
            self.stop = self.stop or TRIED_OUT
        return self.stop

    def going(self):
        """Whether nothing asks this process to stop. Not collective."""
        return self.stop_reason() is None

    def should_stop(self):
        """Why all ranks should stop, or None. Collective."""
        mine = self.stop_reason()
        if self.ranks.all_reduce_max(mine is not None):
            return next(filter(None, self.ranks.gather(mine)))  # not all may have been asked yet
        return None

    def should_save(self):
        """Whether the save interval is over on any rank. Collective. At once where the save in
        flight has failed, so that it is said."""
        due = self.clock.save_due() or self.save_error is not None
        return bool(self.ranks.all_reduce_max(due))

    # ---------------------------------------------------------------------------------------------
    # saving

    def save(self, step, model, optimizer, meta, wait=True):
        """
        Saves the checkpoint of `step`; collective, since the optimizer's shards are gathered. All
        is copied at once, for the loop goes on changing it; a thread writes while the training goes
        on, and only one save is ever in flight. wait=True waits until it is on disk.
        meta: JSON-able; settings, num_steps, seconds of training and the record are added to it.
        Failure (code 1) where this or the last save could not be written.
        """
        began = time.monotonic()
        if step != self.saved_step:
            self.finish_save()
            optim_state = optimizer.state_dict()
            if self.ranks.rank == 0:
                weights = {k: v.to("cpu", copy=True) for k, v in model.state_dict().items()}
                kept = ("settings", "inputs", "begun_over", *records.OF_A_SAVE)
                record = {k: self.record[k] for k in kept if k in self.record}
                meta = {**meta, "settings": self.settings, "num_steps": self.clock.num_steps,
                        "seconds": self.clock.seconds(), "record": record}
                work = (step, weights, optim_state, meta, began)
                self.saving = threading.Thread(target=self._write, args=work, name=f"save {step}")
                self.saving.start()
            self.saved_step = step
        if wait:
            self.finish_save()
        self.clock.saved(since=began)

    def _write(self, step, weights, optim_state, meta, began):
        try:
            os.fsync(self.metrics.fileno())  # the steps before this one will not run again
            checkpoint.save(self.directory, step, weights, optim_state, meta,
                            self.record["free"]["keep"], self.lock.mine)
            self.longest_save = max(self.longest_save, time.monotonic() - began)
        except Exception as e:  # noqa: BLE001  (the main thread tells it: see finish_save)
            self.save_error = e

    def finish_save(self):
        """Waits for the save in flight. Failure (code 1) if it could not be written; what was good
        before stays."""
        if self.saving:
            self.saving.join()
            self.saving = None
        if self.save_error is None:
            return
        error, self.save_error = self.save_error, None
        self.check_lock()
        checkpoint.sweep(self.directory, self.lock.mine)
        if isinstance(error, FloatingPointError):
            rewind.give_up(self, f"the weights were not finite at step {self.saved_step}, so they "
                           f"were not saved ({error})", self.saved_step)
        free = shutil.disk_usage(self.directory).free / 1e9
        common.fail(f"could not save step {self.saved_step} in {self.directory}: {error}; "
                    f"{self.last_good()}; {free:.1f} GB are free: free some space or make it "
                    "writable, and run the same command again", code=1)

    def last_good(self):
        """example: "the last good checkpoint is that of step 400 in .../d4" """
        saved = checkpoint.newest(self.directory)
        if saved is None:
            return f"there is no earlier checkpoint in {self.directory}"
        return f"the last good checkpoint is that of step {saved} in {self.directory}"

    # ---------------------------------------------------------------------------------------------
    # the loop

    def begin_loop(self, step, num_steps, seconds, flops_per_token=0.0, peak_flops=None):
        """The training loop begins at `step` of num_steps, after `seconds` of training in earlier
        attempts. What a death has left is dropped: half a save, metrics of steps that will run
        again. peak_flops: FLOP/s of a device."""
        free = self.record["free"]
        self.set_deadline(None if self.try_out else free["time_limit"])
        self.clock = Clock(num_steps, seconds, 60.0 * free["save_minutes"], flops_per_token,
                           peak_flops and peak_flops * self.ranks.world)
        if self.ranks.rank == 0:
            checkpoint.sweep(self.directory, self.lock.mine)
            # always a new file: a line that an old attempt still writes goes to the old one
            path = self.directory / "metrics.jsonl"
            lines = common.read_json_lines(path)
            kept = [r for r in lines if r.get("step", step) < step]
            if not self.record.pop("going_back", False):  # what that skips was not lost
                self.record["restarts"] = records.restarts(self.record, lines, step, seconds)
            with common.writing(path):
                common.atomic_write(path, "".join(json.dumps(r) + "\n" for r in kept))
                self.metrics = open(path, "a", 1, encoding="utf-8")  # noqa: SIM115
            self.update_record(num_steps=num_steps)

    def log(self, **line):
        """Appends a line to metrics.jsonl. Failure (code 1) where it cannot be written."""
        if self.ranks.rank == 0:
            with common.writing(self.metrics.name):
                self.metrics.write(json.dumps(line) + "\n")

    def log_step(self, step, shown, tokens, /, **metrics):
        """A training step has ended, `step` of them are done: logs it, shows progress and time
        left. shown: what to show besides; tokens: how many it has trained on."""
        reading = self.clock.tick(tokens)
        self.log(kind="train", step=step - 1, **metrics, clock=reading)
        self.clock.show(step, shown, reading)
        if words := bands.look(self, step):
            common.print0(words)

    # ---------------------------------------------------------------------------------------------
    # the end

    def exit_done(self, **facts):
        """Marks the phase as done, with facts for the report, and ends the process with 0."""
        if self.try_out:  # of fewer steps than it would try
            self.exit_interrupted(TRIED_OUT)
        self.update_record(**facts)
        self.leave(0, "done")

    def exit_interrupted(self, reason):
        """Marks the phase as saved and stopped, and ends the process with 75."""
        why = reason.replace("deadline", "time limit").replace("signal SIGINT", "Ctrl-C")
        said = f"stopped: {why}"
        if self.clock:  # it trains
            self.finish_save()
            if reason == TRIED_OUT:
                self.leave(0, TRIED_OUT, facts=trial.facts_of(self))
            saved = "nothing saved yet"
            if self.saved_step is not None:
                saved = f"saved at step {self.saved_step:,} of {self.clock.num_steps:,}"
            reason = f"{reason}: {saved}"
            said = f"stopped ({why}): {saved}"
        common.print0(f"{said}; run the same command again to resume")
        self.leave(75, reason)

    def leave(self, code, reason, next_command=None, facts=None):
        """Ends the process, as all ranks do. Under torchrun with 0 where it would start a worker
        again that says 75, or print a page about one that says 2 to a launcher who knows."""
        told = self.close(code, reason, next_command, facts)
        joined = self.ranks.patient_group is not None
        self.ranks.leave()
        # without a group this rank may be the only one that refuses: torchrun has to end the others
        launcher_knows = joined and "NANOCHAT_OUTCOME" in os.environ
        if under_torchrun() and told and (code == 75 or launcher_knows):
            code = 0
        self.end(code, at_once=joined)

    def end(self, code, at_once=False):
        """Ends the process with `code`; at_once: without winding Python up."""
        for number in self.signals:
            # told once more while Python winds up, when its handlers are gone, it would die of it
            signal.signal(number, signal.SIG_IGN)
        if at_once:
            sys.stdout.flush()
            sys.stderr.flush()
            # A thread of gloo may outlive its group and abort the process while Python winds up
            # ("terminate called without an active exception"): torchrun would call it failed.
            os._exit(code)
        raise SystemExit(code)

    def close(self, code, reason, next_command=None, facts=None):
        """Records how the run ends and gives the lock back, after the save in flight has ended.
        -> False where the launcher could not be told how (see common.leave_outcome)"""
        if self.saving:
            self.saving.join()
        ours = self.lock is None or self.lock.mine()
        try:
            if self.partial and code != 0 and ours:
                with open(self.partial, "a", encoding="utf-8") as f:
                    # a full disk may have torn its last line
                    f.write("\n" + json.dumps({"code": code, "reason": reason}) + "\n")
            if self.directory and self.lock and ours:
                status = {0: "done", 75: "interrupted"}.get(code, "failed")
                following = None if code == 0 else next_command or self.command
                self.update_record(status=status, code=code, reason=reason, next=following)
        except (OSError, common.Failure) as e:  # the message and the exit code have to get out
            print(e, file=sys.stderr, flush=True)
        if self.lock:
            self.lock.release()
        if self.ranks.rank != 0 and not self.alone_to_say:
            return True
        return common.leave_outcome(code, reason, next_command or self.command, **(facts or {}))

    def end_process(self, kind, value, trace):
        """sys.excepthook: what nobody has caught ends the run."""
        value = common.explained(value, self.name, self.settings or {}, self.stop)
        # a rank that has joined the others, and has not got this from rank 0, may be the only one
        joined = self.ranks.patient_group is not None
        refuses_alone = joined and isinstance(value, common.Failure) and not value.of_rank_0
        failure = common.show_uncaught(kind, value, trace, refuses_alone)
        self.alone_to_say = failure.code == 1 or (failure.code == 2 and refuses_alone)
        reason = failure.message
        lost = "DistBackendError" in kind.__name__ or "connection" in str(value).lower()
        if lost and self.ranks.world > 1:
            reason = f"another rank died or cannot be reached ({str(value)[-150:]})"
        if failure.code in (2, 75):
            self.leave(failure.code, reason, failure.next_command, failure.facts)
        # the others may wait for this rank: to leave their group in order could take for ever
        self.close(failure.code, reason, failure.next_command, failure.facts)
        self.end(failure.code)

def under_torchrun():
    return "TORCHELASTIC_RUN_ID" in os.environ
