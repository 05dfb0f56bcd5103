"""configurator.py: overrides, types, ranges, unknown keys, --help, files of assignments, what
defines the result, settings of other phases."""
import ast
import re
import shlex
import subprocess
import sys
from collections import Counter

import pytest

import configurator
import fuzz_settings
import pipeline
from conftest import REPO, ends, exit_code, script

SCRIPT = '''"""A script.

    python script.py --depth=4
"""
import sys
sys.path.insert(0, {repo!r})
import configurator
depth = 20          # layers
lr = 0.5            # learning rate
name = "x"          # a name
on = False          # a switch
mixture = ["a"]     # a list
limit = None        # none or a number
# ---- settings below may change at every resume
device_rows = 8     # rows at once
settings = configurator.configure(globals(){more})
later = 3           # no setting
print(repr((depth, lr, name, on, mixture, limit, device_rows)))
print(sorted(settings.defining), sorted(settings.free), settings.of_phases)
'''

def run(tmp_path, *args, more="", edited=()):
    path, source = tmp_path / "script.py", SCRIPT.format(repo=str(REPO), more=more)
    for line in edited:
        name = line.split(" = ")[0]
        source = re.sub(rf"^{name} = .*?  ", f"{line}  ", source, flags=re.MULTILINE)
        assert line in source
    path.write_text(source)
    return subprocess.run([sys.executable, str(path), *args], capture_output=True, text=True,
                          cwd=tmp_path, check=False)

def values(tmp_path, *args, **more):
    """-> the values of the script's seven settings, as Python prints them"""
    out = run(tmp_path, *args, **more)
    assert out.returncode == 0, out.stderr
    return out.stdout.partition("\n")[0]

def test_defaults_and_halves(tmp_path):
    assert run(tmp_path).stdout.splitlines() == [
        "(20, 0.5, 'x', False, ['a'], None, 8)",
        "['depth', 'limit', 'lr', 'mixture', 'name', 'on'] ['device_rows'] {}"]

def test_a_default_edited_in_the_script_may_be_an_expression(tmp_path):
    edited = ["depth = 2 ** 3", "limit = 4 * depth"]
    assert values(tmp_path, edited=edited) == "(8, 0.5, 'x', False, ['a'], 32, 8)"
    assert values(tmp_path, "--depth=5", edited=edited) == "(5, 0.5, 'x', False, ['a'], 32, 8)"

def test_overrides_of_every_type(tmp_path):
    args = ["--depth=4", "--lr=1", "--name=7", "--on=True", "--mixture=b,c*2", "--limit=2.5",
            "--device_rows=2"]
    assert values(tmp_path, *args) == "(4, 1.0, '7', True, ['b', 'c*2'], 2.5, 2)"
    found = values(tmp_path, "--mixture=['q']", "--limit=None")
    assert found == "(20, 0.5, 'x', False, ['q'], None, 8)"
    assert values(tmp_path, "--mixture=") == "(20, 0.5, 'x', False, [], None, 8)"

def test_a_file_of_assignments_and_the_last_one_wins(tmp_path):
    (tmp_path / "mine.py").write_text("import os\ndepth = 2 ** 3\nlr = 1\n")
    assert values(tmp_path, "mine.py", "--lr=2.5").startswith("(8, 2.5,")
    assert values(tmp_path, "--depth=1", "mine.py").startswith("(8, 1.0,")

@pytest.mark.parametrize("text,says", [
    ("dept = 4", "--depth"), ("lr = 'fast'", "a number"), ("depth = {}", "a whole number"),
    ("shapes = (1, 2)", "unknown setting"), ("depth = (", "never closed"),
    ("name = '\udcff'", "(unicode error)"), ("1 / 0", "ZeroDivisionError"), ("\0", "null bytes"),
    ("import sys; sys.exit()", "SystemExit"), ("def f(): f()\nf()", "RecursionError"),
    ("lr = float('inf')", "--lr must be"), ("depth = 10 ** 5000", "thousands of digits"),
    ("mixture = [1, 2]", "a list of texts"), ("name = '\\0'", "no text")])
def test_what_is_wrong_in_a_file_of_assignments_is_one_line_with_its_place(tmp_path, text, says):
    content = f"lr = 0.1\n{text}\n".encode(errors="surrogateescape")
    (tmp_path / "mine.py").write_bytes(content)
    out = run(tmp_path, "mine.py")
    assert out.returncode == 2 and out.stdout == ""
    assert out.stderr.count("\n") == 1 and says in out.stderr, out.stderr
    line = "mine.py, line 1" if "null" in says else "mine.py, line 2"
    assert line in out.stderr, out.stderr

def test_a_tuple_in_a_file_of_assignments_is_a_list(tmp_path):
    (tmp_path / "mine.py").write_text("mixture = ('b', 'c')")
    assert values(tmp_path, "mine.py") == "(20, 0.5, 'x', False, ['b', 'c'], None, 8)"

