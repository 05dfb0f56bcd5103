"""launch.py: which phases run and how, signals, exit codes, retries; with processes that only
pretend, and a few real ones."""
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import common
import launch
import pipeline
import plan as plan_of
import run as launch_run
import slurm
import status
import trial
from conftest import REPO, ends, environment, script, wait_for
from lock import living_holder

def given(*flags, data="toy", depth="4", phases=None):
    """A Plan of all phases, as speedrun.sh lists them."""
    words = [data, depth]
    for phase in pipeline.PHASES:
        words += ["--run", phase.name, phase.script]
    return plan_of.make_plan([*words, "--given", *flags])

class FakeProcess:
    """A process that takes `ticks` waits until it ends with `code`; signals are noted."""
    pid = 4711

    def __init__(self, code=0, ticks=0, at_tick=None):
        self.code, self.ticks, self.at_tick, self.signals = code, ticks, at_tick, []

    def wait(self, timeout):
        if self.ticks == 0:
            return self.code
        self.ticks -= 1
        if self.at_tick:
            self.at_tick(self)
        raise subprocess.TimeoutExpired("fake", timeout)

    def send_signal(self, signum):
        self.signals.append(signum)

@pytest.fixture
def supervise(tmp_path):
    """supervise(codes or FakeProcesses) -> a Supervisor whose processes these are, in turn;
    .commands are those that it was asked to start. A process may leave an outcome."""
    def make(*processes):
        supervisor = launch.Supervisor(tmp_path / "outcome")
        supervisor.commands = []
        left = [p if isinstance(p, FakeProcess) else FakeProcess(p) for p in processes]

        def popen(command, **more):
            supervisor.commands.append(command)
            return left.pop(0)
        supervisor.popen = popen
        return supervisor
    return make

def leaves(outcome):
    """What a FakeProcess does at its first tick: it leaves an outcome."""
    def at_tick(process):
        path = leaves.path
        path.write_text(json.dumps(outcome))
    return at_tick

# ---- what is run

def test_flags_choose_the_phases():
    assert given().names == [p.name for p in pipeline.PHASES]
    assert given("--from=sft", "--skip-rl-eval").names == ["sft", "sft-eval", "rl", "report"]
    assert given("--only=base,tok").names == ["tok", "base"]
    assert given("--skip-trial").names == given().names

@pytest.mark.parametrize("flags,says", [
    (["--skip-nothing"], "no such phase"), (["--from=x"], "no such phase"),
    (["--only=base,x"], "no such phase"), (["--depht=4"], "unknown flag"),
    (["--from="], "no such phase: ''"), (["--only="], "no such phase"),
    (["--from=trial"], "no such phase"), (["--depth=4", "5"], "unknown flag: 5 ("),
    (["--nproc", "--dry-run"], "unknown flag: --nproc ("), (["--dry-run=1"], "unknown flag"),
    (["--skip-rl=1"], "no such phase: 'rl='"),
    (["--nproc=0"], "--nproc takes"), (["--nproc=99999999999999999999"], "--nproc takes"),
    (["--from=mid", "--only=tok"], "nothing to run"),
    (["--", "--rll.num_steps=4"], "no phase 'rll'"), (["--", "--rl.num_stepz=4"], "--num_steps"),
    (["--", "--depth=6"], "--depth cannot stand behind"),
    (["--", "--base.tag=wide"], "--tag cannot stand behind"),
    (["--", "--num_stepz=4"], "--num_steps"),
    (["--", "--base.samples=4"], "the phase base has no setting 'samples'"),
    (["--", "--rl.num_steps=x"], "--rl.num_steps takes a whole number"),
    (["--", "--matrix_lr=fast"], "--matrix_lr takes a number"),
    (["--", "--top_k=4"], "no phase has"),
    (["--nproc=-1"], "--nproc takes"), (["--nproc=abc"], "--nproc takes"),
    (["--nproc="], "--nproc takes"), (["--only=*"], "no such phase: '*'"),
    (["--depth="], "--depth takes"), (["--depth=-1"], "--depth takes"), (["--slurm"], "sbatch"),
    (["--", "--tok.vocab_size=-1"], "--tok.vocab_size must be"),
    (["--", "--base.arch=foo"], "--base.arch must be one of"),
    (["--", "--nosuch.x=1"], "no phase 'nosuch'"), (["--", "--start_over=True"], "its phase"),
    (["--", "--sft.max_steps=-5"], "max_steps"), (["--", "seed=4"], "--key=value")])
def test_what_makes_no_sense_is_one_line(flags, says, capsys):
    with ends() as end:
        given(*flags)
    said = capsys.readouterr().err
    assert end.code == 2 and says in said and said.count("\n") == 1

@pytest.mark.parametrize("gpus, nproc", [(0, 1), (1, 1), (2, 2), (3, 2), (6, 4), (8, 8)])
def test_as_many_processes_as_gpus_can_share_a_batch(gpus, nproc, monkeypatch, capsys):
    monkeypatch.setattr(trial, "gpu_names", lambda: ["H100"] * gpus)
    assert given().nproc == nproc and given(f"--nproc={gpus or 1}").nproc == (gpus or 1)
    said = capsys.readouterr().out
    assert said.count(f"{nproc} of {gpus} GPUs are used") == (nproc < gpus) == said.count("\n")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", str(gpus) if gpus else "")
    assert given("--slurm").nproc == nproc

