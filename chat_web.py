"""
A page to talk to the models of a run, and OpenAI's endpoints for them.

    python chat_web.py                                 # http://127.0.0.1:8000, for this machine
    python chat_web.py --host=0.0.0.0 --token=...      # for others too, who know the token
    ssh -L 8000:localhost:8000 HOST                    # on your laptop, where it runs on HOST

    curl localhost:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"model": "sft", "messages": [{"role": "user", "content": "Who are you?"}]}'

The main thread computes (serving.py); a thread for each connection reads, waits and writes. Ctrl-C
ends it.
"""
import base64
import contextlib
import hashlib
import hmac
import http.server
import ipaddress
import json
import os
import re
import select
import signal
import socket
import socketserver
import sys
import threading
import time
import traceback
from itertools import chain
from urllib.parse import quote

import common
import completions
import configurator
import pipeline
import talk
from completions import Refused
from ranks import Ranks

data = ""                    # toy, fineweb_edu, climbmix or a folder; empty: what was trained last
source = ""                  # stage that the page begins with: base, mid, sft, rl; empty: furthest
tag = ""                     # which model, d4 for instance; empty: the newest
host = "127.0.0.1"           # address to listen on; 0.0.0.0: all of this machine's
port = 8000                  # port to listen on; 0: any that is free
token = ""                   # what a client has to know, as its API key; empty: $NANOCHAT_TOKEN
rows = 16                    # answers that grow at once, of each model
max_waiting = 64             # requests that wait for a place; more are refused (429)
max_body = 1_000_000         # bytes of a request at most
temperature = 0.6            # sampling temperature, where a request says none
top_k = 50                   # sample from the k likeliest tokens, where a request says none; 0: all
max_new_tokens = 512         # tokens of an answer, where a request says nothing
device = "auto"              # device to compute on: auto, cuda, mps, cpu
dtype = "auto"               # compute dtype: auto (the faster), bfloat16, float32
weights = "auto"             # auto (in dtype), or int8: faster on a CPU, less exact
threads = 0                  # CPU threads; 0: all cores
settings = configurator.configure(globals())

PAUSE = 0.02        # seconds between two pieces of a stream: what comes meanwhile goes as one
PATIENCE = 30       # seconds that a client may take to send a request, or a piece that it is sent
MOST_CLIENTS = 256  # connections at once

token = token or os.environ.get("NANOCHAT_TOKEN", "")
common.check(re.fullmatch("[!-~]*", token), "--token has to be of printable ASCII without spaces")
source, data, tag, found = talk.choose(data, source, tag)
page = (pipeline.REPO / "assets" / "chat.html").read_bytes()
script = page.partition(b"<script>")[2].partition(b"</script>")[0]
# no script but this one, and nothing from anywhere else
POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-"
          f"{base64.b64encode(hashlib.sha256(script).digest()).decode()}'; connect-src 'self'; "
          "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")

# -------------------------------------------------------------------------------------------------
# HTTP

