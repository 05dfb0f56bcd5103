"""The whole pipeline in small through speedrun.sh; two ranks against one; bad input."""
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from conftest import REPO, environment, script, wait_for

SMALL = ["--size=0.02", "--vocab_size=512", "--max_seq_len=128", "--total_batch_size=1024", "--num_steps=6", "--max_steps=6", "--max_items=20", "--core_items=8",
         "--compile=False", "--dtype=float32", "--eval_tokens=4000", "--eval_problems=8", "--eval_samples=2", "--problems_per_step=2", "--max_new_tokens=16"]


OFFLINE = next((p for p in (["unshare", "-n"], ["unshare", "-rn"]) if shutil.which("unshare") and not subprocess.run([*p, "true"], capture_output=True).returncode), [])


def speedrun(state, *flags, timeout=400, before=()):
    return subprocess.run([*before, "bash", "speedrun.sh", *flags], cwd=REPO, capture_output=True, text=True, timeout=timeout,
                          env=environment(state), stdin=subprocess.DEVNULL)


needs_venv = pytest.mark.skipif(not (REPO / ".venv/matches").exists(), reason="speedrun.sh would install .venv; tests/run.sh makes it first")


@needs_venv
def test_all_phases_from_nothing_to_the_report_and_again(tmp_path):
    """In a network namespace without any interface, where that is allowed."""
    out = speedrun(tmp_path, "--depth=1", "--", *SMALL, before=OFFLINE)
    assert out.returncode == 0, out.stdout[-3000:] + out.stderr[-3000:]
    report = (tmp_path / "toy/report/report.md").read_text()
    row = next(line for line in report.split("\n") if line.startswith("| toy-GSM8K"))
    assert len(re.findall(r"\d\.\d{3}", row)) == 6, f"a score and an interval for MID, SFT and RL: {row}"
    assert "| toy-ChatCORE |" in report and "Never ran" not in report and (tmp_path / "toy/report/base_loss.svg").exists()
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
    assert changed.returncode == 2 and "num_steps: 6 -> 7" in changed.stderr


@needs_venv
def test_the_flags_of_speedrun(tmp_path):
    dry = speedrun(tmp_path, "--dry-run", "--from=sft", "--skip-rl-eval", "--nproc=2", "--", "--seed=5")
    lines = dry.stdout.strip().split("\n")
    assert dry.returncode == 0 and [next(w for w in line.split() if w.endswith(".py")) for line in lines] == ["chat_sft.py", "chat_eval.py", "chat_rl.py", "report.py"]
    assert lines[0].startswith("torchrun --standalone --nproc_per_node=2 --signals-to-handle=SIGQUIT chat_sft.py --data=toy") and lines[0].endswith("--seed=5")
    assert "seed" not in lines[3] and not any(tmp_path.iterdir())
    dry = speedrun(tmp_path, "--dry-run", "--", "--num_steps=9", "--rl.num-steps=5", "--mixture=gsm8k", "--sft.mixture=gsm8k,arc_easy*2", "--mid-eval.max_items=7").stdout
    line = {name: next(x for x in dry.splitlines() if f"{name}.py" in x and source in x) for name, source in
            {"prepare_data": "", "base_train": "", "mid_train": "", "chat_sft": "", "chat_rl": "", "chat_eval": "--source=sft"}.items()}
    assert line["base_train"].endswith(" --num_steps=9") and line["chat_rl"].endswith("--num_steps=9 --num_steps=5") and line["mid_train"].endswith(" --mixture=gsm8k")
    assert line["chat_sft"].endswith("--mixture=gsm8k --mixture=gsm8k,arc_easy*2") and line["prepare_data"].endswith("--rl.num_steps=5 --sft.mixture=gsm8k,arc_easy*2")
    assert "max_items" not in line["chat_eval"] and "--source=mid --max_new_tokens=96 --rows=128 --max_items=7" in dry
    for flags, says in [(["--", "--rll.num_steps=4"], "no phase 'rll'"), (["--", "--rl.num_stepz=4"], "--num_steps"), (["--skip-nothing"], "no such phase"), (["--from=x"], "no such phase"), (["--only=base,x"], "no such phase"), (["--depht=4"], "unknown flag"),
                        (["--depth=0"], "--depth"), (["--", "--depth=6"], "--depth cannot stand behind"), (["--", "--base.tag=wide"], "--tag cannot stand behind"), (["--from=mid", "--only=tok"], "nothing to run"),
                        (["--", "--num_stepz=4"], "--num_steps"), (["--dry-run", "--", "--num_stepz=4"], "--num_steps"), (["--", "--base.samples=4"], "the phase base has no setting 'samples'"),
                        (["--", "--rl.num_steps=x"], "--rl.num_steps takes a whole number"), (["--", "--matrix_lr=fast"], "--matrix_lr takes a number"), (["--", "--top_k=4"], "no phase has"), (["--data="], "--data is empty"), (["--only=mid"], "there is no base model"), (["--from=base"], "there is no tokenizer")]:
        out = speedrun(tmp_path, *flags)
        assert out.returncode == 2 and says in out.stderr and out.stderr.count("\n") == 1, (flags, out.stderr)
        assert not any(tmp_path.iterdir()), f"{flags}: nothing may be written"
    assert speedrun(tmp_path, "--help").stdout.count("--") > 10