@pytest.mark.parametrize("args,says", [
    (["--dept=4"], "--depth"), (["--depth=four"], "whole number"),
    (["--depth=1.5"], "whole number"), (["--depth=True"], "whole number"),
    (["--on=1"], "True or False"), (["--lr=fast"], "a number"),
    (["--limit=soon"], "a number or None"), (["depth=4"], "--key=value"),
    (["--depth"], "--depth=VALUE"), (["absent.py"], "no such settings file"),
    (["--later=4"], "unknown setting"), (["--sft.depth=4"], "unknown setting"),
    (["."], "--key=value"), (["folder.py"], "no such settings file")])
def test_what_is_wrong_is_one_line_and_exit_code_2(tmp_path, args, says):
    out = run(tmp_path, *args)
    assert out.returncode == 2 and out.stdout == ""
    assert out.stderr.count("\n") == 1 and says in out.stderr, out.stderr

@pytest.mark.parametrize("name,value,default,right", [
    ("keep", "0", 1, False), ("keep", "2", 1, True), ("rows", "0", 64, False),
    ("device_batch_size", "0", 8, False), ("max_new_tokens", "-1", 256, False),
    ("seed", "-1", 1337, False), ("seed", "1.5", None, False), ("seed", "None", None, True),
    ("threads", "-1", 0, False), ("threads", "0", 0, True),
    ("rl.num_steps", "-5", -1, False), ("num_steps", "-1", -1, True),
    ("max_steps", "0", -1, False), ("total_batch_size", "-2", -1, False),
    ("device", "gpu", "auto", False), ("dtype", "fp16", "auto", False),
    ("compile", "maybe", "auto", False), ("compile", "True", "auto", True),
    ("compile", "False", False, True), ("matrix_lr", "-1.0", 0.02, False),
    ("matrix_lr", "-0.5", 0.02, False), ("warmup_ratio", "7.0", 0.01, False),
    ("warmup_ratio", "1.0", 0.01, True), ("save_minutes", "-1.0", 3.0, False),
    ("time_limit", "-1", None, False), ("time_limit", "None", None, True),
    ("eval_tokens", "-5", 100, False), ("max_skipped", "-1", 10, False),
    ("target_flops", "-1.0", -1.0, True), ("target_flops", "-7", -1.0, False),
    ("matrix_lr", "0", 0.02, False), ("scalar_lr", "0.0", 0.0, True),
    ("lr_fraction", "-1", 1.0, False), ("warmdown_ratio", "5", 0.6, False),
    ("seed", "9" * 20, 1337, False), ("depth", "1000", 20, False),
    ("threads", "99999999", 0, False), ("device_batch_size", "9" * 20, 32, False),
    ("source", "xyz", "sft", False), ("source", "", "sft", False), ("source", "", "", True),
    ("core_items", "-1", -1, True), ("core_items", "-2", -1, False), ("yours", "1e19", 0.5, False),
    ("tag", "/x", "", False), ("tag", "a\nb", "", False), ("tag", "a\n", "", False),
    ("tag", "x" * 101, "", False), ("tag", "-x", "", False), ("tag", ".x", "", False),
    ("tag", "é", "", False), ("tag", "x" * 100, "", True),
    ("tag", "..", "", False), ("tag", "a/b", "", False), ("tag", "my run", "", False),
    ("tag", "x.old-1", "", False), ("tag", "wide-2.5_b", "", True), ("tag", "", "", True)])
def test_what_makes_no_sense_is_refused_at_once(name, value, default, right, capsys):
    if right:
        assert str(configurator.convert(name, value, default)) == value
        return
    assert exit_code(configurator.convert, name, value, default) == 2
    assert f"--{name} must be" in capsys.readouterr().err

NASTY = ["{[]:1}", "-" * 1000, "(" * 300, "9" * 5000, "1e999", "nan", "inf", "-inf", "9" * 400,
         "1j", "1if 2else 3", "b'x'", "{}", "[[1]]", "[1, 2]", "\\", "a\0b", "\udcff", 10 ** 5000,
         float("inf"), float("nan"), -10 ** 400, ["a", 3], [["a"]], {}, object()]

@pytest.mark.parametrize("default", [20, 0.5, None, True, ["a"]])
@pytest.mark.parametrize("number", range(len(NASTY)))
def test_what_is_no_value_is_refused_in_one_line(number, default, capsys):
    value = NASTY[number]
    if isinstance(default, list) and isinstance(value, str) and value[:2] not in ("[[", "[1", "b'"):
        value = ["a\0b"]  # nearly any text is a list of one
    with ends() as end:
        configurator.convert("mixture" if isinstance(default, list) else "yours", value, default)
    said = capsys.readouterr().err
    assert end.code == 2 and said.startswith("error: --") and said.count("\n") == 1
    assert len(said) < 250

