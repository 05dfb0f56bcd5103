"""
A user's texts: which files of a folder are read, which of them are held out, what a document is,
and what happens to lines that cannot be read. A data set is a folder of .parquet, .jsonl, .jsonl.gz
or .txt files; a line of a .jsonl file, and a row of a .parquet file, has a field `text`.
All but .parquet is UTF-8, or UTF-16 with a byte order mark.
"""
import codecs
import gzip
import json
import shlex
import zlib
from itertools import islice

import common
import pipeline

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".txt")
# the validation split of the known data sets, fixed by name: the last of all their shards
VAL_SHARD = {"fineweb_edu": "shard_01822.parquet", "climbmix": "shard_06542.parquet"}
HOLD_OUT = 20  # of a data set in a single file every 20th document is held out
NAMED = 5  # so many broken lines of a file are named one by one
LARGE = 500_000_000  # bytes of a file that text_problem does not read to its end

# -------------------------------------------------------------------------------------------------
# files

def prepare_command(data):
    return shlex.join(["python", "prepare_data.py", f"--data={data}"])

def text_files(data):
    """The files of a data set that are not empty, sorted by name. Failure where there is none."""
    folder = pipeline.base_data_dir(data)
    command = None if pipeline.is_folder_data(data) else prepare_command(data)
    common.check(folder.exists() or command, f"{folder} does not exist: --data takes toy, "
                 "fineweb_edu, climbmix or a folder of texts")
    common.check(folder.exists(), f"the data folder {folder} does not exist", command)
    common.check(folder.is_dir(), f"{folder} is a file: --data takes the folder that holds it")
    files = [path for path in sorted(folder.glob("[!.]*"))
             if path.name.endswith(ENDINGS) and path.is_file() and path.stat().st_size > 0]
    common.check(files, f"the data folder {folder} holds no text: it has no file of "
                 f"{', '.join(ENDINGS)} that is not empty", command)
    return files

def dataset_files(data, names=None):
    """
    names: of the training files to take, where a run has begun with these; None: all
    -> {"train": files, "val": files}, lists of Path sorted by name. The validation file is the last
    by name (of known data sets a fixed name). A single file is in both lists: HOLD_OUT splits its
    documents. Failure where the folder is missing or empty, or a parquet file does not open or has
    no string column `text`.
    """
    files = text_files(data)
    for path in files:
        if path.suffix == ".parquet":
            why = parquet_problem(path)
            common.check(why is None, why)
    if data in VAL_SHARD:
        val = [path for path in files if path.name == VAL_SHARD[data]]
        common.check(val, f"the validation shard {VAL_SHARD[data]} is missing in "
                     f"{files[0].parent}", prepare_command(data))
        train = [path for path in files if path not in val]
    else:
        train, val = files[:-1] or files, files[-1:]
    if names is not None:
        train = [path for path in train if path.name in names] or train
    return {"train": train, "val": val}

def parquet_problem(path):
    """None, or why the parquet file cannot be read: its footer has to name a column `text`."""
    import pyarrow.parquet
    try:
        schema = pyarrow.parquet.ParquetFile(path).schema_arrow
    except (pyarrow.ArrowException, OSError) as e:
        return f"{path} is no readable parquet file: {e}"
    if "text" not in schema.names:
        return f"{path} has no column `text` (it has {', '.join(schema.names)})"
    kind = str(schema.field("text").type)
    if "string" not in kind:
        return f"{path}: its column `text` is no text but {kind}"
    return None

# -------------------------------------------------------------------------------------------------
# rows

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
            rows = parquet.read_row_group(group, columns).to_pylist()
            yield from enumerate(rows, number + 1)
            number += len(rows)
    except (pyarrow.ArrowException, OSError, ValueError) as e:
        raise ValueError(f"{path} is damaged in row group {group}: {e}") from e

def read_lines(path):
    """The lines of a file that are not blank, as all_lines has them."""
    return ((number, line) for number, line in all_lines(path) if line.strip())

def all_lines(path, newline="\n"):
    """The lines of a text file, or .gz file, as (number, bytes of UTF-8): those of UTF-16 are
    encoded anew, those that are no text at all stay as they are. A byte order mark is left out.
    newline: None also ends a line at "\\r" and "\\r\\n", which then become "\\n".
    ValueError where the file is damaged."""
    opened = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opened(path, "rb") as f:
            utf_16 = f.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        encoding = "utf-16" if utf_16 else "utf-8-sig"
        # surrogateescape: what cannot be decoded comes out of encode() as it was
        with opened(path, "rt", encoding=encoding, errors="surrogateescape", newline=newline) as f:
            for number, line in enumerate(f, 1):
                yield number, line.encode(errors="surrogateescape")
    except (OSError, EOFError, UnicodeError, zlib.error) as e:
        raise ValueError(f"{path} is damaged behind line {number}: {e}") from e