BASE = ["base_train.py", "--data=toy", "--depth=1", "--max_seq_len=128", "--total_batch_size=1024", "--num_steps=20", "--device_batch_size=4", "--device=cpu", "--dtype=float32",
        "--threads=1", "--compile=False", "--eval_every=0", "--eval_tokens=4000", "--sample_every=0"]


def losses(state, tag):
    return [m["loss"] for m in map(json.loads, (state / f"toy/base_checkpoints/{tag}/metrics.jsonl").read_text().splitlines()) if m["kind"] == "train"]


def test_more_data_does_not_stop_a_run_that_began_with_less(prepared):
    small = [*BASE, "--num_steps=6"]
    assert script(prepared, *small, "--tag=whole").returncode == 0
    assert script(prepared, *small, "--tag=more", "--time_limit=0.0").returncode == 75
    measure = ["base_eval.py", "--data=toy", "--tag=whole", "--core_items=0", "--eval_tokens=2000", "--show_samples=False", "--threads=1"]
    assert script(prepared, *measure).returncode == 0
    added = prepared / "toy/base_data/shard_00003-more.parquet"
    shutil.copy(prepared / "toy/base_data/shard_00000.parquet", added)
    try:
        assert script(prepared, *small, "--tag=more").returncode == 0
        assert losses(prepared, "more") == losses(prepared, "whole")
        assert "done already" in script(prepared, *measure).stdout, "nor does it throw an evaluation away"
    finally:
        added.unlink()


def snapshot(folder):
    return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in Path(folder).rglob("*") if p.is_file() and "tokens" not in p.parts)


@pytest.mark.parametrize("args,says", [
    (["base_train.py", "--data=toy", "--dept=4"], "--depth"),
    (["base_train.py", "--data=toy", "--depth=four"], "takes a whole number"),
    (["base_train.py", "--data=toy", "--depth=0"], "--depth must be"),
    (["base_train.py", "--data=toy", "--tokens_per_param=-5"], "--tokens_per_param must be"),
    (["chat_rl.py", "--data=toy", "--num_steps=-5"], "--num_steps must be"),
    (["base_train.py", "--data=toy", "--total_batch_size=1000"], "multiple of --max_seq_len"),
    (["base_train.py", "--data=/there/is/no/such/folder"], "does not exist"),
    (["base_train.py", "--data=EMPTY"], "holds no text"),
    (["base_train.py", "--data=CORRUPT"], "no readable parquet"),
    (["tok_train.py", "--data=CORRUPT"], "no readable parquet"),
    (["tok_train.py", "--data=toy", "--vocab_size=10"], "--vocab_size"),
    (["prepare_data.py", "--data=/there/is/no/such/folder"], "does not exist"),
    (["prepare_data.py", "--data=toy", "--size=0.0"], "--size"),
    (["mid_train.py", "--data=toy"], "there is no base model"),
    (["mid_train.py", "--data=toy", "--held_out="], "--mixture and --held_out"),
    (["chat_sft.py", "--data=toy"], "there is no mid model"),
    (["chat_rl.py", "--data=toy", "--samples=0"], "--samples"),
    (["chat_rl.py", "--data=toy"], "there is no sft model"),
    (["chat_eval.py", "--data=toy", "--source=xyz"], "--source"),
    (["chat_eval.py", "--data=toy", "--tasks=nothing"], "nothing"),
    (["chat_eval.py", "--data=toy", "--rows=0"], "--rows"),
    (["mid_train.py", "--data=toy", "--mixture="], "must not be empty"),
    (["mid_train.py", "--data=toy", "--max_steps=-5"], "--max_steps"),
    (["base_eval.py", "--data=toy"], "there is no base model"),
    (["chat_cli.py", "--source=rl", "--data=toy"], "there is no rl"),
    (["chat_cli.py"], "there is no trained model")])