@pytest.mark.parametrize("visible, nproc", [(None, 8), ("0,1,2,3", 4), ("2", 1), ("", 1),
                                            ("-1", 1), ("GPU-8f2, GPU-9a1", 2), ("0,1,-1,2,3", 2),
                                            ("NoDevFiles", 1)])
def test_only_the_gpus_that_are_visible_count(visible, nproc, monkeypatch):
    monkeypatch.setattr(trial, "gpu_names", lambda: ["H100"] * 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert given().nproc == nproc and given("--", "--device=cpu").nproc == 1

def test_what_is_given_beside_conversations_holds(tmp_path):
    chats = tmp_path / "chats.jsonl"
    chats.write_text("x" * 4_000_000)
    usual = [f"--mixture={chats}*1", f"--held_out={chats}"]
    asked = given(f"--chats={chats}").words("sft")
    assert [word for word in asked if word in usual] == usual
    asked = given(f"--chats={chats}", "--", "--mixture=gsm8k", "--held-out=smoltalk",
                  "--mid.mixture=arc_easy")
    for name, mixture in (("sft", "gsm8k"), ("mid", "arc_easy")):
        words = asked.words(name)
        given_last = [[w for w in words if w.startswith(key)][-1]
                      for key in ("--mixture=", "--held_out=")]
        assert given_last == [f"--mixture={mixture}", "--held_out=smoltalk"]

@pytest.mark.parametrize("depth", ["0", "1000", "x", ""])
def test_depth_has_a_range(depth):
    with ends() as end:
        given(depth=depth)
    assert end.code == 2

def test_settings_go_to_the_phases_that_have_them_those_for_one_phase_last():
    plan = given("--", "--num_steps=9", "--rl.num-steps=5", "--mixture=gsm8k",
                 "--sft.mixture=gsm8k,arc_easy*2", "--mid-eval.max_items=7")
    assert plan.words("base")[-1] == "--num_steps=9" and "mixture" not in str(plan.words("base"))
    assert plan.words("rl")[-2:] == ["--num_steps=9", "--num_steps=5"]
    assert plan.words("sft")[-2:] == ["--mixture=gsm8k", "--mixture=gsm8k,arc_easy*2"]
    assert plan.words("data")[-3:] == ["--rl.num_steps=5", "--sft.mixture=gsm8k,arc_easy*2",
                                       "--mid-eval.max_items=7"], "it brings what they read"
    assert plan.words("mid-eval")[-1] == "--max_items=7"
    assert given("--skip-sft").words("data")[2].endswith(",mid,mid-eval,sft-eval,rl,rl-eval,report")
    everything = f"--phases={','.join(phase.name for phase in pipeline.PHASES)}"
    for only in ("data", "data,report"):
        assert given(f"--only={only}").words("data")[2] == everything, "what all of them read"
    assert plan.words("rl-eval")[-1] != "--max_items=7"

def test_what_starts_a_phase_over_is_a_whole_command():
    hint = "other settings: give the old ones, or -- --sft.start_over=True to start anew"
    plan = given("--depth=4", "--only=mid,sft", "--nproc=1", "--", "--seed=5")
    assert plan_of.start_over_command(plan, hint) == (
        "bash speedrun.sh --depth=4 --only=mid,sft --nproc=1 -- --seed=5 --sft.start_over=True")
    plan = given("--nproc=1", "--from=rl", "--skip-report")
    assert plan_of.start_over_command(plan, hint) == (
        "bash speedrun.sh --nproc=1 --from=sft -- --sft.start_over=True")
    assert plan_of.start_over_command(plan, "the disk is full") is None

@pytest.mark.parametrize("flags", [
    ("--nproc=2", "--only=sft,rl", "--", "--sft.mixture=my chats.jsonl*2", "--seed=5"),
    ("--depth=3", "--skip-report", "--nproc=1")])
def test_who_looks_at_the_inputs_has_the_same_plan(flags):
    plan = given(*flags)
    assert plan_of.make_plan(plan.input_check()[1:]) == plan
    over = plan_of.start_over_command(plan, "-- --sft.start_over=True")
    assert "--check-inputs" not in over

def test_one_process_several_ranks():
    one, two = given("--nproc=1"), given("--nproc=2")
    assert launch.command_for(one, "base", ["x.py"]) == ["python", "x.py"]
    command = launch.command_for(two, "base", ["x.py"])
    assert command[:3] == ["torchrun", "--standalone", "--nproc_per_node=2"]
    assert launch.command_for(two, "tok", ["x.py"]) == ["python", "x.py"]

# ---- one command

def test_exit_codes(supervise):
    supervisor = supervise(0, 2, 75, -9, -15, -10, 139, 130)
    codes = [supervisor.run(["python", "x.py"])[0] for _ in range(8)]
    assert codes == [0, 2, 75, 137, 75, 75, 139, 130], "killed by TERM or USR1: it had not begun"

def test_what_the_phase_has_said_counts_more_than_its_exit_code(supervise, tmp_path):
    leaves.path = tmp_path / "outcome"
    process = FakeProcess(code=1, ticks=1, at_tick=leaves({"code": 75, "reason": "deadline"}))
    supervisor = supervise(process, 1)
    assert supervisor.run(["torchrun", "x.py"]) == (75, {"code": 75, "reason": "deadline"})
    assert supervisor.run(["torchrun", "x.py"]) == (1, {}), "the next one does not inherit it"

def test_who_saved_because_another_process_died_has_failed(supervise, tmp_path, monkeypatch):
    """As when a port is taken: torchrun or srun tells the others, and they save. As good as the
    same command is, it would lose the same process again, without end."""
    monkeypatch.setattr(launch.Supervisor.was_told, "__defaults__", (0.2,))
    leaves.path = tmp_path / "outcome"
    saved = {"code": 75, "reason": "signal SIGTERM: saved at step 4 of 9"}

    def ended(command, code, told=False):
        process = FakeProcess(code, ticks=1, at_tick=leaves(saved))
        supervisor = supervise(process)
        supervisor.stopping = told
        return supervisor.run([command, "x.py"])
    for command in ("srun", "torchrun"):
        code, outcome = ended(command, 1)
        assert code == outcome["code"] == 1
        assert "one of its processes has died" in outcome["reason"]
        assert outcome["reason"].endswith(saved["reason"])
        assert ended(command, 1, told=True)[0] == 75 and ended(command, 0)[0] == 75
        assert ended(command, 75)[0] == 75, "one process that somebody has sent a signal to"

def test_a_signal_is_passed_on_again_and_again_until_the_phase_has_ended(supervise):
    def at_tick(process):
        if process.ticks == 3:
            supervisor.on_signal(signal.SIGUSR1, None)
    process = FakeProcess(ticks=5, at_tick=at_tick)
    supervisor = supervise(process)
    code, _ = supervisor.run(["python", "x.py"])
    assert code == 75 and process.signals == [signal.SIGTERM] * 5
    assert supervisor.stopping and not supervisor.terminated

def test_a_signal_before_the_phase_stood_reaches_it(supervise):
    process = FakeProcess(ticks=1)
    supervisor = supervise(process)
    supervisor.on_signal(signal.SIGTERM, None)
    supervisor.run(["srun", "x.py"])
    assert process.signals == [signal.SIGUSR1] * 2, "srun passes USR1 on to all processes"
    assert supervisor.terminated

def test_what_runs_in_a_container_knows_the_end_of_its_job(supervise, monkeypatch):
    """It has no scontrol there to ask for it."""
    told = []
    supervisor = supervise()
    supervisor.popen = lambda command, env, **more: (told.append(env.get("SLURM_JOB_END_TIME")),
                                                     FakeProcess())[1]
    monkeypatch.setattr(slurm, "end_time", lambda: 1234.5)
    supervisor.run(["python", "x.py"])
    monkeypatch.setenv("NANOCHAT_CONTAINER", "apptainer exec x.sif")
    supervisor.run(["apptainer", "exec", "x.sif", "python", "x.py"])
    assert told == [None, "1234"]

def test_what_runs_in_a_container_knows_that_the_job_of_a_lock_is_over(state, monkeypatch):
    """A node was lost, and the successor must not wait for it, nor be refused."""
    folder = pipeline.state_path("base", "toy", "d4")
    folder.mkdir(parents=True)
    lock = {"token": "x", "host": "lost", "pid": 7, "job": "41", "restart": "0"}
    (folder / "lock.json").write_text(json.dumps(lock))
    assert living_holder(folder), "without Slurm nobody knows"
    monkeypatch.setenv("NANOCHAT_CONTAINER", "apptainer exec x.sif")
    monkeypatch.setenv("NANOCHAT_JOB_OVER", "")
    with monkeypatch.context() as outside:
        outside.setattr(slurm, "show_jobs", lambda job: ([], "Invalid job id specified"))
        outside.setattr(launch, "run_phase", lambda *args: (1, [], {}))
        launch.start(given("--nproc=1"), launch.Supervisor(folder / "outcome"), "base", ["x.py"])
    assert living_holder(folder) is None, "what the launcher has asked is known inside"

def test_torchrun_does_not_hear_of_signals_its_workers_do(supervise, monkeypatch):
    told = []
    monkeypatch.setattr("supervisor.running", lambda *asked: [asked])
    monkeypatch.setattr(os, "kill", lambda *args: told.append(args))
    process = FakeProcess(ticks=1)
    supervisor = supervise(process)
    supervisor.on_signal(signal.SIGTERM, None)
    supervisor.run(["torchrun", "x.py"])
    assert not process.signals and told == [(("x.py", 4711), signal.SIGTERM)] * 2

def test_workers_that_a_signal_kills_before_they_can_hear_it_had_not_begun(supervise, tmp_path):
    """Of them torchrun says 1."""
    leaves.path = tmp_path / "outcome"
    failed = FakeProcess(1, 1, leaves({"code": 1, "reason": "the disk is full"}))
    supervisor = supervise(1, failed, 1)
    supervisor.stopping = True
    assert supervisor.run(["torchrun", "x.py"])[0] == 75
    assert supervisor.run(["torchrun", "x.py"])[0] == 1, "it says itself that it has failed"
    assert supervisor.run(["python", "x.py"])[0] == 1

def test_torchrun_has_nothing_to_say_about_threads(supervise, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    supervisor, found = supervise(), []

    def popen(command, env, **more):
        found.append(env.get("OMP_NUM_THREADS"))
        return FakeProcess(0)
    supervisor.popen = popen
    supervisor.run(["torchrun", "x.py"])
    supervisor.run(["python", "x.py"])
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    supervisor.run(["torchrun", "x.py"])
    assert found == ["1", None, "3"]

def test_out_of_memory_is_tried_once_more_with_fewer_rows(supervise, tmp_path):
    leaves.path = tmp_path / "outcome"
    retry = {"code": 1, "reason": "ran out of memory", "retry_with": ["--device_batch_size=4"]}
    plan = given("--nproc=1")
    supervisor = supervise(FakeProcess(1, 1, leaves(retry)), 0)
    code, added, _ = launch.run_phase(plan, supervisor, "base", ["base_train.py"])
    assert (code, added) == (0, ["--device_batch_size=4"])
    assert supervisor.commands[1][-1] == "--device_batch_size=4"
    supervisor = supervise(*[FakeProcess(1, 1, leaves(retry)) for _ in range(3)])
    code, _, _ = launch.run_phase(plan, supervisor, "base", ["base_train.py"])
    assert code == 1 and len(supervisor.commands) == 2, "once"

def test_a_phase_that_was_killed_is_named_as_probably_out_of_memory(supervise, capsys):
    launch.run_phase(given("--nproc=1"), supervise(-9), "base", ["base_train.py"])
    said = capsys.readouterr().err
    assert "killed (SIGKILL), probably because the host ran out of memory" in said

# ---- all of them

@pytest.fixture
def run_all(supervise, state, monkeypatch):
    """run_all({phase: exit code}, *flags) -> (exit code, last line, phases that were started)"""
    monkeypatch.setattr(launch, "run_checks", lambda plan, supervisor: 0)

    def run(codes, *flags, trial=("--skip-trial",)):
        plan = given("--nproc=1", *trial, *flags)
        started = []

        def popen(command, **more):
            started.append(command[1])
            named = {p.script: p.name for p in pipeline.PHASES if p.kind != "evaluation"}
            named["base_eval.py"] = "base-eval"
            return FakeProcess(codes.get(named.get(command[1]), 0))
        supervisor = supervise()
        supervisor.popen = popen
        code, line = launch.run_all(plan, supervisor)
        return code, line, started
    return run

def test_before_the_first_training_all_are_tried_out(run_all, monkeypatch):
    tried = []
    monkeypatch.setattr(trial, "try_out", lambda plan, run_phase: (tried.append(1), (75, {}))[1])
    assert run_all({})[0] == 0 and not tried, "not with --skip-trial"
    code, line, started = run_all({}, trial=())
    assert tried == [1] and code == 75 and line == "stopped while trying out the trainings to come"
    assert started == ["prepare_data.py", "tok_train.py"]

def test_a_signal_while_the_inputs_are_looked_at_is_no_failure(run_all, monkeypatch):
    monkeypatch.setattr(launch, "run_checks", lambda plan, supervisor: 75)
    assert run_all({}) == (75, "stopped before the first phase", [])

def test_all_done(run_all):
    code, line, started = run_all({})
    assert code == 0 and line.startswith("all done") and len(started) == 11

@pytest.mark.parametrize("failure", [1, 2])
def test_an_evaluation_that_fails_does_not_stop_the_run_and_the_code_says_so(run_all, failure):
    code, line, started = run_all({"base-eval": failure})
    assert code == 1 and "these failed: base-eval;" in line
    assert started[-4:] == ["chat_eval.py", "chat_rl.py", "chat_eval.py", "report.py"]

@pytest.mark.parametrize("failure", [2, 3, 139])
def test_a_training_that_fails_does_stop_it_and_the_report_is_written(run_all, failure):
    code, line, started = run_all({"mid": failure})
    assert code == failure and line.startswith(f"mid failed (exit {failure}):")
    assert started[-2:] == ["mid_train.py", "report.py"]
    assert run_all({"mid": failure}, "--skip-report")[2][-1] == "mid_train.py"

def test_the_last_line_names_the_reason_which_torchrun_buries(supervise, state, monkeypatch,
                                                              tmp_path):
    monkeypatch.setattr(launch, "run_checks", lambda plan, supervisor: 0)
    leaves.path = tmp_path / "outcome"
    process = FakeProcess(1, 1, leaves({"code": 2, "reason": "--depth must be 1 to 100, not 0"}))
    plan = given("--nproc=2", "--skip-trial", "--only=base")
    code, line = launch.run_all(plan, supervise(process))
    assert code == 2 and line == (
        "base failed (exit 2): --depth must be 1 to 100, not 0; fix that and run the same "
        "command again")

def test_what_is_interrupted_ends_the_run_with_75(run_all):
    code, line, started = run_all({"mid": 75})
    assert code == 75 and started[-1] == "mid_train.py"
    assert line == "stopped in mid with everything saved"

def test_nothing_more_is_started_in_nodes_that_slurm_has_given_to_the_next_attempt(
        run_all, monkeypatch, capsys):
    for name, value in {"SLURM_NNODES": "1", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch.slurm, "given_up", lambda: True)
    monkeypatch.setattr(launch, "check_nodes", lambda plan, supervisor: 0)
    monkeypatch.setattr(launch, "run_phase", lambda *call: pytest.fail("it was started"))
    with ends() as end:
        run_all({}, "--slurm")
    assert end.code == 1 and "going no further" in capsys.readouterr().err

def test_what_a_second_ctrl_c_has_ended_is_not_called_saved(run_all):
    code, line, started = run_all({"mid": 130})
    assert code == 75 and started[-1] == "mid_train.py" and "saved" not in line
    assert line.startswith("mid was stopped at once by a second Ctrl-C; it resumes from its last")

def test_a_second_ctrl_c_in_a_trial_or_a_check_is_no_failure(run_all, monkeypatch):
    monkeypatch.setattr(launch.trial, "try_out", lambda plan, run_phase: (130, {}))
    assert run_all({}, trial=())[:2] == (75, "stopped while trying out the trainings to come")
    monkeypatch.setattr(launch, "run_checks", lambda plan, supervisor: 130)
    assert run_all({})[:2] == (75, "stopped before the first phase")

# ---- done already, starting over, the process of a killed launcher

@pytest.fixture
def record(state):
    def write(name="base", **facts):
        folder = pipeline.state_path(name, "toy", "d4")
        usual = {"settings": {}, "inputs": {}, "free": {}, "status": "done", "updated": 0.0}
        common.atomic_write(folder / "phase.json", json.dumps({**usual, **facts}))
        if {**usual, **facts}["status"] == "done":
            common.atomic_write(folder / "manifest_000100.json", "{}")
            common.atomic_write(folder / "meta_000100.json", '{"num_steps": 100}')
        return folder
    return write

def test_only_a_command_that_went_on_with_something_is_kept(supervise, record, state):
    note = pipeline.command_file("toy", "d4")

    def start(name, code):
        launch.start(given(), supervise(code), name, [pipeline.find_phase(name).script])
        return "commands" in common.read_json(note)
    record("base")
    assert not start("base", 0), "it was done, so there was nothing left to do"
    assert not start("mid", 2), "a command that was refused would be refused again"
    assert common.read_json(note)["ends"]["mid"]["code"] == 2, "but that it was is known"
    assert start("mid", 75)
    note.unlink()
    assert start("mid", 1) and start("mid", 0) and common.read_json(note)["ends"] == {}
    note.write_text('{"commands": null, "ends": 5}')
    assert start("mid", 1), "what it cannot read costs nothing"

def test_the_process_of_a_killed_launcher_is_given_time_to_save(monkeypatch, capsys):
    holders = [{"pid": 1, "host": "here"}] * 4 + [None]
    monkeypatch.setattr(launch, "living_holder", lambda folder: holders.pop(0))
    slept = []
    supervisor = SimpleNamespace(stopping=False)
    launch.wait_for_holder("folder", supervisor, slept.append)
    assert len(slept) == 4
    assert capsys.readouterr().out.startswith("waiting up to 75 s for process 1 on here, which ")
    monkeypatch.setattr(launch, "living_holder", lambda folder: {"pid": 1, "host": "here"})
    launch.wait_for_holder("folder", supervisor, slept.append)
    assert sum(slept) <= 4 + launch.PATIENCE, "but not for ever"

def test_every_phase_waits_for_the_process_of_a_killed_launcher(run_all, monkeypatch):
    waited = []
    monkeypatch.setattr(launch, "wait_for_holder", lambda folder, _: waited.append(folder))
    run_all({})
    assert waited == [given().lock_folder(phase.name) for phase in pipeline.PHASES]
    result = given().folder("sft-eval")
    assert given().lock_folder("sft-eval") == pipeline.lock_of_result(result) in waited

def test_a_signal_ends_the_wait_and_nothing_is_started(supervise, monkeypatch, state):
    monkeypatch.setattr(launch, "living_holder", lambda folder: {"pid": 1, "host": "here"})
    supervisor = supervise()
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        assert len(waits) < 3, "it goes on waiting"
        supervisor.on_signal(signal.SIGUSR1, None)
    monkeypatch.setattr(launch.wait_for_holder, "__defaults__", (sleep,))
    assert launch.start(given("--nproc=1"), supervisor, "base", ["base_train.py"])[0] == 75
    assert len(waits) == 1 and not supervisor.commands

def next_after(done, **others):
    """The next command that status.py names, where these phases are done."""
    states = {p.name: ("done" if p.name in done else others.get(p.name, "absent"), "")
              for p in pipeline.PHASES[:-1]}
    return status.next_command(states, "toy", "d4")

def test_status_names_what_speedrun_was_given_last(supervise, record):
    flags = ["--only=base,mid", "--depth=4", "--", "--mid.mixture=my chats.jsonl"]
    record("base", status="interrupted", next="python base_train.py --depth=4")
    launch.start(given(*flags), supervise(0), "base", ["base_train.py"])
    command = "bash speedrun.sh --only=base,mid --depth=4 -- '--mid.mixture=my chats.jsonl'"
    assert next_after(["data", "tok"], base="half") == command
    assert next_after(["data", "tok", "base"]) == command, "which goes on with mid"
    done = ["data", "tok", "base", "mid"]
    assert next_after(done) == "bash speedrun.sh --data=toy --depth=4", "it does not run sft"
    record("sft", status="failed", next="python chat_sft.py --tag=d4")
    assert next_after(done, sft="failed") == "python chat_sft.py --tag=d4", "as it was started"

def test_a_command_whose_phases_are_done_is_not_what_goes_on(supervise, record):
    record("base")
    launch.start(given("--skip-rl"), supervise(0), "mid", ["mid_train.py"])
    launch.start(given("--only=base"), supervise(0), "base", ["base_train.py"])
    assert next_after(["data", "tok", "base"], mid="half") == "bash speedrun.sh --skip-rl"

def test_a_signal_after_the_end_changes_nothing(state, monkeypatch):
    plan = given()
    monkeypatch.setattr(sys, "argv", [str(REPO / "launch.py")])
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("NANOCHAT_OUTCOME", "")  # which it sets
    monkeypatch.setattr(launch, "make_plan", lambda words: plan)
    monkeypatch.setattr(launch, "run_all", lambda plan, supervisor: (0, "all done"))
    monkeypatch.setattr(launch.subprocess, "run",
                        lambda *args, **more: SimpleNamespace(stdout="next: chat\n"))
    numbers = launch.common.stop_signals()
    before = [signal.getsignal(number) for number in numbers]
    try:
        assert launch.main() == 0
        assert all(signal.getsignal(number) == signal.SIG_IGN for number in numbers)
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)

# ---- trying out

def outcome(**changes):
    return {"code": 0, "reason": "tried out", "seconds": 2.0, "num_steps": 100, "evals": 5,
            "first_seconds": 0.0, "save_seconds": 0.0, "eval_seconds": 10.0, "keep": 1,
            "bytes": 1000, **changes}

@pytest.fixture
def try_out(state, monkeypatch):
    """try_out(outcomes, *flags) -> (result of trial.try_out, phases that were tried)"""
    (state / "toy/try_out_d4").mkdir(parents=True)
    monkeypatch.setattr(trial, "gpu_names", list)

    def run(outcomes, *flags):
        plan, tried = given("--nproc=1", *flags), []

        def run_phase(name, words):
            assert words[-1] == "--try_out=True"
            tried.append(name)
            found = outcomes.get(name, outcome())
            return found.get("code", 0), found.get("added", []), found
        return trial.try_out(plan, run_phase), tried
    return run

def test_what_is_to_come_is_tried_and_not_again_when_the_run_goes_on(
        try_out, state, record, capsys, monkeypatch):
    record("base")
    fits = {"mid": outcome(added=["--device_batch_size=4"]), "mid-eval": {"reason": "tried out"}}
    (code, added), tried = try_out(fits)
    assert code == 0 and tried == ["mid", "sft", "rl", "mid-eval"], "base is done"
    assert added["mid"] == ["--device_batch_size=4"] and added["sft"] == []
    said = capsys.readouterr().out
    assert "the trainings left take about 12m30s (mid 4m10s, sft 4m10s, rl at most 4m10s)" in said
    assert not (state / "toy/try_out_d4").exists()
    assert try_out(fits) == ((code, added), [])
    assert "12m30s" in capsys.readouterr().out
    monkeypatch.setattr(common, "cores", lambda: 640)
    assert try_out(fits)[1] == tried, "nor does what another machine has tried count"
    assert try_out({}, "--", "--seed=2")[1] == tried, "with other settings it is tried anew"

def test_the_time_left_follows_from_what_is_saved(try_out, record, capsys):
    folder = record("base", status="interrupted")
    (folder / "manifest_000075.json").write_text("{}")
    try_out({}, "--only=base")
    assert "the trainings left take about 1m02s (base 1m02s)" in capsys.readouterr().out

def test_it_is_held_against_the_time_of_the_job(try_out, monkeypatch, capsys):
    monkeypatch.setattr(trial.slurm, "end_time", lambda: trial.time.time() + 60)
    try_out({}, "--only=base")
    said = capsys.readouterr().out
    assert re.search("this job has 5.s left: it will stop with everything saved and continue", said)

def test_the_time_counts_the_first_step_the_measurements_and_their_saves(
        try_out, record, capsys):
    slow = outcome(first_seconds=60.0, save_seconds=4.0)
    try_out({"base": slow}, "--only=base")
    assert "the trainings left take about 5m30s" in capsys.readouterr().out
    folder = record("base", status="interrupted")
    (folder / "manifest_000050.json").write_text("{}")
    try_out({"base": slow}, "--only=base")
    assert "the trainings left take about 3m15s" in capsys.readouterr().out, "it compiles again"

def test_a_step_that_compiles_is_not_taken_for_the_others(tmp_path):
    """As measured on a CPU: the second step is slower than those after it, too."""
    steps = [17.2, 4.4, 3.3, 3.2]
    run = SimpleNamespace(
        ranks=SimpleNamespace(rank=0), clock=SimpleNamespace(num_steps=1001, steps=steps),
        record={"free": {"eval_every": 250, "keep": 1}}, eval_seconds=9.0, longest_save=0.5,
        directory=tmp_path, saved_step=4)
    trial.checkpoint.save(tmp_path, 4, {}, {}, {})
    facts = trial.facts_of(run)
    assert (facts["first_seconds"], facts["seconds"]) == (17.2, 3.3)
    assert (facts["evals"], facts["eval_seconds"], facts["save_seconds"]) == (6, 9.0, 0.5)
    assert facts["bytes"] > 0
    assert launch_run.TRY_OUT_STEPS == len(steps)

def test_what_does_not_fit_ends_the_run(try_out, state):
    (code, _), tried = try_out({"mid": outcome(code=1)})
    assert code == 1 and tried == ["base", "mid"]

def test_an_interrupted_trial_goes_on(try_out, state):
    (code, _), tried = try_out({"mid": outcome(code=75)})
    assert code == 75 and tried == ["base", "mid"]
    assert try_out({})[1] == ["mid", "sft", "rl", "mid-eval"], "on what base has left for it"
    assert not (state / "toy/try_out_d4").exists()
    assert try_out({"sft": outcome(code=75)}, "--", "--seed=2")[1] == ["base", "mid", "sft"]
    (state / "toy/try_out_d4").mkdir()
    tried = try_out({}, "--", "--seed=3")[1]
    assert tried == ["base", "mid", "sft", "rl", "mid-eval"], "base's shapes are others now"

def test_without_what_was_tried_before_it_nothing_of_an_interrupted_trial_counts(try_out, state):
    try_out({"mid": outcome(code=75)})
    (state / "toy/try_out_d4").rmdir()
    assert try_out({})[1] == ["base", "mid", "sft", "rl", "mid-eval"]

def test_too_little_disk_is_said_before_it_is_needed(try_out, monkeypatch, capsys):
    monkeypatch.setattr(trial.shutil, "disk_usage", lambda path: SimpleNamespace(free=2999))
    with ends() as end:
        try_out({}, "--only=base,mid")
    assert end.code == 2 and ": free some disk space" in capsys.readouterr().err
    monkeypatch.setattr(trial.shutil, "disk_usage", lambda path: SimpleNamespace(free=3000))
    assert try_out({}, "--only=base,mid")[0][0] == 0, "both, and one more while it is written"

def test_too_few_files_that_may_be_made_are_said_too(try_out, monkeypatch):
    """Quotas of scratch count files, and a disk with room may have none left."""
    left = SimpleNamespace(f_favail=12, f_files=5000, f_bavail=10 ** 9, f_bfree=10 ** 9,
                           f_blocks=10 ** 9, f_frsize=4096)
    monkeypatch.setattr(trial.os, "statvfs", lambda path: left)
    with ends() as end:
        try_out({}, "--only=base")
    assert end.code == 2
    left.f_files = 0  # a file system that counts none
    assert try_out({}, "--only=base")[0][0] == 0

def test_what_is_on_disk_already_needs_no_room(try_out, record, monkeypatch):
    folder = record("base", status="interrupted")
    (folder / "manifest_000075.json").write_text(json.dumps({"files": {"model": [900, "x"]}}))
    monkeypatch.setattr(trial.shutil, "disk_usage", lambda path: SimpleNamespace(free=1100))
    assert try_out({}, "--only=base")[0][0] == 0, "100 are missing, and one more while it is saved"
    monkeypatch.setattr(trial.shutil, "disk_usage", lambda path: SimpleNamespace(free=1099))
    with ends() as end:
        try_out({}, "--only=base")
    assert end.code == 2

def test_a_training_that_has_not_said_what_it_needs_is_tried_again(try_out, capsys):
    silent = {"code": 0, "reason": "done"}
    (code, added), _ = try_out({"base": silent}, "--only=base,mid")
    assert code == 0 and added == {"base": [], "mid": []}
    said = capsys.readouterr().out
    assert "base gave no time and disk use" in said and "take about 4m10s (mid 4m10s)" in said
    assert try_out({"base": silent, "mid": silent}, "--only=base,mid")[1][0] == "base"

def test_a_trial_leaves_that_of_another_run_alone(try_out, state):
    other = pipeline.state_path("base", "toy", "d12", try_out=True)
    other.mkdir(parents=True)
    mine = pipeline.state_path("base", "toy", "d4", try_out=True)
    mine.mkdir(parents=True)
    try_out({})
    assert other.exists() and not mine.exists()

# ---- real processes

def copy_with_phases(tmp_path, text):
    """A repository whose phases are one Python script of this text."""
    scripts = {phase.script for phase in pipeline.PHASES}
    shared = [p.name for p in REPO.glob("*.py") if p.name not in scripts]
    for name in ("speedrun.sh", "setup_venv.sh", "requirements.txt", *shared):
        (tmp_path / name).symlink_to(REPO / name)
    for phase in pipeline.PHASES:
        kept = (REPO / phase.script).read_text()  # its settings are read by the launcher
        (tmp_path / phase.script).write_text(f"{text}\nraise SystemExit\n{kept}")
    for name in (".venv", "config"):
        (tmp_path / name).symlink_to(REPO / name)

PHASE = """
import os, signal, subprocess, sys, time
def told(signum, frame):
    print("the phase was told", flush=True)
    helper.wait()
    os._exit(75)
signal.signal(signal.SIGTERM, told)
helper = subprocess.Popen(["bash", "-c",
    'trap "echo the helper was told" TERM; touch listening; '
    'while [ ! -f over ]; do sleep 0.05; done'])
time.sleep(100)
"""

def test_a_signal_to_speedrun_reaches_the_phase_and_not_what_the_phase_has_started(tmp_path):
    copy_with_phases(tmp_path, PHASE)
    process = subprocess.Popen(["bash", "speedrun.sh", "--only=data"], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=environment(tmp_path / "state"))
    wait_for((tmp_path / "listening").exists, process)
    process.terminate()  # the launcher has taken the place of the shell
    (tmp_path / "over").touch()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "the phase was told" in out and "the helper" not in out, out
    assert "stopped in data with everything saved" in out

HUNG_UP = """
import fcntl, pathlib, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # as of a shell: it hears of the end of this terminal
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.path.insert(0, sys.argv[1])
import common, launch
supervisor = launch.Supervisor(pathlib.Path("outcome"))
for number in common.stop_signals():
    signal.signal(number, supervisor.on_signal)
print("the terminal is there")
code, _ = supervisor.run([sys.executable, "phase.py", sys.argv[1]])
pathlib.Path("ended").write_text(f"{code} {supervisor.terminated}")
"""
HUNG_UP_PHASE = """
import signal, sys, time
ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
sys.path.insert(0, sys.argv[1])
from run import Run
run = Run.start("phase")
open("listening", "w").close()
while run.going():
    print("training")
    time.sleep(0.05)
print("nobody reads this")
open("saved", "w").write(f"{run.stop} {ignored}")
run.leave(75, "stopped")
"""

def test_a_terminal_that_is_closed_costs_nothing(tmp_path):
    (tmp_path / "phase.py").write_text(HUNG_UP_PHASE)
    ours, terminal = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", HUNG_UP, REPO], cwd=tmp_path, start_new_session=True,
        stdin=terminal, stdout=terminal, stderr=terminal, env=environment(tmp_path / "state"))
    os.close(terminal)
    wait_for((tmp_path / "listening").exists, process)
    said = os.read(ours, 4096)
    os.close(ours)  # the kernel sends SIGHUP to all that were started there
    assert process.wait(100) == 0
    assert b"the terminal is there" in said
    assert (tmp_path / "saved").read_text() == "signal SIGTERM True", "the launcher's alone"
    assert (tmp_path / "ended").read_text() == "75 False"

