"""The whole pipeline in small through speedrun.sh; bad input; what is refused before it begins."""
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import common
import tokenizer as tok
from conftest import REPO, environment, needs_venv, random_model, save_model, script
from test_launch import copy_with_phases

SMALL = ["--size=0.02", "--vocab_size=512", "--max_seq_len=128", "--total_batch_size=1024",
         "--num_steps=6", "--max_steps=6", "--max_items=20", "--core_items=8", "--compile=False",
         "--dtype=float32", "--eval_tokens=4000", "--eval_problems=8", "--eval_samples=2",
         "--problems_per_step=2", "--max_new_tokens=16"]

def offline():
    """What runs a command in a network namespace without any interface, [] where nothing may."""
    for command in (["unshare", "-n"], ["unshare", "-rn"]):
        tried = [*command, "true"]
        if shutil.which("unshare") and not subprocess.run(tried, check=False).returncode:
            return command
    return []

def bash(folder, *flags, before=(), env=None, timeout=400):
    """-> CompletedProcess, text, of speedrun.sh in `folder`"""
    return subprocess.run([*before, "bash", "speedrun.sh", *flags], cwd=folder, env=env,
                          capture_output=True, text=True, timeout=timeout, check=False,
                          stdin=subprocess.DEVNULL)

def speedrun(state, *flags, **more):
    return bash(REPO, *flags, env=environment(state), **more)

@needs_venv
def test_all_phases_from_nothing_to_the_report_and_again(tmp_path):
    """In a network namespace without any interface, where that is allowed."""
    out = speedrun(tmp_path, "--depth=1", "--", *SMALL, before=offline())
    assert out.returncode == 0, out.stdout[-3000:] + out.stderr[-3000:]
    report = (tmp_path / "toy/report/report.md").read_text()
    row = next(line for line in report.split("\n") if line.startswith("| toy-GSM8K"))
    assert len(re.findall(r"\d\.\d{3}", row)) == 6, f"score and interval of MID, SFT and RL: {row}"
    assert "| toy-ChatCORE |" in report and "Never ran" not in report
    assert (tmp_path / "toy/report/base_loss.svg").exists()
    models = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("model_*.pt")}
    assert len(models) == 4
    again = speedrun(tmp_path, "--depth=1", "--", *SMALL)
    assert again.returncode == 0 and again.stdout.count("done already") == 10, again.stdout
    assert models == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("model_*.pt")}

    answer = script(tmp_path, "chat_cli.py", "-p", "Hello!", "--max_new_tokens=5")
    assert answer.returncode == 0 and "rl model d1 of toy" in answer.stderr
    status = script(tmp_path, "status.py")
    assert status.returncode == 0 and status.stdout.count("done") >= 6

    changed = speedrun(tmp_path, "--depth=1", "--only=base", "--", *SMALL, "--num_steps=7")
    assert changed.returncode == 2 and "num_steps was 6, now 7" in changed.stderr

# ---- flags: test_launch.py has the others

@needs_venv
def test_a_dry_run_prints_what_would_run(tmp_path):
    dry = speedrun(tmp_path, "--dry-run", "--from=sft", "--skip-rl-eval", "--nproc=2", "--",
                   "--seed=5")
    lines = dry.stdout.strip().split("\n")
    scripts = [next(w for w in line.split() if w.endswith(".py") and "/" not in w)
               for line in lines]
    assert scripts == ["chat_sft.py", "chat_eval.py", "chat_rl.py", "report.py"]
    assert dry.returncode == 0 and lines[0].endswith("--seed=5") and "seed" not in lines[3]
    assert lines[0].startswith("torchrun --standalone --nproc_per_node=2 "
                               "--signals-to-handle=SIGQUIT chat_sft.py --data=toy")
    assert not any(tmp_path.iterdir())

