"""
The tokenizer: byte-level BPE kept as plain data (ranks.txt and tokenizer.json, no pickle), run by
tiktoken; and how a conversation becomes tokens.

    from tokenizer import load_tokenizer
    tok = load_tokenizer("toy")
    tok.decode(tok.encode("Hello, world"))  # -> "Hello, world"

Text is text: a special token's name inside a string is encoded as ordinary characters. Special
tokens get into a sequence only by id, through .bos, .special(name) and the render functions, so
nobody can type one into a conversation. A Python string may hold surrogates, which UTF-8 cannot: a
pair becomes the character it stands for, a lone one U+FFFD.
"""
import base64
import contextlib
import functools
import hashlib
import json
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import tiktoken

import common
import pipeline

# How text is cut before merging, in the style of GPT-4's. x++ and x*+ never backtrack.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)"             # contractions
    r"|[^\r\n\p{L}\p{N}]?+[\p{L}]++"    # words with what stands before them
    r"|[\p{N}]{1,2}+"                    # numbers: two digits at most, which saves vocabulary
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+"     # punctuation
    r"|\s*[\r\n]|\s+(?!\S)|\s+"         # white space
)

def pattern_of(digits):
    """PATTERN with so many digits of a number in one piece, 2 or 1."""
    return PATTERN if digits == 2 else PATTERN.replace(r"[\p{N}]{1,2}+", r"[\p{N}]")

SPECIAL_TOKENS = [
    "<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>",
]

# tiktoken's regular expressions run out of stack on a million characters of white space
LONG_BLANK = re.compile(r"\s{10000}")

class Tokenizer:
    """A byte-level BPE. ranks: {token bytes: id 0..n-1}; pattern: how text is cut before merging;
    special_tokens: {name: id n..}, SPECIAL_TOKENS by default. Where these make no tokenizer:
    ValueError or TypeError"""

    def __init__(self, ranks, pattern=PATTERN, special_tokens=None):
        if not special_tokens:
            special_tokens = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        ids = [*ranks.values(), *special_tokens.values()]
        if sorted(ids) != list(range(len(ids))):
            raise ValueError("its ids are not 0, 1, 2, ...")
        if not special_tokens.keys() >= set(SPECIAL_TOKENS):
            raise ValueError("not all special tokens are there")
        self.ranks = ranks
        self.pattern = pattern
        self.special_tokens = special_tokens
        self.encoding = tiktoken.Encoding("nanochat", pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=special_tokens)
        self.vocab_size = len(ids)
        self.bos = special_tokens["<|bos|>"]

    @functools.cached_property
    def longest(self):
        """bytes of the longest token"""
        return max(map(len, self.ranks))

    @functools.cached_property
    def fingerprint(self):
        """sha256 (hex) of everything that decides what a text is encoded to"""
        rest = json.dumps([self.pattern, sorted(self.special_tokens.items())])
        return hashlib.sha256(ranks_text(self.ranks) + rest.encode()).hexdigest()

    def special(self, name):
        return self.special_tokens[name]

    def encode(self, text):
        """str -> list of ids, none of them special"""
        ends = [blank.end() for blank in LONG_BLANK.finditer(text)]
        ids = []
        for start, end in pairwise([0, *ends, len(text)]):
            ids += self.encoding.encode_ordinary(text[start:end])
        return ids

    def encode_batch(self, texts, threads=2):
        """list of str -> list of lists of ids; tiktoken lets go of Python's lock: threads help"""
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode_bytes(self, ids):
        """ids -> bytes; a special token gives its name. An id outside the vocabulary: KeyError"""
        return self.encoding.decode_bytes(ids)

    def decode(self, ids):
        """ids -> str; bytes that are not UTF-8 (a character cut in half) become U+FFFD"""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self):
        """int32 [vocab_size]: how many bytes of text each token stands for, 0 for special tokens
        (for bits per byte)"""
        import numpy as np  # only here: a tenth of a second, which --help can do without
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        lengths[list(self.ranks.values())] = [len(token) for token in self.ranks]
        return lengths

    def render_conversation(self, conversation):
        """A conversation (see `messages_of`) as (ids, mask), lists of equal length. mask is 1 on
        what the assistant has to produce: its text, its python calls with both their markers, its
        end; 0 on the rest: bos, what the user says, the assistant's start marker, what a tool
        answered."""
        ids = [self.bos]
        mask = [0]
        for role, parts in messages_of(conversation):
            assistant = role == "assistant"
            ids.append(self.special(f"<|{role}_start|>"))
            mask.append(0)
            for kind, text in parts:
                tokens = self.encode(text)
                if kind != "text":
                    marker = kind.removeprefix("python_")  # python or output
                    tokens.insert(0, self.special(f"<|{marker}_start|>"))
                    tokens.append(self.special(f"<|{marker}_end|>"))
                ids += tokens
                mask += [int(assistant and kind != "python_output")] * len(tokens)
            ids.append(self.special(f"<|{role}_end|>"))
            mask.append(int(assistant))
        return ids, mask

    def render_for_completion(self, conversation):
        """ids up to and with the start marker where the assistant has to speak; its own last
        message is left out"""
        messages = conversation["messages"]
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        ids, _ = self.render_conversation({"messages": messages})
        return ids + [self.special("<|assistant_start|>")]