RANK = """
import os, signal, time
asked = []
for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, lambda *heard: asked.append(1))
open("listening" + os.environ["RANK"], "w").close()
while not (asked and os.path.exists("over")):
    time.sleep(0.05)
print("saved by rank", os.environ["RANK"], flush=True)
"""
LAUNCHER = """
import pathlib, signal, sys, types
sys.path.insert(0, sys.argv[1])
import launch
supervisor = launch.Supervisor(pathlib.Path("outcome"))
signal.signal(signal.SIGINT, supervisor.on_signal)
plan = types.SimpleNamespace(in_slurm=False, nproc=2)
command = launch.command_for(plan, "base", ["rank.py"])
print("ended with", supervisor.run(command)[0])
"""

def test_ctrl_c_reaches_the_ranks_and_torchrun_does_not_end_them(tmp_path):
    """A terminal sends it to all processes; torchrun by itself would then kill those that take more
    than half a minute to save."""
    (tmp_path / "rank.py").write_text(RANK)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, REPO], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env={**environment(tmp_path / "state"), "PATH": path})
    wait_for(lambda: len(list(tmp_path.glob("listening*"))) == 2, process)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
    (tmp_path / "over").touch()
    out, _ = process.communicate(timeout=120)
    assert out.count("saved by rank") == 2 and "ended with 75" in out, out
    assert "Traceback" not in out, out