@needs_venv
def test_a_dry_run_shows_which_settings_go_where(tmp_path):
    dry = speedrun(tmp_path, "--dry-run", "--", "--num_steps=9", "--rl.num-steps=5",
                   "--mixture=gsm8k", "--sft.mixture=gsm8k,arc_easy*2", "--mid-eval.max_items=7")
    of = {}
    for line in dry.stdout.splitlines():  # each can be typed as it stands
        words = shlex.split(line)
        source = next((w.removeprefix("--source=") for w in words if "--source" in w), "")
        of[source + words[1]] = words
    assert of["base_train.py"][-1] == "--num_steps=9"
    assert of["chat_rl.py"][-2:] == ["--num_steps=9", "--num_steps=5"]
    assert of["mid_train.py"][-1] == "--mixture=gsm8k"
    assert of["chat_sft.py"][-2:] == ["--mixture=gsm8k", "--mixture=gsm8k,arc_easy*2"]
    assert {"--rl.num_steps=5", "--sft.mixture=gsm8k,arc_easy*2"} <= {*of["prepare_data.py"]}
    assert of["midchat_eval.py"][-1] == "--max_items=7"
    assert "max_items" not in str(of["sftchat_eval.py"])

@needs_venv
@pytest.mark.parametrize("flags,says", [
    (["--depht=4"], "unknown flag"), (["--only=base,x"], "no such phase"),
    (["--depth=0"], "--depth"), (["--data="], "--data is empty"),
    (["--from=mid", "--only=tok"], "nothing to run"),
    (["--", "--depth=6"], "--depth cannot stand behind"),
    (["--", "--rl.num_steps=x"], "--rl.num_steps takes a whole number"),
    (["--dry-run", "--", "--num_stepz=4"], "--num_steps"),
    (["--data=/no/such/folder"], "there is no /no/such/folder"),
    (["--", "--base.total_batch_size=3"], "multiple of --max_seq_len"),
    (["--", "--sft.mixture="], "nothing to learn from"), (["--", "--tasks="], "--tasks is empty"),
    (["--", "--sft.mixture=nosuch"], "there is no task 'nosuch'"),
    (["--", "--rl.task=mmlu"], "--task must be"),
    (["--only=mid"], "there is no base model"), (["--from=base"], "there is no tokenizer")])
def test_bad_flags_are_one_line_and_write_nothing(tmp_path, flags, says):
    out = speedrun(tmp_path, *flags)
    assert out.returncode == 2 and says in out.stderr and out.stderr.count("\n") == 1, out.stderr
    assert not any(tmp_path.iterdir())

def test_what_makes_no_sense_is_refused_before_anything_is_installed(tmp_path):
    with_shell_files(tmp_path, "config", *(p.name for p in REPO.glob("*.py")))
    env = {**environment(tmp_path / "state"), "NANOCHAT_OFFLINE": "1"}
    for flag, says in (("--base.arch=foo", "--base.arch must be"), ("--base.depth=3", "--depth")):
        out = bash(tmp_path, "--", flag, env=env)
        assert out.returncode == 2 and says in out.stderr and out.stderr.count("\n") == 1
    assert not (tmp_path / ".venv").exists() and not (tmp_path / "state").exists()

@needs_venv
def test_help_names_the_flags(tmp_path):
    said = speedrun(tmp_path, "--help").stdout
    for flag in ("--skip-PHASE", "--skip-trial", "--from=", "--only=", "--data=", "--depth=",
                 "--nproc=", "--dry-run", "-- --key=value"):
        assert flag in said

# ---- data that grows, bad input

BASE = ["base_train.py", "--data=toy", "--depth=1", "--max_seq_len=128", "--total_batch_size=1024",
        "--num_steps=20", "--device_batch_size=4", "--device=cpu", "--dtype=float32",
        "--threads=1", "--compile=False", "--eval_every=0", "--eval_tokens=4000",
        "--sample_every=0"]

def losses(state, tag):
    lines = common.read_json_lines(state / f"toy/base_checkpoints/{tag}/metrics.jsonl")
    return [line["loss"] for line in lines if line["kind"] == "train"]

