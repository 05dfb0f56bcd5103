"""
Brings public files here whole or not at all. The only file that uses the internet.

    fetch_all([(url, path, opens, size), ...], "python prepare_data.py", run.stop_reason)

A file is received under the name .part-NAME beside its place, and a later call continues it there.
It is renamed only when it opens and has the size and checksum that the server states. Where two
processes want the same file, the second waits for the first.
"""
import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool

import requests
import urllib3

import common
import pipeline

# what: [address of file i, its name here, number of files, bytes of each, roughly]; the address
# "here" stands for what prepare_data.py makes
ADDRESSES = json.loads((pipeline.REPO / "assets" / "addresses.json").read_text("utf-8"))
HUB = "https://huggingface.co"  # $HF_ENDPOINT takes its place
RETRIES = 8      # attempts in a row that bring nothing new before a file is given up
BACKOFF = 1.0    # seconds before the next attempt, doubled for each further one
PROGRESS = 5.0   # seconds between progress lines
TIMEOUT = 30.0   # seconds without a byte after which a connection is given up

@dataclass
class Progress:
    """What the threads of one fetch_all have done so far."""
    sizes: dict        # path: bytes of the whole file, a guess until the server states them
    received: int = 0  # bytes; the threads add to it without a lock, so it may miss a few