SCRIPTS = sorted(p.name for p in REPO.glob("*.py") if re.search(
    r"^settings = configurator.configure\(", p.read_text(), re.MULTILINE))

@pytest.mark.parametrize("name", SCRIPTS)
def test_every_number_has_a_range_in_which_its_default_lies_and_nothing_endless_does(name):
    numbers = {key: default for key, default in configurator.defaults(name).items()
               if not isinstance(default, (bool, str, list))}
    for key, default in numbers.items():
        low, high = configurator.RANGES[key]
        assert default in (None, -1) or low <= default <= high, key
        for value in ("inf", "-inf", "nan", "1e999", "9" * 40, str(low - 3), str(2 * high), "-7"):
            assert exit_code(configurator.convert, key, value, default) == 2, (key, value)

@pytest.mark.parametrize("name,words,says", [
    ("base_train.py", ["--total_batch_size=3"], "multiple of --max_seq_len"),
    ("mid_train.py", ["--mixture="], "nothing to learn from"),
    ("chat_sft.py", ["--held_out="], "--held_out is empty"),
    ("chat_eval.py", ["--tasks="], "--tasks is empty"),
    ("chat_rl.py", ["--temperature=0"], "--temperature must be more than 0"),
    ("chat_sft.py", ["--data=~nobodyatall/x"], "names no folder"),
    ("chat_sft.py", [f"--data={'x' * 300}"], "names no folder")])
def test_what_a_script_cannot_be_called_with_is_known_without_running_it(name, words, says, capsys):
    with ends() as end:
        configurator.read(REPO / name, words)
    said = capsys.readouterr().err
    assert end.code == 2 and says in said and said.count("\n") == 1
    configurator.read(REPO / "mid_train.py", ["--mixture=", "--extra_conversations=mine.jsonl"])

def test_a_device_that_is_not_there_is_refused_before_anything_is_written(tmp_path):
    out = script(tmp_path / "state", "base_train.py", "--device=cuda")
    assert out.returncode == 2 and "torch sees no GPU" in out.stderr
    assert out.stderr.count("\n") == 1 and not (tmp_path / "state").exists()

def test_random_settings():
    table, wrong = fuzz_settings.fuzz(cases=60, seed=1)
    assert not wrong, "\n".join(wrong)
    outcomes = sum(table.values(), Counter())
    assert outcomes["refused"] > 20 and outcomes["accepted"] > 5

def test_an_old_python_is_named_in_one_line(tmp_path):
    """Whatever it cannot read, or lacks, comes later."""
    old = ("import runpy, sys\n"
           "for name in ('numpy', 'tiktoken', 'regex', 'torch', 'execution', 'toy_world'):\n"
           "    sys.modules[name] = None\n"
           "sys.version_info = (3, 9, 2)\n"
           "runpy.run_path(sys.argv[1], run_name='__main__')\n")
    for name in [*SCRIPTS, "launch.py", "slurm.py"]:
        out = script(tmp_path, "-c", old, name)
        assert out.returncode == 2 and "Python 3.11 or newer is needed" in out.stderr, out.stderr
        assert out.stderr.count("\n") == 1 and out.stdout == ""
    later = {"execution.py", "toy_world.py"}
    for path in REPO.glob("*.py"):
        if path.name not in later:
            ast.parse(path.read_text(), feature_version=(3, 8))

def test_a_data_folder_is_the_same_however_it_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "texts"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("texts", "./texts/", "~/texts", str(folder)):
        assert configurator.convert("data", name, "toy") == str(folder)
    for name in ("toy", "fineweb_edu", ""):
        assert configurator.convert("data", name, "") == name

def test_dashes_stand_for_underscores(tmp_path):
    assert values(tmp_path, "--device-rows=3") == "(20, 0.5, 'x', False, ['a'], None, 3)"

def test_a_setting_may_have_a_short_name_of_two_words(tmp_path):
    short = ', short={"-n": "name"}'
    found = values(tmp_path, "-n", "--on=1", "--depth=4", more=short)
    assert found == "(4, 0.5, '--on=1', False, ['a'], None, 8)"
    out = run(tmp_path, "-n", more=short)
    assert out.returncode == 2 and "-n needs a name" in out.stderr
    assert run(tmp_path, "-n", "b").returncode == 2, "no other script has it"

def test_settings_of_other_phases_are_kept_apart_where_a_script_takes_them(tmp_path):
    out = run(tmp_path, "--rl.num-steps=8", "--depth=3", "--sft.mixture=b,c", "--rl.depth=9",
              more=", of_phases=True")
    assert out.stdout.startswith("(3, 0.5, 'x', False, ['a'], None, 8)"), out
    assert out.stdout.endswith(
        "{'rl.num_steps': '8', 'sft.mixture': 'b,c', 'rl.depth': '9'}\n")

