"""
Tries the ways out of the sandbox that a program may know. test_execution.py starts this as root and
as others, beside copies of what it imports:

    python ways_out.py FOLDER     # makes a user's files, pipes and sockets in it; prints JSON
"""
import ctypes
import json
import os
import socket
import sys
from pathlib import Path

import execution

NOBODY = 65534
PROGRAM = """
import ctypes, os, socket
libc = ctypes.CDLL(None)

def read(path): return open(path).read() != ''
def folder(path): return os.listdir(path) != []
def write(path): return os.write(os.open(path, os.O_WRONLY | os.O_NONBLOCK), b'x') == 1
def connect(address): return socket.socket(socket.AF_UNIX).connect(address) is None
def send(address):
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'x', address) == 1
def internet(port): return socket.socket().connect(('127.0.0.1', port)) is None
def key(serial): return libc.syscall(250, 11, serial, ctypes.create_string_buffer(8), 8) > 0
def signal(pid): return os.kill(pid, 0) is None

def create(path): return open(path, 'x') is not None
def remove(path): return os.remove(path) is None
def unshare(flags): return libc.unshare(flags) == 0
def mount(place, kind, flags):
    return libc.mount(b'x', place.encode(), kind.encode(), flags, None) == 0
def uncover(place): return libc.umount2(place.encode(), 2) == 0
def root(path): return os.chroot(path) is None
def device(path): return os.mknod(path, 0o20666, os.makedev(1, 1)) is None
def trace(pid): return libc.ptrace(16, pid, 0, 0) == 0
def opened(fd): return os.fstat(fd) is not None
def execute(path): return os.spawnv(os.P_WAIT, path, [path]) == 0

def out(*way):
    name, *arguments = way
    try: return bool(globals()[name](*arguments))
    except OSError: return False

def view():
    import csv, os, unittest, xml.dom.minidom  # modules that nobody has imported before
    library = os.path.dirname(os.__file__)
    files, writable = [], []
    for folder, _, names in os.walk('/'):
        if not folder.startswith(library) or '-packages' in folder:
            files += [os.path.join(folder, name) for name in names]
        if not os.statvfs(folder).f_flag & os.ST_RDONLY: writable.append(folder)
    above = os.listdir('../' * 40) == os.listdir('/')
    return files, writable, above
def f(*way): return out(*way) if way else view()
"""

def passes(test, namespaces):
    return execution.supervise(PROGRAM, test, "f", 20.0, namespaces) == "passed"

def that_lead(ways, namespaces):
    """Those of the ways that lead out."""
    all_refused = f"def check(f): assert not any(f(*way) for way in {ways!r})"
    if passes(all_refused, namespaces):
        return []
    return [way for way in ways if passes(f"def check(f): assert f(*{way!r})", namespaces)]

def main(folder):
    for name in ("public", "key"):
        (folder / name).write_text("x")
    os.mkfifo(folder / "pipe")
    kept = [os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)]
    for name, kind in (("agent", socket.SOCK_STREAM), ("log", socket.SOCK_DGRAM)):
        kept.append(socket.socket(socket.AF_UNIX, kind))
        kept[-1].bind(str(folder / name))
    kept.append(socket.socket(socket.AF_UNIX))
    kept[-1].bind(f"\0{folder}")
    kept[-1].listen(9)
    kept[1].listen(9)
    server = socket.create_server(("127.0.0.1", 0))
    for path in folder.iterdir():
        path.chmod(0o644 if path.name == "public" else 0o600)
        if os.geteuid() == 0 and execution.can_become_nobody():
            os.chown(path, NOBODY, NOBODY)  # whom the program becomes
    # what leads out without the sandbox, or else proves nothing
    ways = [("read", f"{folder}/public"), ("read", f"{folder}/key"), ("read", "/etc/passwd"),
            ("write", f"{folder}/pipe"), ("connect", f"{folder}/agent"), ("send", f"{folder}/log"),
            ("connect", f"\0{folder}"), ("internet", server.getsockname()[1]),
            ("folder", str(folder)), ("folder", "/proc"), ("folder", "/sys"), ("folder", "/etc"),
            ("read", "/proc/self/cmdline"), ("folder", "/proc/self/root/etc"),
            ("execute", "/bin/true")]
    if os.uname().machine == "x86_64":
        session = -3
        key = ctypes.CDLL(None).syscall(248, b"user", str(folder).encode(), b"secret", 6, session)
        if key > 0:  # else there are no keyrings here
            ways.append(("key", key))
    users, mounts, remount = 0x10000000, 0x20000, 32 | 4096
    library = os.path.dirname(os.__file__)
    rights = [("unshare", users), ("unshare", users | mounts), ("unshare", mounts),
              ("mount", "/sandbox", "tmpfs", 0), ("mount", "/sandbox", "proc", 0),
              ("mount", "/sandbox", "sysfs", 0), ("mount", "/", "", remount),
              ("mount", library, "", remount), ("uncover", library), ("uncover", "/sandbox"),
              ("root", "/sandbox"), ("device", "memory"), ("trace", 1), ("trace", os.getpid()),
              ("signal", os.getpid()), ("create", "/x"), ("create", f"{library}/x.py"),
              ("create", "/dev/x"), ("remove", os.__file__), ("remove", "/dev/null"),
              ("create", f"{folder}/x"), ("create", "/tmp/x-of-a-sandbox"),
              ("create", "/dev/shm/x-of-a-sandbox"), *[("opened", fd) for fd in range(4, 64)]]
    view = "def check(f): assert f() == (['/dev/null'], ['/sandbox'], True)"
    outside = that_lead(ways, False)
    print(json.dumps({"refused without": [way for way in ways if way not in outside],
                      "lead out": that_lead(ways + rights, True), "view": passes(view, True)}))

if __name__ == "__main__":
    main(Path(sys.argv[1]))