def open_session():
    """A session that asks up to RETRIES times for an answer, where another attempt may help, and
    waits as long as the server's Retry-After says, but no more than ten minutes."""
    retry = urllib3.Retry(total=RETRIES - 1, status_forcelist=[408, 425, 429, *range(500, 600)],
                          raise_on_status=False, backoff_factor=BACKOFF, backoff_jitter=BACKOFF,
                          backoff_max=60, retry_after_max=600)
    session = requests.Session()
    for scheme in ("https://", "http://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
    return session

def part_of(path):
    """data/a.parquet -> data/.part-a.parquet"""
    return path.with_name(f".part-{path.name}")

def open_part(part):
    """Opens the file for appending and locks it, waiting for another process that receives it."""
    while True:
        # unbuffered: what came is kept when this process dies
        f = open(part, "a+b", buffering=0)  # noqa: SIM115
        common.flock(f, fcntl.LOCK_EX)  # where the file system has locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(part.stat(), os.fstat(f.fileno())):
                return f
        f.close()  # the other process has finished and renamed it

def make_room(path):
    """Renames what is at `path`: it may be the user's own, and is not written over."""
    if os.path.lexists(path):
        old = common.aside_name(path)
        os.rename(path, old)
        common.print0(f"moved your {path} to {old.name}")

def size_of(f):
    return os.fstat(f.fileno()).st_size

def stated(response, name):
    """A header that may stand with the file or, as Hugging Face has it, with the redirection."""
    answers = [*response.history, response]
    return next((answer.headers[name] for answer in answers if name in answer.headers), "")

def receive(response, f, path, progress):
    """Appends the body of an answer to the open file; a server that cannot continue sends all of
    it anew. -> None if the file has its full size now, else what is wrong"""
    have = size_of(f)
    content_range = response.headers.get("Content-Range", "")  # bytes 10-99/100, or bytes */100
    total = (stated(response, "X-Linked-Size") or content_range.rpartition("/")[2]
             or response.headers.get("Content-Length", ""))
    if response.status_code == 416 and total == str(have):
        return None  # nothing was missing
    if not content_range.startswith(f"bytes {have}-"):
        f.truncate(0)
        if response.status_code != 200:
            return "the server did not send the part that was asked for"
    if total.isdigit():
        progress.sizes[path] = int(total)
    try:
        for chunk in response.iter_content(65536):
            f.write(chunk)
            progress.received += len(chunk)
    except requests.RequestException as e:
        return f"the connection was lost or timed out: {e}"
    if total.isdigit() and size_of(f) != int(total):
        return f"{size_of(f)} of {total} bytes came"
    return None

def attempt(session, url, f, path, opens, progress):
    """Asks for what is missing of a file. -> None if it is whole and right now, else what is wrong.
    Raises OSError where more attempts would not help: the disk's own, or one of requests'."""
    headers = {"Accept-Encoding": "identity"}
    if size_of(f):
        headers["Range"] = f"bytes={size_of(f)}-"
    with session.get(url, headers=headers, stream=True, timeout=(10, TIMEOUT)) as response:
        if response.status_code != 416:
            response.raise_for_status()
        wrong = receive(response, f, path, progress)
    if wrong:
        return wrong
    wrong = opens(part_of(path))
    sha256 = stated(response, "X-Linked-ETag").strip('"')  # of small files it is something else
    if re.fullmatch("[0-9a-f]{64}", sha256) and common.sha256_file(part_of(path)) != sha256:
        wrong = "its checksum is not the stated one"
    if wrong:
        f.truncate(0)
    return wrong

def fetch(url, path, opens, progress):
    """Brings one file. Raises OSError where that is hopeless."""
    part = part_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    url = url.replace(HUB, (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/"))
    failures = 0
    most = 0  # bytes that were here after any attempt
    with open_session() as session, open_part(part) as f:
        if path.exists() and opens(path) is None:  # another process was quicker
            part.unlink()
            return
        # urllib3 repeats a request until it is answered; a body that breaks is ours to continue
        while wrong := attempt(session, url, f, path, opens, progress):
            failures += 1
            if size_of(f) > most:  # a line that breaks but brings something is not given up
                most = size_of(f)
                failures = 0
            if failures == RETRIES:
                raise requests.exceptions.RetryError(f"nothing new came: {wrong}")
            time.sleep(BACKOFF * 2 ** failures)
        os.fsync(f.fileno())
        make_room(path)
        os.replace(part, path)
        common.fsync_dir(path.parent)

def check_online(paths, command):
    """Failure (code 2) where files have to be downloaded and the network is forbidden."""
    offline = os.environ.get("NANOCHAT_OFFLINE", "0") not in ("", "0")
    why = "NANOCHAT_OFFLINE is set" if offline else "a Slurm job does not use the network"
    common.check(not offline and "SLURM_JOB_ID" not in os.environ,
                 f"missing files: {len(paths)}, the first {paths[0]}; {why}: download them on a "
                 "machine with internet that sees the same NANOCHAT_BASE_DIR", command)

def fetch_all(jobs, command, should_stop, workers=8, also=0):
    """
    jobs: list of (url, path, opens, size): opens(path) -> None or what is wrong with the file,
    size in bytes, roughly; should_stop() -> None or why ("signal SIGTERM"); also: bytes that later
    phases make of the files and that must have room too
    Returns when all are there. Fails with 75 when asked to stop (what came is kept), with 2 before
    the first byte where the network is forbidden or the disk too small, else with 1.
    """
    sizes = {path: size for _, path, _, size in jobs}
    check_online([*sizes], command)
    there = sum(part.stat().st_size for part in map(part_of, sizes) if part.exists())
    needed = sum(sizes.values()) - there
    folder = next(parent for parent in jobs[0][1].parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    common.print0(f"downloading {len(jobs)} files, about {needed / 1e9:.2f} GB, to "
                  f"{pipeline.base_dir()} ({free / 1e9:.1f} GB free)")
    common.check(needed + also < free, f"{(needed + also) / 1e9:.2f} GB are needed in {folder} and "
                 "not free; free some, or set NANOCHAT_BASE_DIR to a larger disk", command)
    progress = Progress(sizes)
    arrived, errors = [], []
    started = shown = time.time()

    def show():
        """example: "  3 of 9 files, 270.1 of 880.0 MB, 31.4 MB/s, 19s left" """
        total = sum(progress.sizes.values()) - there
        rate = progress.received / max(1e-3, time.time() - started)
        line = (f"  {len(arrived)} of {len(jobs)} files, {progress.received / 1e6:,.1f} "
                f"of {total / 1e6:,.1f} MB, {rate / 1e6:.1f} MB/s")
        if rate:
            line += f", {common.duration(max(0, total - progress.received) / rate)} left"
        common.print0(line)

    def work(url, path, opens, size):
        if errors and not progress.received:
            return  # where nothing comes at all the rest is not tried
        try:
            fetch(url, path, opens, progress)
            arrived.append(path)
        except Exception as e:  # noqa: BLE001  (it must not look like a file that arrived)
            errors.append(f"{path.name} ({url}: {type(e).__name__}: {str(e)[:400]})")

    # not a ThreadPoolExecutor: Python waits at its end for the threads of that one, so a stop would
    # take as long as a silent server (30 seconds) or a Retry-After (10 minutes)
    with ThreadPool(min(workers, len(jobs))) as pool:
        result = pool.starmap_async(work, jobs, chunksize=1)
        while not result.ready():
            result.wait(0.05)
            if why := should_stop():
                common.fail(f"{why} while downloading; what came is kept, run the same command "
                            "again", code=75)
            if time.time() - shown > PROGRESS:
                shown = time.time()
                show()
    show()
    missing = len(jobs) - len(arrived)
    if missing:
        common.fail(f"{missing} files could not be downloaded: {'; '.join(errors[:3])}", 1, command)
