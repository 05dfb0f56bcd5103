"""
The tokenizer: byte-level BPE kept as plain data (ranks.txt and tokenizer.json, no pickle), run by tiktoken; and how a
conversation becomes tokens.

    from tokenizer import load_tokenizer
    tok = load_tokenizer(common.tokenizer_dir("toy"))
    tok.decode(tok.encode("Hello, world"))  # -> "Hello, world"

Text is text: a special token's name inside a string is encoded as ordinary characters. Special tokens get into a
sequence only by id, through .bos, .special(name) and the render functions, so nobody can type one into a conversation.
A Python string may hold surrogates, which UTF-8 cannot: a pair becomes the character it stands for, a lone one U+FFFD.
"""
import base64
import functools
import hashlib
import io
import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken

import common

# In the style of GPT-4's: contractions, words with what stands before them, numbers (two digits at most, which
# saves vocabulary), punctuation, white space. x++ and x*+ never backtrack.
PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+[\p{L}]++|[\p{N}]{1,2}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]|\s+(?!\S)|\s+"

SPECIAL_TOKENS = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
                  "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"]

LONGEST_RUN = 10_000  # characters of white space; tiktoken's regular expressions run out of stack on a million
BLANK_RUN = re.compile(r"\s{%d}" % LONGEST_RUN)

class Tokenizer:
    """A byte-level BPE. in: ranks {token bytes: id 0..n-1}, split pattern, special tokens {name: id n..}"""

    def __init__(self, ranks, pattern=PATTERN, special_tokens=None):
        specials = special_tokens or {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        if wrong := what_is_wrong(ranks, pattern, specials):
            raise ValueError(wrong)
        self.ranks, self.pattern, self.special_tokens = ranks, pattern, specials
        self.encoding = tiktoken.Encoding("nanochat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
        self.vocab_size = len(ranks) + len(specials)
        self.bos = specials["<|bos|>"]

    @functools.cached_property
    def fingerprint(self):
        """sha256 (hex) of everything that decides what a text is encoded to"""
        rest = json.dumps([self.pattern, sorted(self.special_tokens.items())])
        return hashlib.sha256(ranks_text(self.ranks) + rest.encode()).hexdigest()

    def special(self, name):
        return self.special_tokens[name]

    def encode(self, text):
        """str -> list of ids, none of them special"""
        cuts = [0, *(run.end() for run in BLANK_RUN.finditer(text)), len(text)]
        return [i for a, b in zip(cuts, cuts[1:]) for i in self.encoding.encode_ordinary(text[a:b])]

    def encode_batch(self, texts, threads=2):
        """list of str -> list of lists of ids; tiktoken lets go of Python's lock, so threads help"""
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode_bytes(self, ids):
        """ids -> bytes; a special token gives its name. An id outside the vocabulary is a KeyError."""
        return self.encoding.decode_bytes(ids)

    def decode(self, ids):
        """ids -> str; bytes that are not UTF-8 (a character cut in half) become U+FFFD"""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self):
        """int32 [vocab_size]: how many bytes of text each token stands for, 0 for special tokens (for bits per byte)"""
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        lengths[list(self.ranks.values())] = [len(token) for token in self.ranks]
        return lengths

    def render_conversation(self, conversation, max_tokens=None):
        """A conversation (see `messages_of`) as (ids, mask), lists of equal length, cut to max_tokens if that is given.
        mask is 1 on what the assistant has to produce: its text, its python calls with both their markers, its end;
        0 on the rest: bos, what the user says, the assistant's start marker, what a tool answered."""
        ids, mask = [self.bos], [0]
        def add(tokens, produced):
            ids.extend(tokens)
            mask.extend([produced] * len(tokens))
        for role, parts in messages_of(conversation):
            assistant = int(role == "assistant")
            add([self.special(f"<|{role}_start|>")], 0)
            for kind, text in parts:
                tokens = self.encode(text)
                if kind != "text":
                    marker = "python" if kind == "python" else "output"
                    tokens = [self.special(f"<|{marker}_start|>"), *tokens, self.special(f"<|{marker}_end|>")]
                add(tokens, 0 if kind == "python_output" else assistant)
            add([self.special(f"<|{role}_end|>")], assistant)
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation):
        """ids up to and with the start marker where the assistant has to speak; its own last message is left out"""
        messages = conversation["messages"]
        asked = messages[:-1] if messages and messages[-1].get("role") == "assistant" else messages
        return self.render_conversation({"messages": asked})[0] + [self.special("<|assistant_start|>")]

def without_surrogates(text):
    """The text as tiktoken takes it: a pair of surrogates -> its character, a lone one -> U+FFFD"""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

def messages_of(conversation):
    """{"messages": [{"role": "system"|"user"|"assistant", "content": text or list of parts}]} -> [(role, [(kind, text)])].
    A part is {"type": "text"|"python"|"python_output", "text": str}, the last two for the assistant alone. A system
    message comes first and is put in front of the user's. Anything else is an error (ValueError that says what).
    example: user "Hi", assistant "Hello" -> [("user", [("text", "Hi")]), ("assistant", [("text", "Hello")])]"""
    messages, system = [], ""
    for i, message in enumerate(conversation["messages"]):
        role, content = message.get("role"), message.get("content")
        if i == 0 and role == "system" and isinstance(content, str):
            system = content + "\n\n"
            continue
        if role != ("user", "assistant")[len(messages) % 2]:
            raise ValueError(f"message {i} of a conversation is by {role!r}; user and assistant must take turns")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        allowed = ("text",) if role == "user" else ("text", "python", "python_output")
        if not (isinstance(parts, list) and all(isinstance(p, dict) and p.get("type") in allowed and isinstance(p.get("text"), str) for p in parts)):
            raise ValueError(f"message {i} of a conversation, by {role}, is neither text nor a list of parts {', '.join(allowed)}: {str(content)[:80]!r}")
        parts = [(p["type"], p["text"]) for p in parts]
        messages.append((role, [("text", system + parts[0][1]), *parts[1:]] if system and parts else parts))
        system = ""
    if not messages:
        raise ValueError("a conversation without a user's message")
    return messages