def test_more_data_does_not_stop_a_run_that_began_with_less(prepared):
    small = [*BASE, "--num_steps=6"]
    assert script(prepared, *small, "--tag=whole").returncode == 0
    assert script(prepared, *small, "--tag=more", "--time_limit=0.0").returncode == 75
    measure = ["base_eval.py", "--data=toy", "--tag=whole", "--core_items=0",
               "--eval_tokens=2000", "--show_samples=False", "--threads=1"]
    assert script(prepared, *measure).returncode == 0
    added = prepared / "toy/base_data/shard_00003-more.parquet"
    shutil.copy(prepared / "toy/base_data/shard_00000.parquet", added)
    try:
        assert script(prepared, *small, "--tag=more").returncode == 0
        assert losses(prepared, "more") == losses(prepared, "whole")
        measured = script(prepared, *measure).stdout
        assert "done already" in measured, "nor does it throw an evaluation away"
    finally:
        added.unlink()

def copy_of(prepared, tmp_path):
    state = tmp_path / "state"
    shutil.copytree(prepared, state)
    return state

def snapshot(folder):
    """All files but the tokens and the launcher's note of how it has ended, which is always new."""
    files = [p for p in Path(folder).rglob("*") if p.is_file() and "tokens" not in p.parts
             and not p.name.startswith("speedrun_")]
    return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files)

@pytest.mark.parametrize("args,says", [
    ("base_train.py --data=toy --dept=4", "--depth"),
    ("base_train.py --data=toy --depth=four", "takes a whole number"),
    ("base_train.py --data=toy --depth=0", "--depth must be"),
    ("base_train.py --data=toy --tokens_per_param=-5", "--tokens_per_param must be"),
    ("base_train.py --data=toy --total_batch_size=1000", "multiple of --max_seq_len"),
    ("base_train.py --data=/there/is/no/such/folder", "does not exist"),
    ("base_train.py --data=EMPTY", "holds no text"),
    ("base_train.py --data=CORRUPT", "no readable parquet"),
    ("tok_train.py --data=CORRUPT", "no readable parquet"),
    ("tok_train.py --data=toy --vocab_size=10", "--vocab_size"),
    ("prepare_data.py --data=/there/is/no/such/folder", "does not exist"),
    ("prepare_data.py --data=toy --size=0.0", "--size"),
    ("mid_train.py --data=toy", "there is no base model"),
    ("mid_train.py --data=toy --held_out=", "--held_out is empty"),
    ("mid_train.py --data=toy --mixture=", "must not be empty"),
    ("mid_train.py --data=toy --max_steps=-5", "--max_steps"),
    ("chat_sft.py --data=toy", "there is no mid model"),
    ("chat_rl.py --data=toy", "there is no sft model"),
    ("chat_rl.py --data=toy --samples=0", "--samples"),
    ("chat_rl.py --data=toy --num_steps=-5", "--num_steps must be"),
    ("chat_eval.py --data=toy --source=xyz", "--source"),
    ("chat_eval.py --data=toy --tasks=nothing", "nothing"),
    ("chat_eval.py --data=toy --rows=0", "--rows"),
    ("base_eval.py --data=toy", "there is no base model"),
    ("chat_cli.py --source=rl --data=toy", "there is no rl"),
    ("chat_cli.py", "there is no trained model")])
