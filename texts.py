"""
What stands in a user's files of texts: their encodings, their lines or rows, what happens to those
that cannot be read, and what a document is. Which files are read: corpus.py. A line of a .jsonl
file, and a row of a .parquet file, has a field `text`; .txt is text as it is. All but .parquet is
UTF-8, or UTF-16 or UTF-32 with a byte order mark.
"""
import codecs
import gzip
import json
import os
import re
import shlex
import statistics
import unicodedata
import zlib
from collections import Counter
from itertools import chain, islice

import common

HOLD_OUT = 20  # of a file that is split every 20th document is held out
DOCUMENT = 10_000  # characters to which the paragraphs or lines of a .txt file are gathered
NAMED = 5  # so many broken lines of a file are named one by one
LARGE = 500_000_000  # bytes of a file that text_problem does not read to its end
LOOKED_AT = 10_000_000  # characters of a file of which facts_of tells

def prepare_command(data):
    return shlex.join(["python", "prepare_data.py", f"--data={data}"])

def stamp(path):
    """[bytes, time of writing in ns] of a file: what tells that it has changed"""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]

# -------------------------------------------------------------------------------------------------
# rows

def parquet_problem(path):
    """None, or why the parquet file cannot be read: its footer has to name a column `text`."""
    import pyarrow.parquet
    try:
        schema = pyarrow.parquet.ParquetFile(path).schema_arrow
        names = schema.names
    except (pyarrow.ArrowException, OSError, ValueError) as e:
        return f"{path} is no readable parquet file: {e}"
    if "text" not in names:
        return f"{path} has no column `text` (it has {', '.join(names)})"
    kind = str(schema.field("text").type)
    if "string" not in kind:
        return f"{path}: its column `text` is no text but {kind}"
    return None

def read_rows(path, columns=None):
    """(number, row) for each row of a .parquet file (a dict with these columns, or all) or of a
    .jsonl or .jsonl.gz file (see read_lines). ValueError where the file is damaged."""
    if path.suffix != ".parquet":
        yield from read_lines(path)
        return
    import pyarrow.parquet
    number = group = 0
    try:
        parquet = pyarrow.parquet.ParquetFile(path)
        for group in range(parquet.num_row_groups):
            rows = rows_of(parquet.read_row_group(group, columns))
            yield from enumerate(rows, number + 1)
            number += len(rows)
    except (pyarrow.ArrowException, OSError, ValueError) as e:
        raise ValueError(f"{path} is damaged in row group {group}: {e}") from e

def rows_of(table):
    """The rows of a table as dicts; where a text is not UTF-8 all come as bytes."""
    import pyarrow
    try:
        return table.to_pylist()
    except UnicodeDecodeError:
        fields = [field.with_type(pyarrow.large_binary()) if "string" in str(field.type) else field
                  for field in table.schema]
        return table.cast(pyarrow.schema(fields)).to_pylist()

def read_lines(path):
    """The lines of a file that are not blank, as all_lines has them."""
    return ((number, line) for number, line in all_lines(path) if line.strip())

# byte order marks; that of UTF-32 begins with that of UTF-16
MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
         codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}

def opener(path):
    return gzip.open if path.suffix == ".gz" else open

def encoding_of(path):
    """Of a text file, by its byte order mark."""
    with opener(path)(path, "rb") as f:
        start = f.read(4)
    return next((name for mark, name in MARKS.items() if start.startswith(mark)), "UTF-8")

# what does not decode as UTF-16 or UTF-32 comes out of encode() as a byte that is no UTF-8
codecs.register_error("as a broken byte", lambda error: ("\udc80", error.end))

def all_lines(path, newline="\n"):
    """The lines of a text file, or .gz file, as (number, bytes of UTF-8): those of UTF-16 and
    UTF-32 are encoded anew, those that do not decode are no UTF-8. A byte order mark is left out.
    newline: None also ends a line at "\\r" and "\\r\\n", which then become "\\n".
    ValueError where the file is damaged."""
    number = 0
    try:
        encoding = encoding_of(path)
        errors = "as a broken byte"
        if encoding == "UTF-8":
            # surrogateescape: what cannot be decoded comes out of encode() as it was
            encoding, errors = "utf-8-sig", "surrogateescape"
        with opener(path)(path, "rt", encoding=encoding, errors=errors, newline=newline) as f:
            for number, line in enumerate(f, 1):
                yield number, line.encode(errors="surrogateescape")
    except (OSError, EOFError, UnicodeError, zlib.error) as e:
        raise ValueError(f"{path} is damaged behind line {number}: {e}") from e

