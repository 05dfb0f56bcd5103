"""
Conversations as people have them, read into the one form that is rendered (tokenizer.messages_of),
and what they teach: the answers of the assistant that fit into a row. One is

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    {"instruction": "Add them.", "input": "1 and 2", "output": "3"}

as OpenAI (with system and tool messages), nanochat, ShareGPT and Alpaca write them. Several
messages of one side in a row are read as one, with a blank line between; other fields are not
looked at.
"""
import json
from collections import Counter

import tokenizer as tok

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "system": "system", "developer": "system", "tool": "tool", "function": "tool"}
# a call of one of these tools with one of these arguments alone is a call of the calculator
TOOLS = ("python", "calculator")
ARGUMENTS = ("code", "expression")

# -------------------------------------------------------------------------------------------------
# reading one: where that is not possible, the ValueError or TypeError says what was found and what
# is expected

def is_one(row):
    """Whether a list is of messages, not of conversations."""
    return not row or (isinstance(row[0], dict) and not {"role", "from"}.isdisjoint(row[0]))

def read(row):
    """A row of a file, as JSON has it -> messages, as tokenizer.messages_of takes them"""
    if isinstance(row, list):
        return from_messages(row)
    if not isinstance(row, dict):
        raise TypeError(f"found {shown(row)}, expected a conversation, as in --help")
    system = row.get("system") or ""
    for key in ("messages", "conversations"):
        if row.get(key) is not None:
            if not isinstance(row[key], list):
                raise TypeError(f"{key} is {shown(row[key])}, expected a list of messages")
            return from_messages(row[key], system)
    if row.get("instruction") is None or "output" not in row:
        raise ValueError(f"found the fields {', '.join(row)}, expected messages, conversations, or "
                         "instruction and output")
    if row.get("history"):
        raise ValueError("found a history, expected all turns as messages")
    for key in ("instruction", "input"):
        if not isinstance(row.get(key) or "", str):
            raise TypeError(f"{key} is {shown(row[key])}, expected text")
    asked = "\n\n".join(filter(None, [row["instruction"], row.get("input")]))
    return from_messages([{"role": "user", "content": asked},
                          {"role": "assistant", "content": row["output"]}], system)

def from_messages(found, system=""):
    """Messages, OpenAI's or ShareGPT's -> as tokenizer.messages_of takes them. All that the
    assistant says between two messages of the user, its calls and their outputs, is one message."""
    instructions = [text_of("system", system)]
    messages = []
    waiting = []  # (id, part for the output) of calls that no tool has answered yet
    for number, message in enumerate(found, 1):
        where = f"message {number}"
        if not isinstance(message, dict):
            raise TypeError(f"{where} is {shown(message)}, expected one with role and content")
        role = role_of(where, message)
        content = message.get("content")
        if content is None:
            content = message.get("value")
        if role == "system":
            if messages:
                raise ValueError(f"{where} is a system message, expected before all others")
            instructions.append(text_of(where, content))
        elif role == "tool":
            output_part(where, message, waiting)["text"] = text_of(where, content)
        else:
            calls = calls_of(where, message) if role == "assistant" else []
            parts = parts_of(where, role, content) if content or not calls else []
            for key, code in calls:
                output = {"type": "python_output", "text": None}
                parts += [{"type": "python", "text": code}, output]
                waiting.append((key, output))
            add(messages, role, parts)
    if not messages or messages[0]["role"] != "user":
        raise ValueError("the user does not speak first, expected user and assistant in turns")
    for message in messages:
        message["content"] = [part for part in message["content"] if part["text"] is not None]
    instructions = "\n\n".join(filter(None, instructions))
    if instructions:
        messages.insert(0, {"role": "system", "content": instructions})
    return messages

def role_of(where, message):
    """user, assistant, system or tool"""
    by = message.get("role") or message.get("from")
    role = ROLES.get(str(by))
    if role is None:
        raise ValueError(f"{where} has the role {shown(by)}, expected {', '.join(ROLES)}")
    return role

def text_of(where, content):
    """The text of a system message or of a tool's answer; its parts are joined by blank lines."""
    if isinstance(content, str):
        return content
    return "\n\n".join(part["text"] for part in parts_of(where, "user", content))

def parts_of(where, role, content):
    """What a message of the user or the assistant says -> list of parts, as tokenizer.messages_of
    takes them"""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise TypeError(f"{where} has the content {shown(content)}, expected text")
    parts = []
    for part in content:
        sound = isinstance(part, dict) and part.get("type") in tok.KINDS[role]
        if not sound or not isinstance(part.get("text"), str):
            raise ValueError(f"{where} has the part {shown(part)}, expected "
                             '{"type": "text", "text": "..."}')
        parts.append({"type": part["type"], "text": part["text"]})
    return parts