def test_bad_input_is_one_line_and_exit_code_2_and_writes_nothing(prepared, tmp_path, args, says):
    state = copy_of(prepared, tmp_path)
    shutil.rmtree(state / "toy/base_checkpoints", ignore_errors=True)
    empty, corrupt = tmp_path / "empty", tmp_path / "corrupt"
    empty.mkdir()
    corrupt.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * 10000]}), corrupt / "a.parquet")
    whole = (corrupt / "a.parquet").read_bytes()
    (corrupt / "a.parquet").write_bytes(whole[:len(whole) // 2])
    before = snapshot(state)
    words = args.replace("EMPTY", str(empty)).replace("CORRUPT", str(corrupt)).split()
    out = script(state, *words)
    assert out.returncode == 2 and says in out.stderr, out.stdout + out.stderr
    assert out.stderr.count("\n") == 1 and "Traceback" not in out.stderr
    assert snapshot(state) == before

def test_a_tokenizer_of_another_vocabulary_is_refused(prepared, tmp_path):
    state = copy_of(prepared, tmp_path)
    assert script(state, *BASE, "--num_steps=1", "--tag=v").returncode == 0
    other = script(state, "tok_train.py", "--data=toy", "--vocab_size=500", "--start_over=True")
    assert other.returncode == 0
    for name, *args in (["mid_train.py", "--mixture=gsm8k:20"], ["chat_eval.py", "--source=base"],
                        ["chat_cli.py", "-p", "x"], ["base_eval.py"]):
        out = script(state, name, "--data=toy", "--tag=v", *args)
        assert out.returncode == 2 and "vocabulary of 512" in out.stderr, out.stderr
        assert "Traceback" not in out.stderr

# ---- starting over

QUICK = ["--num_steps=2", "--max_seq_len=128", "--total_batch_size=1024", "--device_batch_size=4",
         "--compile=False", "--dtype=float32", "--threads=1", "--eval_tokens=2000",
         "--tok.vocab_size=512", "--sample_every=0", "--device=cpu"]

@needs_venv
def test_the_command_that_is_printed_starts_that_phase_over_and_no_other(prepared, tmp_path):
    state = copy_of(prepared, tmp_path)
    flags = ["--depth=1", "--only=tok,base", "--skip-trial", "--", *QUICK]
    assert speedrun(state, *flags).returncode == 0
    before = snapshot(state / "toy")
    out = speedrun(state, *flags, "--base.seed=5")
    assert out.returncode == 2 and "seed was 1337, now 5" in out.stderr
    assert [line for line in snapshot(state / "toy") if "tok" not in line[0]] == [
        line for line in before if "tok" not in line[0]]
    command = out.stdout.splitlines()[-1].partition("to start it over: ")[2]
    again = subprocess.run(command, shell=True, cwd=REPO, env=environment(state), text=True,
                           capture_output=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "tok_train: done already" in again.stdout
    assert "copies put aside so far: 1," in again.stdout
    aside = list((state / "toy").rglob("*.old-*"))
    assert [path.parent.name for path in aside] == ["base_checkpoints"]

def done_sft(state):
    """A small model of mid, and one of sft that is done. -> its folder"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(state))
        tokenizer = tok.load_tokenizer("toy")
        model = random_model(64, tokenizer.vocab_size, 1, 1, 1, 16)
        save_model("mid", "toy", "d1", model, tokenizer, batch_tokens=512, num_steps=7)
        folder = save_model("sft", "toy", "d1", model, tokenizer, num_steps=7)
    record = {"status": "done", "settings": {}, "inputs": {}, "free": {}, "step": 7, "updated": 0.0}
    (folder / "phase.json").write_text(json.dumps(record))
    return folder

SFT = ["chat_sft.py", "--data=toy", "--tag=d1", "--start_over=True", "--mixture=gsm8k:50",
       "--held_out=smoltalk:20", "--threads=1", "--device=cpu", "--dtype=float32", "--max_steps=1",
       "--compile=False", "--eval_tokens=500"]

def test_starting_over_with_a_broken_file_leaves_the_good_model_and_works_once_it_is_mended(
        prepared, tmp_path):
    state = copy_of(prepared, tmp_path)
    folder = done_sft(state)
    before = snapshot(state)
    mine = tmp_path / "mine.jsonl"
    mine.write_text("{broken\n" * 30)
    command = [*SFT, f"--extra_conversations={mine}"]
    out = script(state, *command)
    assert out.returncode == 2 and str(mine) in out.stderr, out.stdout + out.stderr
    assert snapshot(state) == before
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    mine.write_text(json.dumps({"messages": said}) + "\n")
    out = script(state, *command)
    assert out.returncode == 0 and "put aside so far: 1," in out.stdout, out.stderr
    assert len(list(folder.parent.glob("d1.old-*"))) == 1

def read_only(folder):
    """What runs a command for which `folder` is on a disk that cannot be written; [] where that
    takes rights that we do not have."""
    mount = f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder} && exec \"$@\""
    for rights in ([], ["-r"]):
        command = ["unshare", *rights, "-m", "bash", "-c", mount, "-"]
        tried = subprocess.run([*command, "true"], capture_output=True, check=False)
        if tried.returncode == 0:
            return command
    return []

def test_starting_over_where_nothing_may_be_written_is_one_line(prepared, tmp_path):
    state = copy_of(prepared, tmp_path)
    done_sft(state)
    before = snapshot(state)
    tokenizer = ["tok_train.py", "--data=toy", "--start_over=True", "--vocab_size=500"]
    for disk, command in ((state, SFT), (state / "toy/chatsft_checkpoints", SFT),
                          (state, tokenizer)):
        without = read_only(disk) or pytest.skip("no mounts here")
        out = subprocess.run([*without, sys.executable, *command], cwd=REPO, text=True,
                             env=environment(state), capture_output=True, check=False)
        assert out.returncode == 2 and "could not write to" in out.stderr, out.stdout + out.stderr
        assert out.stderr.count("\n") == 1 and "make it writable" in out.stderr
        assert snapshot(state) == before

@needs_venv
def test_what_later_phases_read_is_looked_at_before_the_first_begins(prepared, tmp_path):
    state = copy_of(prepared, tmp_path)
    next((state / "toy/task_data").glob("gsm8k_train*")).unlink()
    out = speedrun(state, "--skip-data", "--depth=1")
    assert out.returncode == 2 and "missing or damaged" in out.stderr, out.stdout + out.stderr
    assert "===" not in out.stdout
    before = snapshot(state)
    out = speedrun(state, "--only=tok", "--depth=1", "--", "--vocab_size=512")
    assert out.stdout.count("done already") == 1 and "missing" not in out.stderr
    assert snapshot(state) == before, "only what the phases to run read"

# ---- where the packages are in a container

def container(folder, packages=True):
    """$NANOCHAT_CONTAINER of a mount namespace of its own, in which python has our packages; ""
    where namespaces are refused. Like Apptainer's, its first process stays and passes no signal on.
    What has run in it stands in `folder`/inside.log; `folder`/bin has a python without packages."""
    there = Path(sys.executable).parent if packages else folder / "bin"
    (folder / "my container.sh").write_text(
        f'PATH="{there}:$PATH"\necho "$@" >> "{folder}/inside.log"\n'
        'trap : TERM\n"$@" &\n'
        'while kill -0 $! 2>/dev/null; do wait $!; code=$?; done\nexit $code\n')
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    words = ["unshare", "--map-root-user", "--mount", "bash", str(folder / "my container.sh")]
    return shlex.join(words) if not subprocess.run([*words, "true"], check=False).returncode else ""

@pytest.fixture
def in_container(tmp_path):
    """in_container(*flags) -> how to start speedrun.sh with them: its arguments for Popen"""
    prefix = container(tmp_path)
    if not prefix:
        pytest.skip("namespaces are refused here")
    here = tmp_path / "repository"
    here.mkdir()
    for name in ("speedrun.sh", "setup_venv.sh", "requirements.txt", "config", "assets"):
        (here / name).symlink_to(REPO / name)
    for file in REPO.glob("*.py"):  # where a script is decides what it calls the repository
        shutil.copy(file, here)
    env = {**environment(tmp_path / "state"), "NANOCHAT_CONTAINER": prefix,
           "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    assert subprocess.run(["python3", "-c", "import torch"], env=env, check=False,
                          stderr=subprocess.DEVNULL).returncode, "the host has no packages"

    def arguments(*flags):
        return {"args": ["bash", "speedrun.sh", *flags], "cwd": here, "env": env, "text": True,
                "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return arguments

def test_a_container_has_the_packages_and_the_host_only_python(tmp_path, in_container):
    """Two ranks in it are stopped by a signal to the launcher, and go on."""
    words = ["--depth=1", "--nproc=2", "--only=data,tok,base", "--skip-trial", "--", *SMALL,
             "--device_batch_size=4", "--num_steps=2000", "--save_minutes=60"]
    process = subprocess.Popen(**in_container(*words))
    lines = [process.stdout.readline()]
    while lines[-1] and not lines[-1].startswith("step 1/"):
        lines.append(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=100)
    assert process.returncode == 75, "".join(lines) + said + errors
    folder = tmp_path / "state/toy/base_checkpoints/d1"
    record = json.loads((folder / "phase.json").read_text())
    assert record["reason"].startswith("signal SIGTERM: saved at step"), record["reason"]
    step = int(re.search(r"at step (\d+)", record["reason"])[1])
    assert 0 < step < 2000 and [*folder.glob(f"model_{step:06d}.pt")], "and so it had begun"
    assert "torchrun" in (tmp_path / "inside.log").read_text()
    assert not [*(tmp_path / "state").glob("outcome-*")]
    assert not (tmp_path / "repository/.venv").exists()

    bad = subprocess.run(**in_container("--depth=1", "--only=sft"), check=False)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "mid" in bad.stderr, bad.stderr
    status = subprocess.run(**in_container("--status", "--json=True"), check=True).stdout
    assert "there is no mid model" in status, "what was refused inside is known outside"

def test_a_refusal_in_a_container_leaves_nothing(tmp_path, in_container):
    out = subprocess.run(**in_container("--depth=1", "--only=sft"), check=False)
    assert out.returncode == 2 and "there is no mid model" in out.stderr
    assert not (tmp_path / "state").exists()

def test_a_container_without_the_packages_is_named(tmp_path):
    prefix = container(tmp_path, packages=False)
    if not prefix:
        pytest.skip("namespaces are refused here")
    with_shell_files(tmp_path, *(p.name for p in REPO.glob("*.py")))
    out = bash(tmp_path, "--only=data", env={**environment(tmp_path / "state"),
                                             "NANOCHAT_CONTAINER": prefix})
    assert out.returncode == 2 and "are not to be had behind NANOCHAT_CONTAINER" in out.stderr
    assert not (tmp_path / "state").exists()

# ---- speedrun.sh itself

def with_shell_files(folder, *names):
    for name in ("speedrun.sh", "setup_venv.sh", "requirements.txt", *names):
        (folder / name).symlink_to(REPO / name)

def test_a_dry_run_installs_nothing_site_env_is_read_and_an_old_python_is_named(tmp_path):
    with_shell_files(tmp_path, *(p.name for p in REPO.glob("*.py")))
    (tmp_path / ".venv/bin").mkdir(parents=True)
    # of another requirements.txt: there is no .venv/matches
    (tmp_path / ".venv/bin/python").symlink_to("/bin/false")
    (tmp_path / "site.env").write_text("export NANOCHAT_BASE_DIR=$NOT_SET/there\n"
                                       "echo state: $NANOCHAT_BASE_DIR\n")
    usual = environment(tmp_path)
    del usual["NANOCHAT_BASE_DIR"]
    out = bash(tmp_path, "--dry-run", "--only=report", env=usual)
    assert out.returncode == 0, out
    assert out.stdout == "state: /there\npython report.py --data=toy --tag=d2\n"
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "python3").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exec echo Python 3.9.2\nexit 1\n')
    (fake / "python3").chmod(0o755)
    out = bash(tmp_path, "--only=report", env={**usual, "PATH": f"{fake}:{os.environ['PATH']}"})
    assert out.returncode == 2 and out.stderr.count("\n") == 1
    assert "Python 3.11 or newer is needed and python3 is Python 3.9.2" in out.stderr

@pytest.mark.parametrize("site,given,found", [
    (b"\xef\xbb\xbfexport NANOCHAT_BASE_DIR=/there\r\n# a comment\r\n", "", "/there"),
    (b"export NANOCHAT_BASE_DIR=there\r\n", "", "repository/there"),
    (b"NANOCHAT_BASE_DIR=/there\n", "", "/there"),
    (b"export NANOCHAT_BASE_DIR=$HOME/there\n", "here", "/home/of/mine/there"),
    (b"", "here", "home/here"), (b"", "~/here", "~/here"), (b"", "/here", "/here")])
def test_the_state_folder_is_meant_from_where_it_was_given(tmp_path, site, given, found):
    """And a site.env may come from Windows."""
    for name in ("repository", "home"):
        (tmp_path / name).mkdir()
    with_shell_files(tmp_path / "repository")
    (tmp_path / "repository/launch.py").write_text(
        "import os\nprint(repr(os.environ.get('NANOCHAT_BASE_DIR')), repr(os.getcwd()))\n")
    (tmp_path / "repository/site.env").write_bytes(site)
    surroundings = {**environment(given), "HOME": "/home/of/mine"}
    if not given:
        del surroundings["NANOCHAT_BASE_DIR"]
    out = subprocess.run(["bash", "../repository/speedrun.sh", "--dry-run"], text=True,
                         cwd=tmp_path / "home", capture_output=True, check=True, env=surroundings)
    where = found if found[0] in "/~" else str(tmp_path / found)
    assert out.stdout == f"{where!r} {str(tmp_path / 'home')!r}\n"

def test_a_site_env_that_bash_does_not_read_is_refused(tmp_path):
    with_shell_files(tmp_path)
    (tmp_path / "site.env").write_text("export NANOCHAT_BASE_DIR='/there\n")
    out = bash(tmp_path, "--dry-run", env=environment(tmp_path))
    assert out.returncode == 2 and "error: site.env is no bash" in out.stderr and not out.stdout

def test_paths_of_data_are_those_that_the_user_sees(tmp_path):
    (tmp_path / "my texts").mkdir()
    flags = ["--data=my texts", "--dry-run", "--only=sft", "--nproc=1", "--",
             "--mixture=mine.jsonl*2"]
    out = subprocess.run(["bash", REPO / "speedrun.sh", *flags], cwd=tmp_path, text=True,
                         capture_output=True, check=True, env=environment(tmp_path / "state"))
    assert shlex.split(out.stdout) == [
        "python", "chat_sft.py", f"--data={tmp_path}/my texts", "--tag=d20",
        f"--mixture={tmp_path}/mine.jsonl*2"]

def test_a_state_folder_is_never_called_by_a_line_end(tmp_path):
    code = "import pipeline; print(pipeline.base_dir())"
    out = script(tmp_path, "-c", code, env={"NANOCHAT_BASE_DIR": "/x\r"})
    assert out.stdout == "/x\n"
    out = script(tmp_path, "status.py", env={"NANOCHAT_BASE_DIR": "~nobodyatall/x"})
    assert out.returncode == 2 and out.stderr.count("\n") == 1 and "nobodyatall" in out.stderr

@pytest.mark.parametrize("name", ["NANOCHAT_OFFLINE", "SLURM_JOB_ID"])
def test_nothing_is_installed_offline_or_in_a_job(tmp_path, name):
    with_shell_files(tmp_path)
    (tmp_path / "python3").write_text(  # fails where it is to make .venv
        '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.11.0 || [ "$1" = -c ]\n')
    (tmp_path / "python3").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    out = bash(tmp_path, "--only=setup", env={**environment(tmp_path), "PATH": path, name: "1"})
    assert out.returncode == 2 and "speedrun.sh --only=setup" in out.stderr, out
    assert out.stderr.count("\n") == 1 and not (tmp_path / ".venv").exists()

@needs_venv
@pytest.mark.parametrize("fails,code,last", [
    ({"base_eval.py": 2}, 1, "done, but these failed: base-eval; run the same command again"),
    ({"base_eval.py": 1, "mid_train.py": 3}, 3, "mid failed (exit 3): "),
    ({"mid_train.py": 75}, 75, "stopped in mid with everything saved: run the same command again")])
def test_the_exit_code_and_the_last_line_say_how_it_went(tmp_path, fails, code, last):
    """test_launch.py has which phases run then."""
    copy_with_phases(tmp_path, f"import sys\nsys.exit({fails}.get(sys.argv[0], 0))")
    out = bash(tmp_path, "--skip-trial", "--nproc=1", env=environment(tmp_path / "state"))
    assert out.returncode == code and out.stdout.splitlines()[-1].startswith(last), out