def test_help_prints_all_settings_with_comments_and_defaults(tmp_path):
    out = run(tmp_path, "--help")
    assert out.returncode == 0 and "python script.py --depth=4" in out.stdout
    lines = out.stdout.split("\n")
    for setting, comment in (("--depth=20", "layers"), ("--lr=0.5", "learning rate"),
                             ("--mixture=['a']", "a list"), ("--device_rows=8", "rows at once")):
        assert any(setting in line and comment in line for line in lines), setting
    assert "later" not in out.stdout
    assert any("--depth=20" in line and line.endswith("[1 to 999]") for line in lines)

@pytest.mark.parametrize("name", SCRIPTS)
def test_every_setting_of_every_script_has_a_comment(name):
    declared = configurator.declared(REPO / name)
    assert declared
    for key, setting in declared.items():
        assert setting.comment, f"{name}: {key} has no comment"
    assert list(configurator.defaults(name)) == list(declared)

@pytest.mark.parametrize("name", SCRIPTS)
def test_help_and_a_mistake_are_answered_before_anything_large_is_imported(tmp_path, name):
    """Each takes 0.1 to 0.3 s; torch alone takes 1.5, numpy and requests a tenth each."""
    for words, code, large in ((["--help"], 0, {"torch", "pyarrow", "numpy", "requests"}),
                               (["--no_such_setting=1"], 2, {"torch", "pyarrow"})):
        out = script(tmp_path, "-X", "importtime", name, *words)
        imported = {line.split("|")[-1].strip() for line in out.stderr.splitlines()}
        assert out.returncode == code and "configurator" in imported
        assert not imported & large

# ---- behind the -- of speedrun.sh

def test_files_of_conversations_are_those_that_the_user_sees(tmp_path, monkeypatch):
    words = ["--mixture=gsm8k,my.jsonl*2", "--sft.extra_conversations=a.jsonl.gz", "--seed=1",
             "--mixture=/x/y.jsonl:9", "--held_out=['b c.jsonl', 'mmlu']"]
    monkeypatch.chdir(REPO)
    assert [configurator.from_here(word) for word in words] == words
    monkeypatch.chdir(tmp_path)
    assert [configurator.from_here(word) for word in words] == [
        f"--mixture=gsm8k,{tmp_path}/my.jsonl*2",
        f"--sft.extra_conversations={tmp_path}/a.jsonl.gz", "--seed=1",
        "--mixture=/x/y.jsonl:9", f"--held_out=['{tmp_path}/b c.jsonl', 'mmlu']"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert configurator.from_here("--mixture=~/my.jsonl*2") == f"--mixture={tmp_path}/my.jsonl*2"
    (tmp_path / "my, own.parquet").touch()
    assert configurator.from_here("--mid.mixture=my, own.parquet*2,gsm8k") == (
        f"--mid.mixture={tmp_path}/my, own.parquet*2,gsm8k")
    assert configurator.from_here("--extra_conversations=my, own.parquet") == (
        f"--extra_conversations={tmp_path}/my, own.parquet")

def test_starting_over_needs_the_name_of_a_phase(capsys):
    for word in ("--start_over=True", "--start-over=True", "--try_out=True"):
        assert exit_code(configurator.check_arguments, [word]) == 2
        assert "needs its phase" in capsys.readouterr().err
    configurator.check_arguments(["--sft.start_over=True"])

def test_settings_behind_the_dashes_are_held_against_the_phases_that_have_them(capsys):
    readme = (REPO / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^    bash speedrun\.sh .* -- (.*)", readme, re.MULTILINE)
    assert any("--max_steps=50" in command for command in commands)  # no phase has all of that
    for command in commands:
        configurator.check_arguments(shlex.split(command, comments=True))
    for argument in ("--max_steps=some", "--sft.max_steps=-5"):
        with ends() as end:
            configurator.check_arguments([argument])
        said = capsys.readouterr().err
        assert end.code == 2 and argument.split("=")[0] in said and said.count("\n") == 1

def test_each_phase_accepts_what_it_has_and_prepare_data_what_the_others_read():
    arguments = ["--rl.samples=4", "--seed=1", "--depth=3", "--sft.mixture=a,b", "--nothing=1"]
    accepted = {phase.name: configurator.accepted(phase, arguments) for phase in pipeline.PHASES}
    assert accepted["rl"] == ["--seed=1", "--samples=4"]
    assert accepted["sft"] == ["--seed=1", "--mixture=a,b"]
    assert accepted["base"] == ["--seed=1", "--depth=3"]
    assert accepted["data"] == ["--seed=1", "--depth=3", "--rl.samples=4", "--sft.mixture=a,b"]