def test_bad_input_is_one_line_and_exit_code_2_and_writes_nothing(prepared, tmp_path, args, says):
    state = tmp_path / "state"
    subprocess.run(["cp", "-rp", str(prepared), str(state)], check=True)
    subprocess.run(["rm", "-rf", str(state / "toy/base_checkpoints")], check=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "corrupt").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * 10000]}), tmp_path / "corrupt/a.parquet")
    whole = (tmp_path / "corrupt/a.parquet").read_bytes()
    (tmp_path / "corrupt/a.parquet").write_bytes(whole[:len(whole) // 2])
    before = snapshot(state)
    out = script(state, *[a.replace("EMPTY", str(tmp_path / "empty")).replace("CORRUPT", str(tmp_path / "corrupt")) for a in args])
    assert out.returncode == 2 and says in out.stderr, out.stdout + out.stderr
    assert out.stderr.count("\n") == 1 and "Traceback" not in out.stderr
    assert snapshot(state) == before


def test_a_tokenizer_of_another_vocabulary_is_refused(prepared, tmp_path):
    state = tmp_path / "state"
    subprocess.run(["cp", "-rp", str(prepared), str(state)], check=True)
    assert script(state, *BASE, "--num_steps=1", "--tag=v").returncode == 0
    assert script(state, "tok_train.py", "--data=toy", "--vocab_size=500", "--start_over=True").returncode == 0
    for args in (["mid_train.py", "--data=toy", "--tag=v", "--mixture=gsm8k:20"], ["chat_eval.py", "--data=toy", "--source=base", "--tag=v"], ["chat_cli.py", "--data=toy", "--tag=v", "-p", "x"],
                 ["base_eval.py", "--data=toy", "--tag=v"]):
        out = script(state, *args)
        assert out.returncode == 2 and "vocabulary of 512" in out.stderr and "Traceback" not in out.stderr, out.stderr


@needs_venv
def test_what_later_phases_read_is_looked_at_before_the_first_begins(prepared, tmp_path):
    state = tmp_path / "state"
    subprocess.run(["cp", "-rp", str(prepared), str(state)], check=True)
    next((state / "toy/task_data").glob("gsm8k_train*")).unlink()
    out = speedrun(state, "--skip-data", "--depth=1")
    assert out.returncode == 2 and "missing or damaged" in out.stderr and "===" not in out.stdout, out.stdout + out.stderr
    before = snapshot(state)
    assert speedrun(state, "--only=tok", "--depth=1", "--", "--vocab_size=512").stdout.count("done already") == 1 and snapshot(state) == before, "only of the phases to run"


def test_a_dry_run_installs_nothing_site_env_is_read_and_an_old_python_is_named(tmp_path):
    for name in ("speedrun.sh", "setup_venv.sh", "requirements.txt"):
        shutil.copy(REPO / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to("/bin/false")  # of another requirements.txt: there is no .venv/matches
    (tmp_path / "site.env").write_text("export NANOCHAT_BASE_DIR=$NOT_SET/there\necho state: $NANOCHAT_BASE_DIR\n")
    usual = {k: v for k, v in environment(tmp_path).items() if k != "NANOCHAT_BASE_DIR"}
    run = lambda *flags, **more: subprocess.run(["bash", "speedrun.sh", *flags], cwd=tmp_path, capture_output=True, text=True, env={**usual, **more})
    out = run("--dry-run", "--only=report")
    assert out.returncode == 0 and out.stdout == "state: /there\npython report.py --data=toy --tag=d4\n", out
    (tmp_path / "python3").write_text('#!/bin/sh\n[ "$1" = --version ] && exec echo Python 3.9.2\nexit 1\n')
    (tmp_path / "python3").chmod(0o755)
    out = run("--only=report", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert out.returncode == 2 and "Python 3.11 or newer is needed and python3 is Python 3.9.2" in out.stderr and out.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["NANOCHAT_OFFLINE", "SLURM_JOB_ID"])
def test_nothing_is_installed_offline_or_in_a_job(tmp_path, name):
    for file in ("speedrun.sh", "setup_venv.sh", "requirements.txt"):
        shutil.copy(REPO / file, tmp_path)
    (tmp_path / "python3").write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.11.0 || [ "$1" = -c ]\n')  # fails where it is to make .venv
    (tmp_path / "python3").chmod(0o755)
    out = subprocess.run(["bash", "speedrun.sh", "--only=setup"], cwd=tmp_path, capture_output=True, text=True, env={**environment(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}", name: "1"})
    assert out.returncode == 2 and "speedrun.sh --only=setup" in out.stderr and out.stderr.count("\n") == 1 and not (tmp_path / ".venv").exists(), out


def with_phases(tmp_path, text):
    """A copy of speedrun.sh whose Python is a bash script of this text."""
    for name in ("speedrun.sh", "setup_venv.sh", "requirements.txt"):
        shutil.copy(REPO / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text(f"#!/bin/bash\n{text}")
    (tmp_path / ".venv/bin/python").chmod(0o755)
    matches = 'echo "$(python3 --version) $(cat requirements.txt requirements.txt | cksum)" > .venv/matches'
    subprocess.run(["bash", "-c", matches], cwd=tmp_path, check=True, env={"PATH": f"{tmp_path}/.venv/bin:{os.environ['PATH']}"})


def test_an_evaluation_that_fails_does_not_stop_the_run_and_a_training_that_fails_does(tmp_path):
    with_phases(tmp_path, """case "$1" in -c|checkpoint.py|status.py) exit 0 ;; base_eval.py) exit $EVAL ;; mid_train.py) exit $MID ;; esac; echo "ran $1" """)
    def run(evaluation, mid):
        out = subprocess.run(["bash", "speedrun.sh"], cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL, env={**environment(tmp_path), "EVAL": str(evaluation), "MID": str(mid)})
        return out.returncode, [line[4:-3] for line in out.stdout.splitlines() if line.startswith("ran ")], out.stdout.splitlines()[-1]
    for code in (1, 2):
        got, ran, last = run(code, 0)
        assert got == 1 and ran[-4:] == ["chat_eval", "chat_rl", "chat_eval", "report"] and "these failed: base-eval;" in last
    assert run(0, 0)[0] == 0
    for code in (2, 3, 139):
        got, ran, last = run(1, code)
        assert got == code and ran[-2:] == ["base_train", "report"] and last.startswith(f"mid failed with code {code};"), (ran, last)
    got, ran, last = run(0, 75)
    assert got == 75 and ran[-1] == "base_train" and last == "stopped in mid with everything saved: run the same command again"


def test_a_signal_to_the_script_reaches_the_phase_and_not_what_the_phase_has_started(tmp_path):
    with_phases(tmp_path, """
[ "$1" = prepare_data.py ] || exit 0
trap 'sleep 0.2; touch told; wait; echo the phase was told; exit 75' TERM
bash -c 'trap "echo the helper was told" TERM; touch listening; while [ ! -f told ]; do sleep 0.05; done; exit 0' &
wait
""")
    process = subprocess.Popen(["bash", "speedrun.sh", "--only=data"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for((tmp_path / "listening").exists, process)
    process.terminate()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "the phase was told" in out and "the helper" not in out, out