def test_a_phase_is_told_where_the_launcher_is_killed_outright(tmp_path):
    copy_with_phases(tmp_path, PHASE.replace('print("the phase was told", flush=True)',
                                             'open("told", "w").close()'))
    process = subprocess.Popen(["bash", "speedrun.sh", "--only=data"], cwd=tmp_path,
                               stdout=subprocess.DEVNULL, env=environment(tmp_path / "state"))
    wait_for((tmp_path / "listening").exists, process)
    process.kill()
    process.wait()
    helper = subprocess.Popen(["sleep", "100"])  # only to wait beside
    wait_for((tmp_path / "told").exists, helper, 20)
    (tmp_path / "over").touch()
    helper.kill()
    helper.wait()

def test_the_list_of_speedrun_is_the_table():
    out = subprocess.run(["bash", "speedrun.sh", "--dry-run", "--nproc=1"], cwd=REPO, text=True,
                         capture_output=True, check=True, env=environment("/nowhere"))
    listed = [next(word for word in line.split() if word.endswith(".py"))
              for line in out.stdout.splitlines()]
    assert listed == [phase.script for phase in pipeline.PHASES]
    for line, phase in zip(out.stdout.splitlines(), pipeline.PHASES):
        assert ("--source" in line) == (phase.script == "chat_eval.py")
        if "--source" in line:
            assert f"--source={phase.parent} " in line + " "

@pytest.mark.parametrize("config", sorted((REPO / "config").glob("*.py")))
def test_every_recipe_is_a_file_of_assignments_that_its_script_takes(tmp_path, config):
    name = config.stem.removeprefix("toy_").removeprefix("own_")
    scripts = {"tok": "tok_train.py", "base": "base_train.py", "base_eval": "base_eval.py",
               "five_minutes": "base_train.py", "twenty_five_minutes": "base_train.py",
               "sixty_minutes": "base_train.py", "five_minutes_avx2": "base_train.py",
               "mid": "mid_train.py", "sft": "chat_sft.py", "rl": "chat_rl.py",
               "chat_eval": "chat_eval.py"}
    out = script(tmp_path / "state", scripts[name], config)
    assert out.returncode == 2 and "prepare_data.py" in out.stderr or "there is no" in out.stderr
    assert "unknown setting" not in out.stderr and out.stderr.count("\n") == 1, out.stderr
