"""
What is done, what is half done, what died and why, and what to run next.

    python status.py                # every data set in the state folder
    python status.py --data=toy
"""
import time

import checkpoint
import common
import configurator
import phase

data = ""                    # a data set (toy, fineweb_edu, climbmix or a folder); empty: all that have a state
settings = configurator.configure(globals()) if __name__ == "__main__" else None


def folders(root):
    """[(what, stage or None, directory)] of the phases of a data set, in order; a stage without any run has directory None"""
    found = [("data", None, root / "base_data"), ("tok", None, root / "tokenizer")]
    for stage, folder in common.STAGES.items():
        runs = [d for d in sorted((root / folder).glob("*")) if d.is_dir() and ".old-" not in d.name]
        found += [(stage, stage, d) for d in runs] or [(stage, stage, None)]
    return found

def describe(directory):
    """-> (state, words): state is done, running, interrupted, died, failed or absent"""
    record = phase.read(directory) if directory else None
    if not record:
        adopted = directory is not None and any(directory.glob("*"))
        return ("done", "there, made elsewhere") if adopted else ("absent", "not started")
    steps = checkpoint.steps(directory)
    meta = (common.read_json(directory / checkpoint.names(steps[0])[2]) or {}) if steps else {}
    where = f", saved at step {steps[0]}" + (f" of {meta['num_steps']}" if "num_steps" in meta else "") if steps else ""
    age = common.clock(time.time() - record["updated"])
    if record["status"] == "done":
        return "done", f"done{where}, {age} ago"
    if record["status"] == "running":
        lock = common.read_json(directory / "lock.json")
        if lock and phase.holder_alive(lock, (directory / "lock.json").stat().st_mtime):
            return "running", f"running{where} (process {lock['pid']} on {lock['host']}, started {age} ago)"
        return "died", f"died without a word{where} (process {record['pid']} on {record['host']}, started {age} ago; killed, or out of memory?)"
    return record["status"], f"{record['status']}{where}, {age} ago: {record['reason']}"

def main():
    known = {"toy": common.data_root("toy"), **{name: common.base_dir() for name in common.SHARED_DATA[:1]}}
    roots = {data: common.data_root(data)} if data else {
        **known, **{d.name: d for d in sorted(common.base_dir().glob("*")) if (d / "tokenizer").is_dir() and d.name != "toy"}}
    following, shown = None, 0
    for name, root in roots.items():
        states = [(what, directory, *describe(directory)) for what, _, directory in folders(root)]
        if not data and not any(state != "absent" for _, _, state, _ in states):
            continue
        shown += 1
        print(f"{name} ({root})")
        for what, directory, state, words in states:
            tag = f" {directory.name}" if directory and directory.name not in ("base_data", "tokenizer") else ""
            print(f"  {what + tag:<12} {words}")
            if state not in ("done", "running") and following is None:
                record = (phase.read(directory) if directory else None) or {}
                following = record.get("next") if state != "absent" else None
        evaluations = sorted(p.name for p in (root / "report").glob("c*_*.json") if ".partial" not in p.name)
        if evaluations:
            print(f"  evaluated    {', '.join(evaluations)}")
    if not shown:
        print(f"nothing in {common.base_dir()} yet")
    print(f"next: {following or 'bash speedrun.sh' + (f' --data={data}' if data else '')}")

if __name__ == "__main__":
    main()