def calls_of(where, message):
    """The calls of tools in a message of OpenAI's assistant -> [(id or None, code)]"""
    found = list(message.get("tool_calls") or [])
    if message.get("function_call"):
        found.append({"function": message["function_call"]})
    calls = []
    for call in found:
        try:
            function, key = call["function"], call.get("id")
            arguments = function["arguments"]
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
            (name, code), = arguments.items()
            sound = function["name"] in TOOLS and name in ARGUMENTS and isinstance(code, str)
        except (ValueError, LookupError, TypeError, AttributeError):
            sound = False
        if not sound:
            raise ValueError(f"{where} has the tool call {shown(call)}, expected "
                             f"{' or '.join(TOOLS)} with {' or '.join(ARGUMENTS)} alone")
        calls.append((key, code))
    return calls

def output_part(where, message, waiting):
    """Takes the call that a tool's message answers out of those that wait -> its output"""
    key = message.get("tool_call_id")
    for i, (call, output) in enumerate(waiting):
        if key is None or call is None or call == key:
            del waiting[i]
            return output
    raise ValueError(f"{where} is a tool's answer, expected a call of the assistant's before it")

def add(messages, role, parts):
    """Adds what a side says to the messages, or to the last one if that is of the same side."""
    if not messages or messages[-1]["role"] != role:
        messages.append({"role": role, "content": parts})
        return
    before = messages[-1]["content"]
    if before and parts and before[-1]["type"] == parts[0]["type"] == "text":
        texts = [before.pop()["text"], parts[0]["text"]]
        parts = [{"type": "text", "text": "\n\n".join(filter(None, texts))}, *parts[1:]]
    before += parts

def shown(value):
    """What was found, as JSON, shortened"""
    text = json.dumps(value, default=str)
    return text if len(text) <= 160 else f"{text[:157]}..."

# -------------------------------------------------------------------------------------------------
# what they teach

NO_ANSWER = "without an answer of the assistant"
EMPTY = "with empty answers only"
BEHIND = "with all answers behind the cut"
NO_TOKEN = "without a token to train on"  # where an earlier version has not told why

def render(item, tokenizer, longest, counts):
    """
    A conversation as tokens, cut to `longest`, with <|bos|> -> (ids, mask), or None where it
    teaches nothing. tokenizer=None: there is none yet, it is only counted.
    counts: {task or file: Counter}, to which is added "conversations", "cut" (longer than a row),
    "lost" (answers of which nothing is left), "cut short" (answers whose end is lost), and those
    that teach nothing by reason
    """
    count = counts.setdefault(item.get("task", ""), Counter())
    count["conversations"] += 1
    answers = [parts for role, parts in tok.messages_of(item) if role == "assistant"]
    spoken = [text for parts in answers for kind, text in parts if kind != "python_output"]
    if not "".join(spoken).strip():
        count[EMPTY if answers else NO_ANSWER] += 1
        return None
    if tokenizer is None:
        return None
    ids, mask = tokenizer.render_conversation(item)
    if len(ids) <= longest:
        return ids, mask
    kept, mask = ids[:longest], mask[:longest]
    begun = kept[:-1].count(tokenizer.special("<|assistant_start|>"))
    ended = kept.count(tokenizer.special("<|assistant_end|>"))
    count["cut"] += 1
    count["lost"] += len(answers) - begun
    count["cut short"] += begun - ended
    special = {*tokenizer.special_tokens.values()}
    if not any(own and token not in special for token, own in zip(kept, mask)):
        count[BEHIND] += 1
        return None
    return kept, mask

def nothing(count):
    """{reason: how many of the conversations counted (see render) teach nothing}"""
    return {why: count[why] for why in (NO_ANSWER, EMPTY, BEHIND, NO_TOKEN) if count.get(why)}

def in_words(count, length=None):
    """example: "40 conversations; 3 longer than a row of 256 tokens and cut (2 answers lost, 1 cut
    short); 5 teach nothing: 4 without an answer of the assistant, 1 with empty answers only" """
    count = Counter(count)
    said = [f"{count['conversations']:,} conversations"]
    if count["cut"]:
        said.append(f"{count['cut']:,} longer than a row of {length:,} tokens and cut")
    if "lost" in count or "cut short" in count:
        said[-1] += f" ({count['lost']:,} answers lost, {count['cut short']:,} cut short)"
    if reasons := nothing(count):
        by_reason = ", ".join(f"{n:,} {why}" for why, n in reasons.items())
        said.append(f"{sum(reasons.values()):,} teach nothing: {by_reason}")
    return "; ".join(said)

def total(counts):
    """{task or file: Counter or dict} -> one Counter"""
    return sum(map(Counter, counts.values()), Counter())

def teaches(count):
    """Whether any of these conversations does."""
    return count.get("conversations", 0) > sum(nothing(count).values())