def good_rows(path, rows, convert, say=common.print0):
    """
    convert(row) for each (number, row) of `rows`. What convert refuses is skipped, the first NAMED
    with a message. Failure where that is more than 1 % (and more than 5, or in another encoding
    more than half), or the file is damaged.
    """
    name = common.one_line(path)
    kind = "row" if path.suffix == ".parquet" else "line"
    broken = 0
    total = 0
    first = ""
    undecoded = False
    try:
        for number, row in rows:
            total += 1
            try:
                value = convert(row)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
                broken += 1
                why = reason_of(e)
                first = first or f"first: {kind} {number}, {why}"
                undecoded = undecoded or isinstance(e, UnicodeError)
                if broken <= NAMED:
                    say(f"{name}:{number} skipped: {why}")
            else:
                yield value
        hint = to_utf_8(path) if undecoded and kind == "line" else None
    except ValueError as e:
        common.fail(f"{e}; replace it or take it away, and prepare the data again")
    few = min(5, total / 2) if undecoded else 5  # five lines may be all of a text
    if broken > max(few, total / 100):
        common.fail(f"{name}: {broken:,} of {total:,} {kind}s are broken, more than 1 % "
                    f"({first}): {hint or 'fix or remove them'}")
    if broken > NAMED:
        say(f"{name}: and {broken - NAMED:,} more")
    if hint:
        say(f"{name}: {hint}")

def reason_of(error):
    """Why a line or row is skipped, in words."""
    if isinstance(error, json.JSONDecodeError):
        return "not JSON"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at its byte {error.start + 1}"
    if isinstance(error, KeyError):
        return f"no field {error.args[0]}"
    return str(error)[:240]

def to_utf_8(path):
    """What to do about a text that is no UTF-8; None where its encoding is not what is wrong.
    ValueError where the file is damaged."""
    import charset_normalizer
    lines = (line for _, line in all_lines(path) if b"\0" in line or not line.isascii())
    sample = b"".join(islice(lines, 2000))
    likeliest = charset_normalizer.from_bytes(sample).best()
    if likeliest is None or encoding_of(path) != "UTF-8":
        return None  # it is no text, or most of it is UTF-8, or has a byte order mark
    encoding = likeliest.encoding.replace("_", "")  # as iconv calls it
    runs = re.findall(rb"[\x80-\xff]+", sample)
    if b"\0" not in sample and sum(map(len, runs)) < 1.7 * len(runs):
        encoding = "cp1252"  # single letters with an accent among others
    old, new = shlex.quote(str(path)), shlex.quote(f"{path}.utf-8")
    command = f"iconv -f {encoding} -t utf-8 {old} > {new}"
    if path.suffix == ".gz":
        packed = shlex.quote(f"{path}.utf-8.gz")
        command = f"zcat {old} | iconv -f {encoding} -t utf-8 > {new} && gzip {new}"
        new = packed
    return (f"if its encoding is {encoding} (else name the right one) run: "
            f"{command} && mv {new} {old}")

def problem(path, rows, convert, enough=None):
    """None, or why good_rows() would end the run; looks at all rows, or the first `enough`."""
    silent = good_rows(path, islice(rows, enough), convert, say=lambda line: None)
    try:
        good = sum(1 for _ in silent)
    except common.Failure as e:
        return e.message
    return None if good else f"{path} holds no rows that can be read"

# -------------------------------------------------------------------------------------------------
# documents

# what a wrong encoding leaves in a text: U+FFFD, halves of pairs, control characters
LEFT_OVER = re.compile("[\0-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffd]")

def judged(text):
    """The text. ValueError where it was not decoded as it should have been: it holds a NUL, or more
    than 2 % of what a wrong encoding leaves, and more than two of it, since a page may quote one.
    Wrongly decoded German or French has about 2 to 4 %, what is not written in Latin letters 80 %;
    none of 45,000 documents of a real corpus has so much (LOG.md)."""
    if "\0" in text:
        raise ValueError("a NUL character")
    if LEFT_OVER.search(text):  # mostly not, and fast: a second for 300 million characters
        count = len(LEFT_OVER.findall(text))
        if count > 2 and 50 * count > len(text):
            raise ValueError(f"{count:,} of {len(text):,} characters are U+FFFD or control "
                             "characters")
    return text

def text_of(row):
    """The text of a row, or of a line of JSON; an empty field is no text."""
    if isinstance(row, bytes):
        row = json.loads(text_of_line(row))
    if not isinstance(row, dict):
        raise TypeError("not a JSON object")
    text = row["text"]
    if isinstance(text, bytes):  # see rows_of
        text = text.decode()
    if text is not None and not isinstance(text, str):
        raise TypeError("its text is not a string")
    return judged(text) if text else text

def text_of_line(line):
    """bytes of UTF-8 -> str. NUL is no text: it stands in UTF-16 without a mark and in binary
    files."""
    if b"\0" in line:
        raise UnicodeError("a NUL byte")
    return line.decode()

def is_plain(path):
    """Whether the file is text as it is, without rows."""
    return path.name.endswith((".txt", ".txt.gz"))

