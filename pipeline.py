"""
The pipeline in one table: the phases in their order, the script that runs each, what it goes on
from, where its state stands. The launcher, status.py, report.py and prepare_data.py read it here.
Below it the paths of the state folder, one function for each:

    $NANOCHAT_BASE_DIR             of fineweb_edu and climbmix, as nanochat's users have it
    $NANOCHAT_BASE_DIR/toy         every other data set has a folder of its own, of the same layout
    $NANOCHAT_BASE_DIR/books-1a2b

Only the standard library is needed here.
"""
import contextlib
import glob
import hashlib
import os
import shlex
from pathlib import Path
from typing import NamedTuple

import common

REPO = Path(__file__).resolve().parent
SHARED_DATA = ("fineweb_edu", "climbmix")

class Phase(NamedTuple):
    name: str    # as in speedrun.sh's flags: --skip-mid, --only=sft-eval
    kind: str    # "training" and "evaluation" run on all ranks, "single" is one process
    script: str
    parent: str  # the phase whose model it goes on from or measures; "" for none
    state: str   # its folder, of an evaluation its result file, in the data set's folder

PHASES = [
    Phase("data", "single", "prepare_data.py", "", "base_data"),
    Phase("tok", "single", "tok_train.py", "", "tokenizer"),
    Phase("base", "training", "base_train.py", "tok", "base_checkpoints/{tag}"),
    Phase("base-eval", "evaluation", "base_eval.py", "base", "report/core_base_{tag}.json"),
    Phase("mid", "training", "mid_train.py", "base", "mid_checkpoints/{tag}"),
    Phase("mid-eval", "evaluation", "chat_eval.py", "mid", "report/chat_mid_{tag}.json"),
    Phase("sft", "training", "chat_sft.py", "mid", "chatsft_checkpoints/{tag}"),
    Phase("sft-eval", "evaluation", "chat_eval.py", "sft", "report/chat_sft_{tag}.json"),
    Phase("rl", "training", "chat_rl.py", "sft", "chatrl_checkpoints/{tag}"),
    Phase("rl-eval", "evaluation", "chat_eval.py", "rl", "report/chat_rl_{tag}.json"),
    Phase("report", "single", "report.py", "", "report/report.md"),
]
STAGES = [p.name for p in PHASES if p.kind == "training"]  # base, mid, sft, rl

def inside(*words):
    """A command as it is started where our packages are: behind $NANOCHAT_CONTAINER, if that is
    set.  example: ("python", "x.py") -> ["apptainer", "exec", "--nv", "x.sif", "python", "x.py"]"""
    return [*shlex.split(os.environ.get("NANOCHAT_CONTAINER", "")), *words]

def find_phase(name):
    """The Phase of that name; a KeyError where there is none."""
    return {phase.name: phase for phase in PHASES}[name]

def command_of(name, data):
    """The words that start a phase alone, as speedrun.sh trains it.
    example: ("tok", "toy") -> ["python", "tok_train.py", "--data=toy", "config/toy_tok.py"]"""
    words = ["python", find_phase(name).script, f"--data={data}"]
    return [*words, f"config/toy_{name}.py"] if data == "toy" else words

def starting_over(name):
    """What starts the phase (or script) `name` over and no other."""
    return setting_for(name, "start_over=True")

def setting_for(name, setting):
    """A setting for the phase (or script) `name` and no other: for its own script, or behind the
    flags of speedrun.sh where that has started this process.
    example: ("chat_sft", "rewind=7") -> "--rewind=7" or "-- --sft.rewind=7" """
    phase = next((p.name for p in PHASES if name in (p.name, p.script.removesuffix(".py"))), name)
    launched = "NANOCHAT_OUTCOME" in os.environ
    return f"-- --{phase}.{setting}" if launched else f"--{setting}"

@contextlib.contextmanager
def naming(what):
    """with naming(...): -> what is no path of a file there is a Failure"""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as e:  # ~nobody, a loop of links, a long name
        common.fail(f"{what} names no folder: {e}")

def base_dir():
    """$NANOCHAT_BASE_DIR, by default ~/.cache/nanochat. A site.env with the line ends of Windows
    may have left one behind it."""
    named = os.environ.get("NANOCHAT_BASE_DIR", "").rstrip("\r\n") or "~/.cache/nanochat"
    with naming(f"NANOCHAT_BASE_DIR={named}"):
        return Path(named).expanduser().absolute()

def is_folder_data(data):
    """True where `data` is the path of the user's own folder and not a name that we know."""
    return data not in SHARED_DATA and data != "toy"

def whole_path(data):
    """The same folder, from wherever and however it is named.
    examples: "toy" -> "toy";  "../my/texts" -> "/home/me/my/texts". Failure where it is no path."""
    if not is_folder_data(data):
        return data
    with naming(f"--data={data}"):
        folder = Path(data).expanduser().resolve()
        folder.exists()
        str(folder).encode()
        return str(folder)

def data_root(data):
    """The state folder of one data set.
    examples: "fineweb_edu" -> base_dir();  "toy" -> .../toy;  "/x/books" -> .../books-1a2b3c4d"""
    if data in SHARED_DATA:
        return base_dir()
    if data == "toy":
        return base_dir() / "toy"
    folder = Path(whole_path(data))
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()
    return base_dir() / f"{folder.name}-{digest[:8]}"

def namesakes(data):
    """The state folders of other folders that are called as this one is, where it has none itself:
    the same texts, reached by another path, would begin anew.
    example: "/mnt/books" -> [base_dir()/books-1a2b3c4d], of "/x/books" """
    root = data_root(data)
    if not is_folder_data(data) or root.exists():
        return []
    named = glob.escape(root.name[:-8])
    return sorted(base_dir().glob(named + "[0-9a-f]" * 8))

def state_path(name, data, tag="", try_out=False):
    """The folder or result file of a phase.  example: ("sft", "toy", "d4") ->
    base_dir()/toy/chatsft_checkpoints/d4. try_out: where it tries out its first steps instead."""
    if name == "data":
        return base_data_dir(data)
    root = try_out_dir(data, tag) if try_out else data_root(data)
    return root / find_phase(name).state.format(tag=tag)

def lock_of_result(path):
    """The folder whose lock an evaluation holds while it measures for the result file `path`.
    example: report/chat_sft_d4.json -> report/.chat_sft_d4"""
    return path.with_name(f".{path.stem}")

def base_data_dir(data):
    """The folder of the texts. climbmix has its own, as nanochat has it: its files have the names
    of fineweb_edu's."""
    if is_folder_data(data):
        return Path(whole_path(data))
    return data_root(data) / ("base_data_climbmix" if data == "climbmix" else "base_data")

def command_file(data, tag):
    """What the launcher was last given for a run."""
    return data_root(data) / f"speedrun_{tag}.json"

def try_out_dir(data, tag):
    """What a run's trial leaves for its later phases: another run's trial may go on beside it."""
    return data_root(data) / f"try_out_{tag}"

def tokenizer_dir(data):
    return data_root(data) / "tokenizer"

def token_dir(data):
    return data_root(data) / "tokens"

def report_dir(data):
    return data_root(data) / "report"

def task_dir(data):
    """The files of the chat tasks: every data set but the toy world reads the same public ones."""
    return (data_root("toy") if data == "toy" else base_dir()) / "task_data"

def eval_bundle_dir(data):
    """CORE's bundle; shared as the tasks are."""
    return (data_root("toy") if data == "toy" else base_dir()) / "eval_bundle"
