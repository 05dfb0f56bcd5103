"""
OpenAI's chat completions as chat_web.py understands them: a request's JSON checked and read, an
answer's JSON made. https://platform.openai.com/docs/api-reference/chat

Ours beyond it: `top_k` in a request; `parts` beside `content`, in which the calculator's calls and
answers stand too, as a list of {"type": "text" | "python" | "python_output", "text": ...}. An
assistant's message may be sent back with such a list as its content.
"""
import json
from dataclasses import dataclass
from functools import partial

import talk
import tokenizer as tok

class Refused(Exception):
    """What is answered with an error: its HTTP status, and OpenAI's fields for it."""
    def __init__(self, message, status=400, param=None, code=None):
        super().__init__(message)
        self.status = status
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.error = {"message": message, "type": kind, "param": param, "code": code}

def check(condition, message, **more):
    if not condition:
        raise Refused(message, **more)

@dataclass
class Request:
    model: str
    messages: list   # as tokenizer.messages_of takes them
    most: int        # tokens of the answer at most; None: not said
    temperature: float
    top_k: int
    seed: int        # None: not said
    stops: list      # texts before which the answer ends
    stream: bool
    usage: bool      # whether a stream ends with how many tokens there were

# what would change the answer in a way that is not built -> the value that changes nothing
PLAIN = {"n": 1, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False,
         "top_logprobs": 0, "logit_bias": {}, "tools": [], "functions": [], "audio": {},
         "tool_choice": "none", "function_call": "none", "response_format": {"type": "text"},
         "modalities": ["text"], "prediction": {}}

UNDERSTOOD = ("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_k",
              "seed", "stop", "stream", "stream_options")
# what changes nothing in the answer
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
           "parallel_tool_calls")

def read_request(body, temperature, top_k):
    """body: bytes of JSON; temperature, top_k: where it says nothing -> Request. Refused where it
    is not one, or asks for what is not built."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise Refused(f"the body is no JSON: {e}") from None
    check(isinstance(asked, dict), "the body is no JSON object")

    def number(name, usual, least, most, whole=False):
        value = asked.get(name)
        if value is None:
            return usual
        kinds = int if whole else (int, float)
        fits = isinstance(value, kinds) and not isinstance(value, bool)
        kind = "whole number" if whole else "number"
        check(fits and least <= value <= most, f"{name} has to be a {kind} from {least} to {most}",
              param=name)
        return value

    for name in asked:
        check(name in UNDERSTOOD or name in PLAIN or name in IGNORED, f"{name[:100]} is not known",
              param=name[:100], code="unknown_parameter")
    for name, plain in PLAIN.items():
        value = asked.get(name)
        same = value == plain and isinstance(value, bool) == isinstance(plain, bool)
        check(value is None or same, f"{name} other than {json.dumps(plain)} is not supported",
              param=name, code="unsupported_parameter")
    model = asked.get("model")
    check(isinstance(model, str), "model has to be a text: GET /v1/models lists them",
          param="model")
    stream = asked.get("stream") or False
    check(isinstance(stream, bool), "stream has to be true or false", param="stream")
    options = asked.get("stream_options") or {}
    check(isinstance(options, dict), "stream_options has to be an object", param="stream_options")
    most = number("max_tokens", None, 1, 10 ** 9, whole=True)
    return Request(
        model=model, messages=read_messages(asked.get("messages")),
        most=number("max_completion_tokens", most, 1, 10 ** 9, whole=True),
        temperature=number("temperature", temperature, 0, 2),
        top_k=number("top_k", top_k, 0, 2 ** 20, whole=True),
        seed=number("seed", None, -2 ** 63, 2 ** 63 - 1, whole=True),
        stops=read_stops(asked.get("stop")), stream=stream,
        usage=options.get("include_usage") is True)

def read_messages(messages):
    """A request's messages -> the same as tokenizer.messages_of takes them."""
    check_it = partial(check, param="messages")
    check_it(isinstance(messages, list) and messages, "messages has to be a list of messages")
    read = []
    for i, message in enumerate(messages):
        check_it(isinstance(message, dict), f"messages[{i}] is no object")
        role, content = message.get("role"), message.get("content")
        role = "system" if role == "developer" else role
        check_it(role in ("system", "user", "assistant"), f"messages[{i}].role has to be system, "
                 "developer, user or assistant")
        check_it(role != "system" or i == 0, f"messages[{i}]: a system message comes first")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        check_it(isinstance(parts, list) and all(map(is_part, parts)),
                 f"messages[{i}].content has to be a text, or a list of parts with type and text")
        if role != "assistant":
            check_it(all(part["type"] == "text" for part in parts), f"messages[{i}].content has "
                     "parts that are no text")
            parts = "".join(part["text"] for part in parts)
        read.append({"role": role, "content": parts})
    check_it(read[-1]["role"] == "user", "the last message has to be the user's")
    return read

def is_part(part):
    return (isinstance(part, dict) and part.get("type") in tok.KINDS["assistant"]
            and isinstance(part.get("text"), str))

def read_stops(stop):
    stops = [stop] if isinstance(stop, str) else stop or []
    fits = isinstance(stops, list) and len(stops) <= 4
    fits = fits and all(isinstance(text, str) and 0 < len(text) <= 1000 for text in stops)
    check(fits, "stop has to be a text or a list of up to four texts of 1 to 1,000 characters",
          param="stop")
    return stops

class Cut:
    """Lets a text through, piece by piece, up to that of some texts which is complete first; what
    may become one is held back."""
    def __init__(self, stops):
        self.stops = stops
        self.held = ""
        self.met = False

    def add(self, text, last=False):
        """-> what may be shown. last: nothing follows"""
        text, self.held = self.held + text, ""
        places = [(text.find(stop) + len(stop), text.find(stop)) for stop in self.stops
                  if stop in text]
        if places:
            self.met = True
            return text[:min(places)[1]]
        if last:
            return text
        # how many of the last characters may begin a stop
        begun = max((n for stop in self.stops for n in range(1, min(len(stop), len(text) + 1))
                     if text.endswith(stop[:n])), default=0)
        shown = len(text) - begun
        self.held = text[shown:]
        return text[:shown]

class Telling:
    """The tokens of one answer, some at a time, as the parts that a client is told."""
    def __init__(self, tokenizer, stops):
        self.speech = talk.Speech(tokenizer)
        self.cut = Cut(stops)
        self.tokens = 0  # up to the stop, if one was met
        self.ended = ""  # "stop" or "length" when nothing is left to say

    def add(self, tokens, ended):
        """ended: "stop" or "length" where no more tokens come, else "" -> [(kind, text)]"""
        told = []
        for token in tokens:
            self.tokens += 1
            told += self.hear(*self.speech.add(token))
            if self.cut.met:
                break
        if ended and not self.cut.met:
            told += self.hear(*self.speech.end())
            told.append(("text", self.cut.add("", last=True)))
        self.ended = "stop" if self.cut.met else ended
        return talk.joined(told)

    def hear(self, kind, text):
        if kind == "text":
            return [(kind, self.cut.add(text))]
        # a stop does not reach across a call
        return [("text", self.cut.add("", last=True)), (kind, text)] if text else []

def content_of(parts):
    """-> OpenAI's content and our parts, of a message or of what comes next of one"""
    return {"content": "".join(text for kind, text in parts if kind == "text"),
            "parts": [{"type": kind, "text": text} for kind, text in parts]}

def usage_of(read, made):
    """Tokens of the prompt, and of the answer."""
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