# what a message of each role may consist of
KINDS = {"user": ["text"], "assistant": ["text", "python", "python_output"]}

def messages_of(conversation):
    """{"messages": [{"role": "system"|"user"|"assistant", "content": text or list of parts}]}
    -> [(role, [(kind, text)])]. A part is {"type": one of KINDS[role], "text": str}. A system
    message comes first and is put in front of the user's. Anything else is an error.
    example: user "Hi", assistant "Hello" ->
    [("user", [("text", "Hi")]), ("assistant", [("text", "Hello")])]"""
    messages = []
    system = ""
    for i, message in enumerate(conversation["messages"]):
        role, content = message["role"], message["content"]
        if i == 0 and role == "system":
            system = content + "\n\n"
            continue
        if role != ("user", "assistant")[len(messages) % 2]:
            raise ValueError(f"message {i} of a conversation is by {role!r}; user and assistant "
                             "must take turns")
        if isinstance(content, str) or content == []:
            content = [{"type": "text", "text": content or ""}]
        kinds = KINDS[role]
        if not isinstance(content, list) or any(part["type"] not in kinds for part in content):
            raise ValueError(f"message {i} of a conversation, by {role}, is neither text nor a "
                             f"list of parts {', '.join(kinds)}")
        parts = []
        for part in content:
            parts.append((part["type"], system + part["text"]))  # a TypeError where it is no text
            system = ""
        messages.append((role, parts))
    if not messages:
        raise ValueError("a conversation without a user's message")
    return messages

# --------------------------------------------------------------------------------------------------
# files: ranks.txt (tiktoken's own format) and tokenizer.json, written last, which vouches for it

def ranks_text(ranks):
    """{b"a": 97, ...} -> b"YQ== 97" and so on, a line a token in the order of the ranks"""
    tokens = sorted(ranks, key=ranks.get)
    return b"".join(base64.b64encode(token) + b" %d\n" % ranks[token] for token in tokens)

def save_tokenizer(directory, ranks, pattern=PATTERN, special_tokens=None):
    """Writes ranks {token bytes: id} and settings into `directory`; returns the Tokenizer."""
    tokenizer = Tokenizer(ranks, pattern, special_tokens)
    text = ranks_text(ranks)
    common.atomic_write(directory / "ranks.txt", text)
    settings = {
        "vocab_size": tokenizer.vocab_size,
        "pattern": pattern,
        "special_tokens": tokenizer.special_tokens,
        "ranks_sha256": hashlib.sha256(text).hexdigest(),
    }
    common.atomic_write(directory / "tokenizer.json", json.dumps(settings, indent=1) + "\n")
    return tokenizer

DAMAGE = (OSError, ValueError, KeyError, TypeError)  # what a missing or broken file raises

def read_tokenizer(directory):
    """The Tokenizer in `directory`; one of DAMAGE where it is missing or broken"""
    settings = json.loads(common.content_of(directory / "tokenizer.json"))
    text = common.content_of(directory / "ranks.txt")
    if hashlib.sha256(text).hexdigest() != settings["ranks_sha256"]:
        raise ValueError("ranks.txt is not the one that tokenizer.json was written for")
    lines = [line.split() for line in text.splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    found = Tokenizer(ranks, settings["pattern"], dict(settings["special_tokens"]))
    trained = common.read_json(directory / "phase.json").get("fingerprint")
    if trained not in (None, found.fingerprint):
        raise ValueError("it is not the one that was trained, whose fingerprint is in phase.json")
    return found

def damage(directory):
    """None if a whole tokenizer is in `directory`, else what is wrong with it."""
    try:
        read_tokenizer(directory)
    except FileNotFoundError as e:
        return f"{e.filename} is missing"
    except json.JSONDecodeError:
        return "tokenizer.json is not JSON"
    except KeyError as e:
        return f"tokenizer.json has no field {e}"
    except DAMAGE as e:
        return str(e)
    return None

def load_tokenizer(data):
    """The Tokenizer of a data set. Failure (code 2) with the command to run where it is missing or
    damaged."""
    directory = pipeline.tokenizer_dir(data)
    with contextlib.suppress(*DAMAGE):
        return read_tokenizer(directory)
    words = pipeline.command_of("tok", data)
    if (directory / "tokenizer.pkl").exists():
        words = ["python", "adopt.py", f"--data={data}"]
    message = f"there is no tokenizer in {directory}"
    if any((directory / name).exists() for name in ("ranks.txt", "tokenizer.json")):
        message = f"the tokenizer in {directory} is damaged ({damage(directory)})"
    common.fail(message, next_command=shlex.join(words))
