"""Plain text out of manual pages, HTML pages, Rust and Python sources."""

from __future__ import annotations

import gzip
import html
import re
import subprocess

from .documents import unit

MIN_CHARS = 400


def tidy(text: str, blank_lines: int = 1) -> str:
    """Normal line ends, no trailing spaces, at most so many blank lines in a row."""
    text = text.replace("\r\n", "\n").replace("\f", "\n")
    text = re.sub(r"[ \t]+\n", "\n", text)
    breaks = "\n" * (blank_lines + 1)
    return re.sub(breaks + "\n+", breaks, text).strip("\n ") + "\n"


def decode(data: bytes) -> str:
    """UTF-8, or Latin-1 where that fails."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


LAYOUT = frozenset("ft nf fi in ad hy ie el if nr ds de so ne ta tr rm AT PD Os Dd UC na nh ll br ti ce".split())  # noqa: SIM905


def strip_roff(source: str) -> str:
    """The text of a manual page with its roff requests removed: arguments stay, formatting goes."""
    lines: list[str] = []
    skipping = ""
    for line in source.split("\n"):
        if skipping:
            if line.startswith(skipping):
                skipping = ""
            continue
        if line.startswith(('.\\"', "'\\\"", ".ig")):
            continue
        if match := re.match(r"[.']\s*(de|ig|am)\b", line):
            skipping = ".." if match else ""
            continue
        if match := re.match(r"[.'] *([A-Za-z]{1,3}[1-9]?)\b ?(.*)", line):
            request, rest = match.groups()
            if request in ("TH", "SH", "SS", "Sh", "Ss", "Dt"):
                lines += ["", rest.strip('"') if request != "TH" else rest]
                if request == "TH":
                    lines.append("")
            elif request in ("PP", "P", "LP", "TP", "IP", "HP", "Pp", "sp", "It", "bp", "RS", "RE"):
                lines.append("")
                if rest and request in ("IP", "It"):
                    lines.append(rest)
            elif request in LAYOUT:
                continue
            elif rest:
                lines.append(rest)
        elif line.startswith((".", "'")) and not line.startswith(("...", "'s")):
            continue
        else:
            lines.append(line)
    text = "\n".join(lines)
    text = re.sub(r"\\f(\(..|\[[^]]*\]|.)", "", text)
    text = re.sub(r"\\s[-+]?\d", "", text)
    text = text.replace("\\-", "-").replace("\\&", "").replace("\\e", "\\").replace("\\(aq", "'").replace("\\(bu", "*")
    text = text.replace("\\(em", "--").replace("\\(dq", '"').replace("\\(co", "(c)").replace("\\ ", " ")
    text = text.replace("\\%", "").replace("\\:", "").replace("\\|", "").replace("\\*(", "").replace('\\"', "")
    return text


def render_man(source: str) -> str:
    """A manual page as a reader sees it (groff, no escapes)."""
    command = ["groff", "-mandoc", "-Tutf8", "-t", "-P-cbou", "-rLL=88n", "-rHY=0"]
    try:
        done = subprocess.run(command, input=source.encode("utf-8"), capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return re.sub(r".\x08", "", done.stdout.decode("utf-8", "replace"))


BLOCKS = frozenset(
    re.split(
        r"\s+",
        "address article aside blockquote body caption dd details div dl dt figcaption figure footer form h1 h2 h3 h4 h5 "
        "h6 header hr li main ol p pre section summary table tbody thead tr ul br",
    )
)
SKIPPED = frozenset("script style head nav noscript svg template button select input rustdoc-toolbar".split())  # noqa: SIM905
SKIPPED_CLASSES = re.compile(
    r"\b(sphinxsidebar|related|headerlink|sidebar|footer|navheader|navfooter|menu-bar|nav-wrapper|nav-chapters|toctree"
    r"|mobile-nav|breadcrumbs|src-line-numbers|out-of-band|copy-path|hidden|skip-link|clearer)\b"
)


def html_text(data: bytes) -> str:
    """The text of an HTML page: blocks on lines of their own, ``pre`` as it is, navigation left out."""
    from lxml import etree
    from lxml import html as lxml_html

    try:
        root = lxml_html.document_fromstring(data, parser=lxml_html.HTMLParser(encoding="utf-8"))
    except (etree.ParserError, ValueError):
        return ""
    main = root.xpath('//main | //div[@role="main"] | //div[@id="content"] | //div[@class="document"]')
    out: list[str] = []

    def walk(node: object, pre: bool) -> None:
        tag = node.tag if isinstance(node.tag, str) else ""
        if not tag or tag in SKIPPED or SKIPPED_CLASSES.search(node.get("class") or ""):
            return
        inside = pre or tag == "pre"
        block = tag in BLOCKS
        if block:
            out.append("\n\n" if tag in ("p", "pre", "h1", "h2", "h3", "h4", "li", "section", "table") else "\n")
        elif tag in ("td", "th"):
            out.append(" ")
        if node.text:
            out.append(node.text if inside else re.sub(r"[ \n\t]+", " ", node.text))
        for child in node:
            walk(child, inside)
            if child.tail:
                out.append(child.tail if inside else re.sub(r"[ \n\t]+", " ", child.tail))
        if block:
            out.append("\n")

    walk(main[0] if main else root, False)
    text = "".join(out)
    return re.sub(r"\n +(?=\n)", "\n", text)


def rust_comments(source: str) -> str:
    """The documentation comments of a Rust file, each followed by the line of the item it documents."""
    out: list[str] = []
    pending = False
    for line in source.split("\n"):
        bare = line.strip()
        if bare.startswith(("///", "//!")) and not bare.startswith("////"):
            out.append(bare[3:].removeprefix(" "))
            pending = bare.startswith("///")
        elif pending and bare and not bare.startswith(("#", "//")):
            out += ["", bare.rstrip(" {"), ""]
            pending = False
        elif not bare and out and not pending:
            out.append("")
    return "\n".join(out)


def to_text(domain: str, package: str, name: str, data: bytes) -> str:
    """The plain text of one file."""
    if name.endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError):
            return ""
        name = name.removesuffix(".gz")
    if b"\0" in data[:4096] or len(data) > 4_000_000:
        return ""
    if domain == "man":
        source = decode(data)
        if re.match(r"\s*\.so ", source):
            return ""
        # Seven pages in ten as stripped source, the others as rendered: readers of the text meet both.
        return strip_roff(source) if unit("style", name) < 0.7 else render_man(source[:200_000])
    if name.endswith((".html", ".htm")):
        return html_text(data)
    text = decode(data)
    if domain == "rustdoc" and name.endswith(".rs"):
        return rust_comments(text)
    return html.unescape(text) if name.endswith(".html") else text


ENCODED = re.compile(r"(?=.*[a-z])(?=.*[A-Z])(?=.*[0-9])")  # what tells base64 from a long name or a ruled line


def acceptable(text: str) -> bool:
    """Whether a document is text worth learning: long enough, no table of numbers, no encoded data, not one line."""
    if len(text) < MIN_CHARS:
        return False
    head = text[:8000]
    digits = sum(c.isdigit() for c in head)
    odd = sum(ord(c) > 126 for c in head)
    if sum(len(run) for run in re.findall(r"[A-Za-z0-9+/=]{40,}", head) if ENCODED.match(run)) > 0.25 * len(head):
        return False
    return digits < 0.2 * len(head) and odd < 0.1 * len(head) and max(map(len, head.split("\n"))) < 3000
