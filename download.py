"""
Where public data is, and how it comes here whole or not at all. The only file that uses the internet.

    fetch_all([(url, path, opens, size), ...], "python prepare_data.py --data=fineweb_edu")

A file is received under the name .part-NAME beside its place, continued there by a later call, opened, compared with the
size and checksum that the server states, and only then renamed. Two processes at the same file: the second waits.
"""
import email.utils
import errno
import fcntl
import json
import os
import random
import re
import shutil
import threading
import time

import common

# name: [address of file i, number of files, bytes of each, roughly]; $HF_ENDPOINT takes the place of https://huggingface.co
ADDRESSES = json.loads((common.REPO / "assets" / "addresses.json").read_text())
RETRIES = 8      # tries in a row that bring nothing new before a file is given up
BACKOFF = 1.0    # seconds before the second try, doubled for each further one up to a minute
PROGRESS = 5.0   # seconds between progress lines
TIMEOUT = 30.0   # seconds without a byte after which a connection is given up

def offline():
    """Why the network must not be used here, or None."""
    if os.environ.get("NANOCHAT_OFFLINE", "0") not in ("", "0"):
        return "NANOCHAT_OFFLINE is set"
    return "this is a Slurm job" if "SLURM_JOB_ID" in os.environ else None

def forbid_offline(path, command):
    common.check(not offline(), f"{path} would have to be downloaded, but {offline()}: no network is used here; on a machine with internet", command)

def part_of(path):
    return path.with_name(f".part-{path.name}")

def wait_seconds(header, failures):
    """How long to wait: what Retry-After says (seconds or a date; at most 10 minutes), else exponential backoff."""
    if header and header.strip().isdigit():
        return min(600, int(header))
    if header and (date := email.utils.parsedate_tz(header)):
        return min(600, max(0, email.utils.mktime_tz(date) - time.time()))
    return min(60, BACKOFF * 2 ** (failures - 1)) * random.uniform(0.7, 1.3)

def locked(part):
    """Opens the partial file for appending and locks it, waiting for another process that has it."""
    while True:
        f = open(part, "a+b", buffering=0)  # unbuffered: what has come is kept, whenever this process ends
        while True:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        if part.exists() and part.stat().st_ino == os.fstat(f.fileno()).st_ino:
            return f
        f.close()  # finished and renamed by the one we waited for

def receive(session, url, f, state):
    """
    Appends to the open file what is still missing of `url`. -> (seconds to wait from Retry-After or None, error or None, sha256 or None)
    An error that starts with "gone" is final.
    """
    have = os.fstat(f.fileno()).st_size
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with session.get(url, headers=headers, stream=True, timeout=(10, TIMEOUT)) as r:
        total = re.search(r"/(\d+)$", r.headers.get("Content-Range", ""))
        total = int(total[1]) if total else None
        linked = {k.lower(): v for step in [*r.history, r] for k, v in step.headers.items() if k.lower().startswith("x-linked")}
        sha = linked.get("x-linked-etag", "").strip('"')  # Hugging Face states the sha256 of large files so
        sha = sha if re.fullmatch(r"[0-9a-f]{64}", sha) else None
        if r.status_code == 416 and total == have:
            return None, None, sha  # all of it was there
        if r.status_code == 416:
            f.truncate(0)
            return None, "what was there was longer than the file", None
        if r.status_code not in (200, 206):
            final = 400 <= r.status_code < 500 and r.status_code not in (408, 425, 429)
            return r.headers.get("Retry-After"), f"{'gone: ' if final else ''}HTTP status {r.status_code}", None
        if have and f"bytes {have}-" not in r.headers.get("Content-Range", ""):
            f.truncate(0)  # a server that cannot continue sends everything anew
            have = 0
            if r.status_code == 206:
                return None, "the server sent another part than was asked for", None
        if total is None and r.headers.get("Content-Length", "").isdigit():
            total = have + int(r.headers["Content-Length"])
        total = int(linked.get("x-linked-size", 0)) or total
        if total:
            state["sizes"][f.name] = total
        for chunk in r.iter_content(65536):
            f.write(chunk)
            state["bytes"] += len(chunk)  # a count for the progress line: it may miss one now and then
        size = os.fstat(f.fileno()).st_size
        if total and size > total:
            f.truncate(0)
        return None, None if not total or size == total else f"{size:,} of {total:,} bytes came", sha

