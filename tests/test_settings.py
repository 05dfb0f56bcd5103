"""configurator.py: overrides, types, unknown keys, --help, files of assignments, what defines the result."""
import subprocess
import sys

import pytest

from conftest import REPO, ends

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
settings = configurator.configure(globals())
later = 3           # no setting
print(repr((depth, lr, name, on, mixture, limit, device_rows)), sorted(settings.defining), sorted(settings.free))
'''

def run(tmp_path, *args):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(repo=str(REPO)))
    return subprocess.run([sys.executable, str(path), *args], capture_output=True, text=True, cwd=tmp_path)

def test_defaults_and_halves(tmp_path):
    out = run(tmp_path)
    assert out.stdout.strip() == "(20, 0.5, 'x', False, ['a'], None, 8) ['depth', 'limit', 'lr', 'mixture', 'name', 'on'] ['device_rows']"

def test_overrides_of_every_type(tmp_path):
    out = run(tmp_path, "--depth=4", "--lr=1", "--name=7", "--on=True", "--mixture=b,c*2", "--limit=2.5", "--device_rows=2")
    assert out.stdout.startswith("(4, 1.0, '7', True, ['b', 'c*2'], 2.5, 2)"), out
    assert run(tmp_path, "--mixture=['q']", "--limit=None").stdout.startswith("(20, 0.5, 'x', False, ['q'], None, 8)")

def test_a_file_of_assignments_and_the_last_one_wins(tmp_path):
    (tmp_path / "mine.py").write_text("import os\ndepth = 2 ** 3\nlr = 1\n")
    assert run(tmp_path, "mine.py", "--lr=2.5").stdout.startswith("(8, 2.5,")
    assert run(tmp_path, "--depth=1", "mine.py").stdout.startswith("(8, 1.0,")

@pytest.mark.parametrize("args,says", [
    (["--dept=4"], "--depth"), (["--depth=four"], "whole number"), (["--depth=1.5"], "whole number"), (["--on=1"], "True or False"),
    (["--lr=fast"], "a number"), (["--limit=soon"], "None or a number"), (["depth=4"], "--key=value"), (["--depth"], "--key=value"), (["absent.py"], "no such settings file"),
    (["--later=4"], "unknown setting"), (["--depth=True"], "whole number")])
def test_what_is_wrong_is_one_line_and_exit_code_2(tmp_path, args, says):
    out = run(tmp_path, *args)
    assert out.returncode == 2 and out.stdout == ""
    assert out.stderr.count("\n") == 1 and says in out.stderr, out.stderr

@pytest.mark.parametrize("name,value,default,right", [
    ("keep", "0", 1, False), ("rows", "0", 64, False), ("keep", "2", 1, True), ("seed", "-1", 1337, False), ("seed", "1.5", None, False), ("seed", "None", None, True), ("threads", "-1", 0, False), ("rl.num_steps", "-5", -1, False),
    ("max_steps", "0", -1, False), ("total_batch_size", "-2", -1, False), ("num_steps", "-1", -1, True), ("device", "gpu", "auto", False), ("dtype", "fp16", "auto", False), ("compile", "maybe", "auto", False),
    ("compile", "True", "auto", True), ("compile", "False", False, True)])
def test_what_makes_no_sense_is_refused_at_once(name, value, default, right, capsys):
    import configurator
    if right:
        assert str(configurator.convert(name, value, default)) == value
        return
    with ends() as stopped:
        configurator.convert(name, value, default)
    assert stopped.code == 2 and f"--{name} must be" in capsys.readouterr().err

def test_a_data_folder_is_the_same_however_it_is_named(tmp_path, monkeypatch):
    import configurator
    (tmp_path / "texts").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert {configurator.convert("data", name, "toy") for name in ("texts", "./texts/", "~/texts", str(tmp_path / "texts"))} == {str(tmp_path / "texts")}
    assert [configurator.convert("data", name, "") for name in ("toy", "fineweb_edu", "")] == ["toy", "fineweb_edu", ""]

def test_dashes_stand_for_underscores(tmp_path):
    assert run(tmp_path, "--device-rows=3").stdout.startswith("(20, 0.5, 'x', False, ['a'], None, 3)")

def test_help_prints_all_settings_with_comments_and_defaults(tmp_path):
    out = run(tmp_path, "--help")
    assert out.returncode == 0 and "python script.py --depth=4" in out.stdout
    for name, default, comment in [("depth", "20", "layers"), ("lr", "0.5", "learning rate"), ("mixture", "['a']", "a list"), ("device_rows", "8", "rows at once")]:
        assert any(f"--{name}={default}" in line and comment in line for line in out.stdout.split("\n")), name
    assert "later" not in out.stdout

@pytest.mark.parametrize("script", sorted(p.name for p in REPO.glob("*.py") if "configurator.configure(globals())" in p.read_text() and p.name != "configurator.py"))
def test_every_setting_of_every_script_has_a_comment(script):
    import configurator
    for name, comment, _ in configurator.declared(REPO / script):
        assert comment, f"{script}: {name} has no comment"

def test_settings_behind_the_dashes_are_held_against_the_phases_that_have_them():
    check = lambda *args: subprocess.run([sys.executable, "configurator.py", "check", *args], cwd=REPO, capture_output=True, text=True)
    readme = (REPO / "README.md").read_text().split("# a laptop with two cores")[1].split("\n")[1].split(" -- ")[1]  # --max_steps=50 and so on: no phase has all
    assert "--max_steps=50" in readme and check(*readme.split()).stderr == ""
    for arg in ("--max_steps=some", "--sft.max_steps=-5"):
        out = check(arg)
        assert out.returncode == 2 and "max_steps" in out.stderr and out.stderr.count("\n") == 1, out.stderr