def plain_text_of(line):
    """A line of a plain text."""
    return judged(text_of_line(line))

def text_problem(path, enough=None):
    """None, or why a run would end at this file of texts. Read are the first rows of a .parquet
    file, and of another kind all lines, of a large one the first; or `enough` of them."""
    if path.suffix == ".parquet":
        return parquet_problem(path) or problem(path, read_rows(path, ["text"]), text_of, 1000)
    if enough is None and path.stat().st_size > LARGE:
        enough = 10_000
    if is_plain(path):
        return problem(path, all_lines(path, newline=None), plain_text_of, enough)
    return problem(path, read_lines(path), text_of, enough)

def facts_of(path):
    """What a file of texts holds, in one line.
    example: "1,203 documents, 2,003,001 characters, median 1,200, UTF-8, Latin" """
    lengths = []
    characters = 0
    left_over = 0
    letters = Counter()
    for text in read_documents(path):
        lengths.append(len(text))
        characters += len(text)
        left_over += len(LEFT_OVER.findall(text))
        letters.update(filter(str.isalpha, text[:1000]))
        if characters >= LOOKED_AT:
            break
    scripts = Counter()
    for letter, count in letters.items():
        scripts[unicodedata.name(letter, "other").split()[0].capitalize()] += count
    main = [script for script, count in scripts.most_common(3) if 10 * count >= scripts.total()]
    begin = "its beginning has " if characters >= LOOKED_AT else ""
    said = [f"{begin}{len(lengths):,} documents", f"{characters:,} characters",
            f"median {statistics.median(lengths or [0]):,.0f}",
            "parquet" if path.suffix == ".parquet" else encoding_of(path),
            " and ".join(main).replace("Cjk", "Han") or "no letters"]
    if left_over:
        said.append(f"{100 * left_over / characters:.2g} % replacement or control characters")
    return ", ".join(said)

def read_documents(path):
    """All documents of one file, in order, as str; of broken lines see good_rows."""
    if is_plain(path):
        return read_paragraphs(path)
    return filter(None, good_rows(path, read_rows(path, ["text"]), text_of))

def pieces(line):
    """A line cut behind blanks, where it has some, to pieces of at most DOCUMENT characters."""
    start = 0
    found = []
    while len(line) - start > DOCUMENT + 1:  # with its line end
        end = start + DOCUMENT
        end = line.rfind(" ", start + DOCUMENT // 2, end) + 1 or end
        found.append(line[start:end])
        start = end
    return [*found, line[start:]]

def read_paragraphs(path):
    """Paragraphs of a plain text, which end at a blank line, gathered to documents of DOCUMENT
    characters and what is left of their last one; a longer paragraph is divided between lines."""
    gathered = []
    size = 0  # of the paragraphs gathered that have ended
    paragraph = 0  # of the one that has not
    lines = good_rows(path, all_lines(path, newline=None), plain_text_of)
    for line in chain.from_iterable(map(pieces, lines)):
        # of two blank lines the second belongs to the next paragraph
        if paragraph > 0 and not line.strip():
            size += paragraph - 1
            paragraph = 0
            if size >= DOCUMENT:
                yield "".join(gathered).removesuffix("\n")
                gathered, size = [], 0
                continue
        else:
            if paragraph > 0 and paragraph + len(line) > DOCUMENT:
                yield "".join(gathered)
                gathered, size, paragraph = [], 0, 0
            paragraph += len(line)
        gathered.append(line)
    if "".join(gathered).strip():
        yield "".join(gathered)

def split_documents(texts, split):
    """The documents of a file that is in both splits: every HOLD_OUT-th is held out; of fewer the
    end of the text, a tenth of it."""
    first = list(islice(texts, HOLD_OUT))
    if len(first) < HOLD_OUT:
        train, val = divided(first, sum(map(len, first)) // 10 + 1)
        yield from val if split == "val" else train
        return
    for i, text in enumerate(chain(first, texts)):
        held_out = i % HOLD_OUT == HOLD_OUT - 1
        if held_out == (split == "val"):
            yield text

def divided(documents, size):
    """The documents but the last `size` characters, and these, where it goes from behind a blank
    on.  example: (["a b", "c d"], 4) -> (["a "], ["b", "c d"])"""
    head = [*documents]
    tail = []
    while head and len(head[-1]) <= size:
        tail.insert(0, head.pop())
        size -= len(tail[0])
    if head and size > 0:
        last = head.pop()
        at = len(last) - size
        at = last.rfind(" ", len(last) // 2, at) + 1 or at
        head.append(last[:at])
        tail.insert(0, last[at:])
    return head, tail

def documents(path, split, shared):
    """The documents of a file of a split; shared: it is in both."""
    found = read_documents(path)
    return split_documents(found, split) if shared else found