reading = {}  # connection that is to send a request -> until when

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "nanochat"
    sys_version = ""
    timeout = PATIENCE
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass  # what is said here stays between the two

    def handle_one_request(self):
        reading[self.connection] = time.monotonic() + PATIENCE
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        finally:
            reading.pop(self.connection, None)

    def send_error(self, code, message=None, explain=None):
        """http.server's own refusals, of what is no HTTP for instance, in OpenAI's form"""
        self.close_connection = True
        self.refuse(Refused(message or "no such request", status=code))

    def begin(self, status, kind, **headers):
        """The status and the headers, with which the client knows how it went."""
        self.begun = True
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        if self.close_connection:
            self.send_header("Connection", "close")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def reply(self, status, body, kind="application/json", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.begin(status, kind, Content_Length=str(len(body)), **headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, refused):
        more = {}
        if refused.status in (429, 503):
            more = {"Retry_After": "1"}
        elif refused.status == 401:
            more = {"WWW_Authenticate": "Bearer"}
        elif refused.status == 405:
            more = {"Allow": "POST" if self.path.startswith("/v1/chat") else "GET, HEAD"}
        self.reply(refused.status, {"error": refused.error}, **more)

    def do_GET(self):
        path = self.path.split("?")[0]
        gets = {"/": self.get_page, "/v1/models": self.get_models, "/health": self.get_health,
                **{f"/v1/models/{stage}": self.get_models for stage in pipeline.STAGES}}
        posts = {"/v1/chat/completions": self.post_completion}
        routes, others = (posts, gets) if self.command == "POST" else (gets, posts)
        self.closing = self.close_connection  # what the client wants
        self.close_connection = True          # unless the body is read, it is no next request
        self.unread, self.begun = 0, False
        try:
            self.unread = self.length_of_body()
            self.close_connection = self.closing or self.unread > 0
            completions.check(path not in others, f"{path}: not by this method", status=405)
            completions.check(path in routes, f"{path[:200]}: no such address", status=404)
            self.check_client(path)
            routes[path]()
        except Refused as e:
            # who still sends, and is hung up on, may never read why
            self.rfile.read(min(self.unread, 2 * max_body))
            self.refuse(e)
        except (ConnectionError, TimeoutError):
            raise
        except Exception as e:  # noqa: BLE001  (a fault of ours, which must not end the others)
            traceback.print_exc()
            self.close_connection = True
            if not self.begun:
                self.refuse(Refused(f"{type(e).__name__}: a fault of the server", status=500))

    do_HEAD = do_POST = do_GET

    def length_of_body(self):
        lengths = self.headers.get_all("Content-Length", [])
        completions.check("Transfer-Encoding" not in self.headers, "a body in chunks is not "
                          "understood: send its Content-Length", status=411)
        completions.check(len(lengths) < 2 and all(re.fullmatch("[0-9]{1,12}", length)
                                                   for length in lengths),
                          "Content-Length is no length")
        return int(lengths[0]) if lengths else 0

    def check_client(self, path):
        """Who may ask. A page of another site in a user's browser reaches this port, too: it cannot
        choose the names that its request comes with, and has none of this machine's own."""
        name = self.headers.get("Host", "localhost").lower()
        bare = name if name.endswith("]") else name.rpartition(":")[0] or name
        own = is_address(bare.strip("[]")) or bare in ("localhost", socket.gethostname().lower())
        completions.check(own or token, f"this is no name of this machine: {name[:100]} (with a "
                          "--token it may have any)", status=403)
        origin = self.headers.get("Origin")
        completions.check(origin in (None, f"http://{name}", f"https://{name}"),
                          "not for pages of another site", status=403)
        if token and path.startswith("/v1/"):
            given = self.headers.get("Authorization", "").removeprefix("Bearer ").encode()
            completions.check(hmac.compare_digest(given, token.encode()),
                              "this server needs its token as the API key", status=401,
                              code="invalid_api_key")

    def get_page(self):
        self.reply(200, page, "text/html; charset=utf-8", Content_Security_Policy=POLICY)

    def get_models(self):
        listed = [{"id": model.stage, "object": "model", "created": int(model.saved),
                   "owned_by": "nanochat", "chats": model.stage != "base"}
                  for model in service.stages()]
        name = self.path.split("?")[0].removeprefix("/v1/models").removeprefix("/")
        if not name:
            self.reply(200, {"object": "list", "data": listed, "preferred": source,
                             "run": f"{tag} of {data}", "temperature": temperature})
            return
        of_name = [model for model in listed if model["id"] == name]
        completions.check(of_name, f"there is no model {name!r}", status=404, param="model",
                          code="model_not_found")
        self.reply(200, of_name[0])

    def get_health(self):
        self.reply(200, {"status": "ok", "answering": len(service.jobs),
                         "waiting": len(service.waiting)})

    def post_completion(self):
        kind = self.headers.get("Content-Type", "").split(";")[0].strip().lower()
        completions.check(kind == "application/json", "Content-Type has to be application/json",
                          status=415)
        completions.check(self.unread > 0, "Content-Length is missing, or 0", status=411)
        completions.check(self.unread <= max_body, f"the body is longer than {max_body:,} bytes",
                          status=413)
        body = self.rfile.read(self.unread)
        if len(body) < self.unread:
            raise ConnectionResetError
        self.unread = 0
        self.close_connection = self.closing
        reading.pop(self.connection, None)
        request = completions.read_request(body, temperature, top_k)
        job = service.ask(request, max_new_tokens)
        try:
            job.wait(self.client_left)  # until it begins, or cannot
            telling = completions.Telling(service.tokenizer, request.stops)
            (self.stream if request.stream else self.whole)(job, telling)
        finally:
            job.given_up = True

    def client_left(self):
        """Whether the other side has closed the connection: then there is nothing to read."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def told(self, job, telling):
        """-> [(kind, text)] at each news"""
        while not telling.ended:
            tokens, ended = job.wait(self.client_left)
            if self.client_left():
                raise ConnectionResetError
            parts = telling.add(tokens, ended)
            job.given_up = telling.cut.met
            if parts:
                yield parts
            if not telling.ended:
                time.sleep(PAUSE)

    def whole(self, job, telling):
        parts = talk.joined(chain.from_iterable(self.told(job, telling)))
        message = {"role": "assistant", "refusal": None, **completions.content_of(parts)}
        choice = {"index": 0, "message": message, "logprobs": None,
                  "finish_reason": telling.ended}
        self.reply(200, {**self.head(job, "chat.completion"), "choices": [choice],
                         "usage": completions.usage_of(len(job.answer.prompt), telling.tokens)})

    def head(self, job, kind):
        return {"id": job.name, "object": kind, "created": job.created,
                "model": job.request.model}

    def stream(self, job, telling):
        """Server-sent events. The connection's end is that of the answer, so that no length has to
        be said."""
        self.close_connection = True
        self.begin(200, "text/event-stream; charset=utf-8")
        head = self.head(job, "chat.completion.chunk")

        def send(delta, ended=None):
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": ended}
            self.event({**head, "choices": [choice]})
        send({"role": "assistant", "content": ""})
        try:
            for parts in self.told(job, telling):
                send(completions.content_of(parts))
        except Refused as e:  # the status is gone out already
            self.event({"error": e.error})
            return
        send({}, telling.ended)
        if job.request.usage:
            usage = completions.usage_of(len(job.answer.prompt), telling.tokens)
            self.event({**head, "choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, content):
        self.wfile.write(b"data: " + json.dumps(content).encode() + b"\n\n")

def is_address(name):
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False

class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def service_actions(self):  # twice a second
        """Hangs up on those who send nothing, or a byte now and then."""
        for connection, until in [*reading.items()]:
            if time.monotonic() > until:
                reading.pop(connection, None)
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def process_request(self, request, client_address):
        if threading.active_count() > MOST_CLIENTS:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def server_bind(self):
        socketserver.TCPServer.server_bind(self)  # http.server's asks for a name, which may hang
        self.server_name, self.server_port = self.server_address[:2]

Server.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
try:
    server = Server((host, port), Handler)
except OSError as e:
    common.fail(f"--host={host} --port={port} cannot be listened on ({e}): --port=0 takes a free "
                "port")

# -------------------------------------------------------------------------------------------------

def leave(signum, frame):
    sys.exit(0)

signal.signal(signal.SIGINT, leave)  # before torch is imported, which takes seconds
signal.signal(signal.SIGTERM, leave)

from compute import choose_compute
from serving import Service

compute = choose_compute(Ranks(0, 0, 1), settings)
service = Service(data, tag, source, found, compute, weights, rows, max_waiting)
threading.Thread(target=server.serve_forever, daemon=True).start()
address = f"http://[{host}]" if ":" in host else f"http://{host}"
secret = f"#{quote(token)}" if token else ""
print(f"{address}:{server.server_port}/{secret}  (Ctrl-C ends it)", flush=True)
if not token and host not in ("127.0.0.1", "::1", "localhost"):
    talk.say("who reaches this machine can use it: --token=... asks for a token")
try:
    service.work()
finally:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    service.end()
    deadline = time.monotonic() + 1  # for the last words
    while threading.active_count() > 2 and time.monotonic() < deadline:
        time.sleep(0.01)
