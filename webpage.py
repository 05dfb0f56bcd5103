"""
What report.py shows: curves as pictures, tables, and report.md once more as one HTML page that
needs no other file.
"""
import html
import re
from itertools import takewhile

def picture(line, title, band=None, restarts=()):
    """[(x, y)] as a small SVG, a text; of many points means are drawn. band: [(x, low, high)], a
    grey ground; restarts: where dotted lines go. "" for fewer than two points."""
    if len(line) < 2:
        return ""
    import numpy as np  # not above: an old Python, without it, gets no further than common.py
    parts = np.array_split(np.array(line, dtype=float), min(len(line), 300))
    xs, ys = np.array([part.mean(axis=0) for part in parts]).T
    bottom, top = ys.min(), ys.max()
    if band:
        bottom, top = min(bottom, *(low for _, low, _ in band)), max(top, band[0][2])

    def place(x, y):
        across = np.interp(x, [xs[0], xs[-1]], [10, 550])
        return f"{across:.1f},{np.interp(y, [bottom, top], [130, 22]):.1f}"
    ground = ""
    if band:
        around = [place(x, low) for x, low, _ in band]
        around += [place(x, high) for x, _, high in reversed(band)]
        ground = f'<polygon fill="#cfd8e3" points="{" ".join(around)}"/>\n'
    for x in restarts:
        across = place(x, bottom).split(",")[0]
        ground += f'<path stroke="#b50" stroke-dasharray="3 3" d="M{across} 18V130"/>\n'
    curve = " ".join(place(x, y) for x, y in zip(xs, ys))
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 560 140" width="560"
height="140" font-family="sans-serif" font-size="11" fill="#555">
<rect width="100%" height="100%" fill="#fff"/>
{ground}<polyline fill="none" stroke="#2a6fbb" stroke-width="1.5" points="{curve}"/>
<text x="10" y="14">{title}, {ys.min():.3g} to {ys.max():.3g}; steps {xs[0]:,.0f} to {xs[-1]:,.0f}
</text>
</svg>
"""

def markdown(rows):
    """Rows of texts, their head first, as the lines of a table."""
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""]

def aligned(rows):
    """The same for a terminal, the columns under each other."""
    return [f"{name:<30}" + "".join(f"{cell:<17}" for cell in cells) for name, *cells in rows]

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0; }
th, td { border: 1px solid #8886; padding: .2rem .6rem; text-align: left; vertical-align: top; }
pre, code { font: .85em ui-monospace, monospace; background: #8882; border-radius: 4px; }
pre { padding: .6rem; overflow-x: auto; } code { padding: .1em .3em; }
svg { max-width: 100%; height: auto; border-radius: 6px; display: block; margin: .3rem 0; }
"""

def page(text, folder):
    """report.md as a page: headings, lists, tables, code, and its pictures, which lie in
    `folder`, in place. A blank line stands behind each table, as markdown() has it."""
    out = []
    lines = iter(text.split("\n"))
    for line in lines:
        if line.startswith("```"):
            code = takewhile(lambda inner: inner != "```", lines)
            out.append(f"<pre>{html.escape(chr(10).join(code))}</pre>")
        elif heading := re.match(r"(#+) (.*)", line):
            level = len(heading[1])
            out.append(f"<h{level}>{inline(heading[2])}</h{level}>")
        elif found := re.match(r"\s*!\[.*\]\((.*)\)$", line):
            path = folder / found[1]
            out.append(path.read_text("utf-8") if path.exists() else "")
        elif line.startswith("| "):
            rows = takewhile(lambda row: row.startswith("|"), lines)
            out.append(table([line, *rows]))
        elif line.startswith("- "):
            out.append(f"<div>&bull; {inline(line[2:])}</div>")
        elif line:
            out.append(f"<p>{inline(line)}</p>")
    title = html.escape(text.partition("\n")[0].lstrip("# "))
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n<meta name="viewport" '
            f'content="width=device-width"><title>{title}</title>\n<style>{STYLE}</style></head>'
            "<body>\n" + "\n".join(out) + "\n</body></html>\n")

def table(lines):
    def row(line, cell):
        cells = re.split(r"(?<!\\)\|", line.strip()[1:-1])
        return "<tr>" + "".join(f"<{cell}>{inline(c.strip())}</{cell}>" for c in cells) + "</tr>"
    head, *rest = [line for line in lines if not line.startswith("|---")]
    return f"<table>{row(head, 'th')}{''.join(row(line, 'td') for line in rest)}</table>"

def inline(text):
    text = html.escape(text.replace("\\|", "|"))
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