def good_rows(path, rows, convert, say=common.print0):
    """
    convert(row) for each (number, row) of `rows`. What convert refuses is skipped, the first NAMED
    with a message. Failure where that is more than 1 % (and more than 5), or the file is damaged.
    """
    kind = "row" if path.suffix == ".parquet" else "line"
    broken = 0
    total = 0
    first = ""
    hint = ""
    try:
        for number, row in rows:
            total += 1
            try:
                value = convert(row)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
                broken += 1
                why = reason_of(e)
                first = first or f"first: {kind} {number}, {why}"
                if isinstance(e, UnicodeError) and path.suffix != ".gz":
                    hint = to_utf_8(path)
                if broken <= NAMED:
                    say(f"{path}:{number} skipped: {why}")
            else:
                yield value
    except ValueError as e:
        common.fail(f"{e}; remove it and prepare the data again")
    common.check(broken <= max(5, total / 100), f"{path}: {broken:,} of {total:,} {kind}s are "
                 f"broken, more than 1 % ({first}): {hint or 'fix or remove them'}")
    if broken > NAMED:
        say(f"{path}: and {broken - NAMED:,} more")

def reason_of(error):
    """Why a line or row is skipped, in words."""
    if isinstance(error, json.JSONDecodeError):
        return "not JSON"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    if isinstance(error, KeyError):
        return f"no field {error.args[0]}"
    return str(error)[:80]

def to_utf_8(path):
    old, new = shlex.quote(str(path)), shlex.quote(f"{path}.utf-8")
    return ("if its encoding is CP1252 (else name the right one) run: "
            f"iconv -f CP1252 -t UTF-8 {old} > {new} && mv {new} {old}")

def problem(path, rows, convert, enough=None):
    """None, or why good_rows() would end the run; looks at all, or until `enough` are good."""
    silent = good_rows(path, rows, convert, say=lambda line: None)
    try:
        good = sum(1 for _ in islice(silent, enough))
    except common.Failure as e:
        return e.message
    return None if good else f"{path} holds no rows that can be read"

# -------------------------------------------------------------------------------------------------
# documents

def text_of(row):
    """The text of a row, or of a line of JSON; an empty field is no text."""
    if isinstance(row, bytes):
        row = json.loads(row)
    if not isinstance(row, dict):
        raise TypeError("not a JSON object")
    text = row["text"]
    if text is not None and not isinstance(text, str):
        raise TypeError("its text is not a string")
    return text

def text_of_line(line):
    """A line of a .txt file. NUL is no text: it stands in UTF-16 without a mark and in binary
    files."""
    if b"\0" in line:
        raise UnicodeError("a NUL byte")
    return line.decode()

def text_problem(path):
    """None, or why a run would end at this file of texts. Read are the footer of a .parquet file,
    and the first lines of a large one of another kind."""
    if path.suffix == ".parquet":
        return parquet_problem(path)
    enough = 10_000 if path.stat().st_size > LARGE else None
    if path.suffix == ".txt":
        return problem(path, all_lines(path), text_of_line, enough)
    return problem(path, read_lines(path), text_of, enough)

def read_documents(path):
    """All documents of one file, in order, as str; of broken lines see good_rows."""
    if path.suffix == ".txt":
        yield from read_paragraphs(path)
    else:
        yield from filter(None, good_rows(path, read_rows(path, ["text"]), text_of))

def read_paragraphs(path):
    """Paragraphs of a .txt file (split at blank lines), gathered to documents of about 10,000
    characters."""
    gathered, size = [], 0
    paragraph = ""
    for line in good_rows(path, all_lines(path, newline=None), text_of_line):
        if line != "\n" or not paragraph:  # of two blank lines the second belongs to the next one
            paragraph += line
            continue
        gathered.append(paragraph[:-1])
        size += len(gathered[-1])
        paragraph = ""
        if size >= 10_000:
            yield "\n\n".join(gathered)
            gathered, size = [], 0
    gathered.append(paragraph)
    if "".join(gathered).strip():
        yield "\n\n".join(gathered)

def documents(path, split, alone):
    """The documents of `path` that belong to `split`; alone: the file is the whole data set, so
    HOLD_OUT decides."""
    for i, text in enumerate(read_documents(path)):
        held_out = i % HOLD_OUT == HOLD_OUT - 1
        if not alone or held_out == (split == "val"):
            yield text

def iter_texts(data, split="train", names=None):
    """All documents of a split, file by file. names: as dataset_files has it"""
    files = dataset_files(data, names)
    for path in files[split]:
        yield from documents(path, split, alone=files["train"] == files["val"])