# --------------------------------------------------------------------------------------------------
# files: ranks.txt (tiktoken's own format) and tokenizer.json, which is written last and vouches for it

def what_is_wrong(ranks, pattern, specials):
    """None if these make a tokenizer, else why not."""
    if not (isinstance(pattern, str) and isinstance(ranks, dict) and isinstance(specials, dict)
            and all(type(t) is bytes and t and type(i) is int for t, i in ranks.items())
            and all(type(t) is str and type(i) is int for t, i in specials.items())):
        return "it is not made of a pattern, ranks of bytes and named special tokens"
    if any(bytes([b]) not in ranks for b in range(256)):
        return "not all of the 256 single bytes are there"
    if sorted([*ranks.values(), *specials.values()]) != list(range(len(ranks) + len(specials))):
        return "its ids are not 0, 1, 2, ... without a gap"
    missing = [name for name in SPECIAL_TOKENS if name not in specials]
    return f"special tokens are missing: {' '.join(missing)}" if missing else None

def ranks_text(ranks):
    """{b"a": 97, ...} -> b"YQ== 97" and so on, a line a token in the order of the ranks"""
    return b"".join(base64.b64encode(t) + b" %d\n" % i for t, i in sorted(ranks.items(), key=lambda item: item[1]))

def command_for(directory):
    """The command that trains the tokenizer of this directory."""
    known = [data for data in ("toy", *common.SHARED_DATA[:1]) if common.tokenizer_dir(data) == Path(directory)]
    return f"python tok_train.py --data={known[0] if known else 'NAME_OR_FOLDER'}"

def save_tokenizer(directory, ranks, pattern=PATTERN, special_tokens=None):
    """Writes ranks {token bytes: id} and settings into `directory`; returns the Tokenizer."""
    tokenizer = Tokenizer(ranks, pattern, special_tokens)
    text = ranks_text(ranks)
    common.atomic_write(Path(directory) / "ranks.txt", text)
    common.atomic_write(Path(directory) / "tokenizer.json", json.dumps({
        "vocab_size": tokenizer.vocab_size, "pattern": pattern, "special_tokens": tokenizer.special_tokens,
        "ranks_sha256": hashlib.sha256(text).hexdigest()}, indent=1) + "\n")
    return tokenizer

def load_tokenizer(directory):
    """The Tokenizer in `directory` (common.tokenizer_dir(data)). Missing or damaged: exit 2 with the command to run."""
    directory = Path(directory)
    if not (directory / "tokenizer.json").exists():
        if (directory / "tokenizer.pkl").exists():
            return convert_nanochat_tokenizer(directory)
        common.fail(f"there is no tokenizer in {directory}", next_command=command_for(directory))
    try:
        return read_tokenizer(directory)  # raises what is wrong
    except (OSError, ValueError, KeyError, TypeError) as e:
        common.fail(f"the tokenizer in {directory} is damaged: {e}", next_command=command_for(directory))

def read_tokenizer(directory):
    settings = json.loads((Path(directory) / "tokenizer.json").read_text(encoding="utf-8"))
    text = (Path(directory) / "ranks.txt").read_bytes()
    if hashlib.sha256(text).hexdigest() != settings["ranks_sha256"]:
        raise ValueError("ranks.txt is not the one that tokenizer.json was written for")
    ranks = {base64.b64decode(token): int(i) for token, i in (line.split() for line in text.splitlines())}
    return Tokenizer(ranks, settings["pattern"], settings["special_tokens"])

class PickledEncoding:
    """What a tiktoken.Encoding in a pickle turns into here: an empty thing that takes the fields and runs nothing."""
class OnlyAnEncoding(pickle.Unpickler):
    """Loads one pickled tiktoken.Encoding. A pickle may name any function and call it; this one, nothing else."""
    def find_class(self, module, name):
        if (module, name) == ("tiktoken.core", "Encoding"):
            return PickledEncoding
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no tokenizer needs; nothing of it was run")

def convert_nanochat_tokenizer(directory):
    """The Tokenizer in nanochat's tokenizer.pkl, read without trust and kept as plain data beside it. Bad: exit 2."""
    path = Path(directory) / "tokenizer.pkl"
    try:
        fields = vars(OnlyAnEncoding(io.BytesIO(path.read_bytes())).load())
        parts = [fields[name] for name in ("mergeable_ranks", "pat_str", "special_tokens")]
        tokenizer = Tokenizer(*parts)
    except Exception as e:  # a broken pickle can raise nearly anything
        common.fail(f"{path} is not a tokenizer that can be used: {e}", next_command=command_for(directory))
    try:
        save_tokenizer(directory, *parts)
        common.print0(f"kept {path} as plain data: ranks.txt, tokenizer.json")
    except OSError as e:
        common.print0(f"could not keep {path} as plain data ({e}); using it as it is")
    return tokenizer