def fetch(session, url, path, opens, state):
    """Brings one file. -> None, or why it could not be had."""
    import requests
    part, failures, best = part_of(path), 0, 0
    path.parent.mkdir(parents=True, exist_ok=True)
    if endpoint := os.environ.get("HF_ENDPOINT"):
        url = url.replace("https://huggingface.co", endpoint.rstrip("/"))
    with locked(part) as f:
        while True:
            if path.exists() and opens(path) is None:  # another process was quicker
                part.unlink(missing_ok=True)
                return None
            wait, why, sha = None, None, None
            try:
                wait, why, sha = receive(session, url, f, state)
            except (requests.RequestException, OSError) as e:
                final = getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or isinstance(e, ValueError)  # a full disk; an address that is none
                why = f"gone: {e}" if final else f"{type(e).__name__}: {e}"
            if why is None:
                why = opens(part) or ("its checksum is not the stated one" if sha and common.sha256_file(part) != sha else None)
                if why is None:
                    os.fsync(f.fileno())
                    os.replace(part, path)
                    common.fsync_dir(path.parent)
                    return None
                why = f"what came from there is not right: {why}"
                f.truncate(0)
            size = os.fstat(f.fileno()).st_size
            failures = 0 if size > best else failures + 1  # a line that breaks but brings something is not given up
            best = max(best, size)
            if why.startswith("gone") or failures >= RETRIES:
                return f"{url}: {' '.join(why.removeprefix('gone: ').split())[:200]}"
            time.sleep(wait_seconds(wait, max(failures, 1)))

def fetch_all(jobs, command, workers=8, also=0):
    """
    jobs: list of (url, path, opens, size); opens(path) -> None or what is wrong with the file; size in bytes, roughly;
    also: bytes that the next phases will make of it and that must have room too
    Returns when all are there. Exits with 75 when asked to stop (what came is kept), with 2 before the first byte where the
    network is forbidden or the disk too small, else with 1, naming what could not be had.
    """
    import requests
    if not jobs:
        return
    forbid_offline(jobs[0][1], command)
    there = sum(part_of(path).stat().st_size for _, path, _, _ in jobs if part_of(path).exists())
    needed = sum(size for *_, size in jobs) - there
    folder = next(p for p in (jobs[0][1], *jobs[0][1].parents) if p.is_dir())
    free = shutil.disk_usage(folder).free
    common.print0(f"downloading {len(jobs)} files, about {needed / 1e9:.2f} GB, to {common.base_dir()} ({free / 1e9:.1f} GB free)")
    common.check(needed + also < free, f"{needed / 1e9:.2f} GB have to be downloaded{f' and {also / 1e9:.2f} GB are made of it' if also else ''}, "
                 f"but only {free / 1e9:.2f} GB are free in {folder}; "
                 "free some, or set NANOCHAT_BASE_DIR to a larger disk", command)
    todo, state, done, errors, started, shown = list(reversed(jobs)), {"bytes": 0, "sizes": {}}, [], [], time.time(), 0.0

    def work():
        session = requests.Session()
        while not errors or state["bytes"]:  # where nothing comes at all the rest is not tried
            try:
                url, path, opens, _ = todo.pop()
            except IndexError:
                return
            try:
                if why := fetch(session, url, path, opens, state):
                    errors.append(f"{path.name} ({why})")
            except Exception as e:  # a thread that dies must not look like one that is done
                errors.append(f"{path.name} ({type(e).__name__}: {e})")
            done.append(path)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(jobs)))]  # daemons: a stop does not wait for a slow server
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if why := common.stop_requested():
            common.fail(f"{why} while downloading; what came is kept, run the same command again", code=75)
        if time.time() - shown > PROGRESS:
            shown, rate = time.time(), state["bytes"] / max(1e-3, time.time() - started)
            total = sum(state["sizes"].get(str(part_of(path)), size) for _, path, _, size in jobs) - there
            common.print0(f"  {len(done) - len(errors)} of {len(jobs)} files, {state['bytes'] / 1e6:,.1f} of {total / 1e6:,.1f} MB, {rate / 1e6:.1f} MB/s"
                          + (f", {common.clock(max(0, total - state['bytes']) / rate)} left" if rate else ""))
        time.sleep(0.05)
    common.print0(f"  {len(done) - len(errors)} of {len(jobs)} files are there, {state['bytes'] / 1e9:.2f} GB in {common.clock(time.time() - started)}")
    if errors:
        common.fail(f"{len(jobs) - len(done) + len(errors)} files could not be had: {'; '.join(errors[:3])}{' ...' if len(errors) > 3 else ''}", 1, command)
