#!/usr/bin/env python3
"""Build the reference corpus: training text, ``calibration.jsonl``, ``evaluation.jsonl`` and the task pool.

Everything comes from Debian packages (``main`` only, so every file may be redistributed). The steps are

1. ``apt-get download`` of the packages named in ``text/packages.txt`` (from one suite, with private package lists);
2. plain text of four kinds out of them: ``man`` (manual pages), ``doc`` (prose documentation, change logs),
   ``python`` (Python source) and ``rustdoc`` (rendered Rust documentation, doc comments of crates);
3. exact and near-duplicate removal, and the split into training and held-out documents;
4. the choice of the documents kept in the repository, without those of ``NOT_COMMITTED``;
5. ``SOURCES.md``: every package with its version and the licences its ``copyright`` file names.

The choice of documents depends on nothing but the packages and ``--seed``: files are visited in the order of a hash
of their names. The same package versions give the same text.

Only documents of packages in ``PERMISSIVE`` (MIT, BSD, Apache-2.0, PSF, PostgreSQL and the like) are held out, so only
those reach the files kept in the repository. Every package must come from ``main`` and have a ``copyright`` file.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import io
import json
import lzma
import multiprocessing
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
DOMAINS = ("man", "doc", "python", "rustdoc")

# Characters kept of one document, in training and in the held-out files.
MAX_TRAIN_CHARS = 32_000
MAX_HELD_CHARS = 8_000
MIN_CHARS = 400
# Characters kept of one package and domain, so that no package rules its domain.
CAPS = {"man": 1_600_000, "doc": 1_300_000, "python": 900_000, "rustdoc": 900_000}
PACKAGE_CAPS = {
    ("rust-doc", "rustdoc"): 36_000_000,
    ("cargo-doc", "rustdoc"): 4_000_000,
    ("libpython3.13-testsuite", "python"): 6_000_000,
    ("libpython3.13-stdlib", "python"): 7_000_000,
    ("python3.13-doc", "doc"): 9_000_000,
    ("perl-doc", "man"): 4_000_000,
    ("manpages-dev", "man"): 4_000_000,
    ("postgresql-doc-17", "doc"): 5_000_000,
    ("linux-doc-6.12", "doc"): 5_000_000,
    ("freebsd-manpages", "man"): 6_000_000,
    ("libssl-doc", "man"): 4_000_000,
}

# So many times the cap is read in all; what lies beyond the cap is training text only, as are the packages below the line
# TRAINING_ONLY of packages.txt.
MORE = 4
TRAINING_ONLY = "# training only"

# Packages whose documents may be held out, with the licence of the text used. The entries of the packages that
# contribute to the committed files were compared with the copyright files (see SOURCES.md); NOT_COMMITTED names what
# that ruled out. All the other packages are training material only.
PERMISSIVE = {
    # manual pages
    "tcl8.6-doc": "TCL (BSD-like)", "tk8.6-doc": "TCL (BSD-like)", "libcurl4-doc": "curl (MIT-like)",
    "libssl-doc": "Apache-2.0", "libx11-doc": "MIT (X11)", "libxcb-doc": "MIT (X11)", "libxt-dev": "MIT (X11)",
    "libxext-dev": "MIT (X11)", "libxi-dev": "MIT (X11)", "libncurses-dev": "MIT (X11)", "ncurses-doc": "MIT (X11)",
    "ncurses-bin": "MIT (X11)", "libpcap0.8-dev": "BSD-3-Clause", "libarchive-dev": "BSD-2-Clause", "tmux": "ISC",
    "mandoc": "ISC", "openssh-client": "BSD-2-Clause/ISC", "openssh-server": "BSD-2-Clause/ISC",
    "postgresql-client-17": "PostgreSQL", "openmpi-doc": "BSD-3-Clause", "erlang-manpages": "Apache-2.0",
    "unbound": "BSD-3-Clause", "nsd": "BSD-3-Clause", "freebsd-manpages": "BSD-2/3/4-Clause (by page)",
    "docker-cli": "Apache-2.0", "kubernetes-client": "Apache-2.0", "cmake": "BSD-3-Clause", "gdal-bin": "MIT",
    "libbsd-dev": "BSD-3-Clause", "libevent-dev": "BSD-3-Clause", "sudo": "ISC", "zsh-common": "MIT-like (Zsh)",
    "tcpdump": "BSD-3-Clause", "xterm": "MIT (X11)", "x11-utils": "MIT (X11)", "x11-xserver-utils": "MIT (X11)",
    "libdrm-dev": "MIT", "krb5-doc": "MIT", "krb5-user": "MIT", "lighttpd": "BSD-3-Clause",
    # prose
    "python3.13-doc": "PSF-2.0", "postgresql-doc-17": "PostgreSQL", "nodejs-doc": "MIT", "sqlite3-doc": "public domain",
    "cmake-doc": "BSD-3-Clause", "apache2-doc": "Apache-2.0", "python-django-doc": "BSD-3-Clause",
    "python-numpy-doc": "BSD-3-Clause", "python-scipy-doc": "BSD-3-Clause", "python-pandas-doc": "BSD-3-Clause",
    "python-sqlalchemy-doc": "MIT", "sphinx-doc": "BSD-2-Clause", "python-tornado-doc": "Apache-2.0",
    "python-flask-doc": "BSD-3-Clause", "python-werkzeug-doc": "BSD-3-Clause", "python-jinja2-doc": "BSD-3-Clause",
    "python-click-doc": "BSD-3-Clause", "python-pytest-doc": "MIT", "python-attr-doc": "MIT",
    "python-requests-doc": "Apache-2.0", "python-aiohttp-doc": "Apache-2.0",
    "python-cryptography-doc": "Apache-2.0", "python-babel-doc": "BSD-3-Clause",
    "python-celery-doc": "BSD-3-Clause", "python-dask-doc": "BSD-3-Clause", "python-xarray-doc": "Apache-2.0",
    "python-h5py-doc": "BSD-3-Clause", "python-scrapy-doc": "BSD-3-Clause", "python-astropy-doc": "BSD-3-Clause",
    "python-setuptools-doc": "MIT", "twisted-doc": "MIT", "python-ipython-doc": "BSD-3-Clause",
    "llvm-19-doc": "Apache-2.0 WITH LLVM-exception", "clang-19-doc": "Apache-2.0 WITH LLVM-exception",
    "erlang-doc": "Apache-2.0", "nova-doc": "Apache-2.0", "neutron-doc": "Apache-2.0", "cinder-doc": "Apache-2.0",
    "keystone-doc": "Apache-2.0", "glance-doc": "Apache-2.0", "heat-doc": "Apache-2.0", "ironic-doc": "Apache-2.0",
    "swift-doc": "Apache-2.0", "awscli": "Apache-2.0", "docker-doc": "Apache-2.0", "libuv1-doc": "CC-BY-4.0 (manual), MIT",
    "meson": "Apache-2.0", "ninja-build": "Apache-2.0", "libwayland-doc": "MIT", "mkdocs-doc": "BSD-2-Clause",
    # Python source
    "libpython3.13-stdlib": "PSF-2.0", "libpython3.13-testsuite": "PSF-2.0", "libpython3.13-minimal": "PSF-2.0",
    "python3-django": "BSD-3-Clause", "python3-numpy": "BSD-3-Clause", "python3-scipy": "BSD-3-Clause",
    "python3-pandas": "BSD-3-Clause", "python3-sqlalchemy": "MIT", "python3-sphinx": "BSD-2-Clause",
    "python3-tornado": "Apache-2.0", "python3-flask": "BSD-3-Clause", "python3-werkzeug": "BSD-3-Clause",
    "python3-jinja2": "BSD-3-Clause", "python3-click": "BSD-3-Clause", "python3-pytest": "MIT", "python3-attr": "MIT",
    "python3-requests": "Apache-2.0", "python3-urllib3": "MIT", "python3-aiohttp": "Apache-2.0",
    "python3-cryptography": "Apache-2.0", "python3-babel": "BSD-3-Clause",
    "python3-celery": "BSD-3-Clause", "python3-networkx": "BSD-3-Clause", "python3-dask": "BSD-3-Clause",
    "python3-xarray": "Apache-2.0", "python3-h5py": "BSD-3-Clause", "python3-sklearn": "BSD-3-Clause",
    "python3-scrapy": "BSD-3-Clause", "python3-astropy": "BSD-3-Clause", "python3-numba": "BSD-2-Clause",
    "python3-setuptools": "MIT", "python3-virtualenv": "MIT", "python3-twisted": "MIT", "python3-httpx": "BSD-3-Clause",
    "python3-starlette": "BSD-3-Clause", "python3-fastapi": "MIT", "python3-pydantic": "MIT",
    "python3-ipython": "BSD-3-Clause", "python3-boto3": "Apache-2.0", "python3-botocore": "Apache-2.0",
    "python3-asyncpg": "Apache-2.0", "black": "MIT", "python3-rich": "MIT", "python3-pygments": "BSD-2-Clause",
    "python3-jupyter-server": "BSD-3-Clause", "python3-nova": "Apache-2.0", "python3-neutron": "Apache-2.0",
    "python3-cinder": "Apache-2.0", "python3-keystone": "Apache-2.0", "python3-glance": "Apache-2.0",
    "python3-heat": "Apache-2.0", "python3-ironic": "Apache-2.0", "python3-swift": "Apache-2.0",
    "python3-kombu": "BSD-3-Clause", "python3-trio": "MIT or Apache-2.0", "python3-kubernetes": "Apache-2.0",
    "python3-libcloud": "Apache-2.0", "python3-nbconvert": "BSD-3-Clause", "python3-fsspec": "BSD-3-Clause",
    "python3-joblib": "BSD-3-Clause", "python3-seaborn": "BSD-3-Clause", "python3-plotly": "MIT",
    "python3-textual": "MIT", "python3-prompt-toolkit": "BSD-3-Clause", "python3-fonttools": "MIT",
    "python3-statsmodels": "BSD-3-Clause", "python3-alembic": "MIT", "python3-redis": "MIT",
    # Rust
    "rust-doc": "MIT or Apache-2.0", "cargo-doc": "MIT or Apache-2.0",
}  # fmt: skip
# Held-out documents that are not committed, by package (or book) and path: their terms are share-alike, copyleft or not
# stated, which the licence of the package does not show.
NOT_COMMITTED = {
    r"krb5-doc /": "documentation under CC-BY-SA-3.0",
    r"krb5-user /": "documentation under CC-BY-SA-3.0",
    r"python-celery-doc /": "documentation under CC-BY-SA-4.0",
    r"rust-doc/embedded-book /": "prose under CC-BY-SA-4.0 according to its authors",
    r"lighttpd .*/lighty-enable-mod": "a script under GPL or Artistic, its page without terms of its own",
    r"\S+ .*/(changelog|NEWS|README)\.Debian": "text of Debian, often under other terms than the package",
    r"\S+ .*/CODE_OF_CONDUCT": "a text of other origin (Contributor Covenant)",
}
# The same by what the text says of itself.
OTHER_TERMS = re.compile(
    r"(adapted|copied|taken|borrowed|stolen|from)\b.{0,40}stack ?overflow\.com|ShareAlike|CC[- ]BY[- ]SA|"
    r"licen[cs]ed under .{0,40}(GPL|General Public|Creative Commons)|"
    r"GNU (Lesser )?General Public Licen[cs]e|GNU Free Documentation|CDDL",
    re.IGNORECASE,
)
# Crates under other terms (all of them free) are training material only.
CRATES_NOT_HELD = {
    "librust-memchr-dev",
    "librust-aho-corasick-dev",
    "librust-nalgebra-dev",
    "librust-bstr-dev",
    "librust-walkdir-dev",
    "librust-ignore-dev",
    "librust-globset-dev",
    "librust-csv-dev",
}

# Sources of which no document is trained on: the "unseen" part of the held-out text.
UNSEEN = {
    "tk8.6-doc", "nsd", "libarchive-dev", "libevent-dev", "x11-utils", "tcpdump",
    "python-flask-doc", "sphinx-doc", "python-attr-doc", "libuv1-doc", "python-tornado-doc", "glance-doc",
    "python-xarray-doc", "python3-httpx", "python3-starlette", "python3-fsspec", "python3-joblib", "python3-trio",
    "python3-glance", "python3-xarray", "python3-flask", "python3-attr", "python3-rich", "python3-tornado",
    "rust-doc/rust-by-example", "rust-doc/nomicon", "librust-rayon-dev", "librust-petgraph-dev",
    "librust-indexmap-dev", "librust-url-dev", "librust-axum-dev", "librust-uuid-dev", "librust-smallvec-dev",
}  # fmt: skip
# Share of the remaining held-out-able documents that leave the training text, by domain.
HELD_SHARE = {"man": 0.09, "doc": 0.07, "python": 0.06, "rustdoc": 0.10}


@dataclass
class Document:
    """One document: where it came from and its text; ``more`` is never held out."""

    domain: str
    source: str
    path: str
    text: str
    more: bool = False


class BuildError(Exception):
    """A problem to show the user as one line."""


def digest(*parts: str) -> int:
    """A stable 64-bit number of some strings."""
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "big")


def unit(*parts: str) -> float:
    """A stable number in [0, 1) of some strings."""
    return digest(*parts) / 2**64


# ----------------------------------------------------------------------------------------------- fetching


def fetch(packages: list[str], suite: str, mirror: str, cache: Path) -> None:
    """Download the packages into ``cache/debs`` with package lists of their own (the system's are untouched)."""
    lists, debs = cache / "lists", cache / "debs"
    for folder in (lists / "partial", debs / "partial", cache / "archives" / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    (cache / "sources.list").write_text(f"deb {mirror} {suite} main\n")
    options = [
        f"-oDir::Etc::sourcelist={cache}/sources.list", "-oDir::Etc::sourceparts=/dev/null",
        f"-oDir::State::Lists={lists}", f"-oDir::Cache={cache}", "-oAPT::Sandbox::User=root",
    ]  # fmt: skip
    missing = [name for name in packages if not list(debs.glob(f"{name}_*.deb"))]
    if not missing:
        return
    try:
        subprocess.run(["apt-get", *options, "update"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["apt-get", *options, "download", *missing], check=True, cwd=debs, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"cannot download the Debian packages: {error}") from error


# ----------------------------------------------------------------------------------------------- plain text


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


def classify(package: str, name: str, has_sources: bool) -> str | None:
    """The domain of a file of a package by its path, or None."""
    plain = name.removesuffix(".gz")
    if "/man/" in name and re.search(r"/man[1-9n][^/]*/[^/]+\.[1-9n][^/]*$", name):
        parts = name.split("/man/", 1)[1].split("/")
        return "man" if len(parts) == 2 else None  # no translations
    if package == "rust-doc" or package == "cargo-doc":
        if not name.endswith(".html") or re.search(r"/(src|implementors|trait\.impl|type\.impl|search\.index)/", name):
            return None
        if re.search(r"/(print|all|help|settings|search-redirect|404|toc)\.html$", name):
            return None
        if "/arch/" in name and digest(name) % 12:
            return None  # thousands of nearly equal intrinsics
        return "rustdoc"
    if package.startswith("librust-"):
        return "rustdoc" if plain.endswith((".rs", ".md")) and not re.search(r"/(tests|benches)/", name) else None
    if plain.endswith(".py") and ("/dist-packages/" in name or "/lib/python3" in name or package in ("meson", "black")):
        return None if re.search(r"/(_vendor|vendor|extern|locale|lib2to3/tests/data)/", name) else "python"
    if "/doc/" in name or "/share/" in name:
        base = plain.rsplit("/", 1)[-1]
        if base == "copyright" or ("/examples/" in name and package != "awscli") or "/locale/" in name:
            return None
        if "/_sources/" in name:
            return "doc"
        markup = plain.endswith((".rst", ".md", ".adoc"))
        if markup and ("/doc/" in name or (package == "awscli" and plain.endswith(".rst"))):
            return "doc"
        if re.match(r"(?i)(changelog|changes|news|readme|faq|todo|relnotes|history|hacking|contributing)", base):
            return "doc" if not base.endswith((".html", ".png", ".css", ".js")) else None
        if plain.endswith((".html", ".htm")) and "/doc/" in name and not has_sources:
            index = r"/(genindex|search|py-modindex|_modules|index-[a-z]|print|ix\d+|_static)[^/]*(/|\.html)"
            if package == "nodejs-doc" or re.search(index, name):
                return None
            if re.search(r"\.html\.(?!en)|\.(de|es|fr|ja|ko|pt-br|tr|zh-cn|da)(\.|/)|/(de|es|fr|ja|ko|tr)/", name):
                return None
            return "doc"
        if plain.endswith(".txt") and "/doc/" in name:
            return "doc"
    return None


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


def source_of(package: str, name: str) -> str:
    """The unit by which whole sources are held out: the package, or a book of rust-doc."""
    if package == "rust-doc":
        part = name.split("/html/", 1)[-1].split("/")[0]
        return f"rust-doc/{part}"
    return package


def control_info(deb: str) -> dict[str, str]:
    """Version, source package and section of a package, and where its copyright file is (not known yet)."""
    fields = ("Version", "Source", "Section", "Package")
    done = subprocess.run(["dpkg-deb", "-f", deb, *fields], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(?m)^(\w+): (.*)$", done))
    return {"version": found["Version"], "origin": found.get("Source", found["Package"]).split()[0],
            "section": found.get("Section", ""), "copyright": "", "main": "", "licences": ""}  # fmt: skip


def copyright_info(text: str) -> dict[str, str]:
    """What a copyright file says: the licence of ``Files: *`` and all the short names, as far as machine-readable."""
    main = ""
    for block in re.split(r"\n[ \t]*\n", text):
        files = re.search(r"(?ms)^Files:(.*?)(?=^\S|\Z)", block)
        licence = re.search(r"(?m)^License: *(\S.*)$", block)
        if files and licence and "*" in files.group(1).replace(",", " ").split() and not main:
            main = licence.group(1).strip()
    found = re.findall(r"(?m)^License: *(\S[^\n]{0,60})$", text)
    names = sorted({f for f in found if not re.search(r"[a-z] [a-z]+ [a-z]+ ", f)})
    return {"main": main, "licences": ", ".join(names) or "see its copyright file"}


def check_origin(infos: dict[str, dict[str, str]]) -> None:
    """Every package is from ``main`` and has a copyright file, of its own or in the package its folder is a link to."""
    for package, info in infos.items():
        if "/" in info["section"]:
            raise BuildError(f"{package} is not from main but from {info['section']}")
        if not info["copyright"]:
            raise BuildError(f"{package} has no copyright file")
        if info["copyright"] != package:  # the same source package, so the same file
            twins = [i for p, i in sorted(infos.items()) if i["origin"] == info["origin"] and i["copyright"] == p]
            twin = infos.get(info["copyright"]) or (twins[0] if twins else None)
            info["main"] = twin["main"] if twin else ""
            info["licences"] = twin["licences"] if twin else f"see the copyright file of {info['copyright']}"


def extract(job: tuple[str, bool]) -> tuple[str, list[Document], dict[str, str]]:
    """All documents of one package, and its version and licences; ``job`` is the file, and whether it is only trained on."""
    deb, training_only = job
    package = Path(deb).name.split("_")[0]
    stream = subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], capture_output=True, check=True).stdout
    archive = tarfile.open(fileobj=io.BytesIO(stream))  # noqa: SIM115
    members = [m for m in archive.getmembers() if m.isfile() and 200 < m.size < 4_000_000]
    sources = {m.name.split("/_sources/")[0] for m in members if "/_sources/" in m.name}
    members.sort(key=lambda m: digest(package, m.name))
    used: Counter[str] = Counter()
    documents: list[Document] = []
    info = control_info(deb)
    for link in archive.getmembers():
        if link.issym() and link.name == f"./usr/share/doc/{package}":
            info["copyright"] = link.linkname.strip("./")
    for member in members:
        name = member.name.lstrip(".")
        if name.endswith(f"/doc/{package}/copyright"):
            info |= copyright_info(decode(archive.extractfile(member).read())) | {"copyright": package}
            continue
        domain = classify(package, name, any(member.name.startswith(s + "/") for s in sources))
        cap = PACKAGE_CAPS.get((package, domain or ""), CAPS.get(domain or "", 0))
        if domain is None or used[domain] >= (cap if training_only else MORE * cap):
            continue
        text = tidy(to_text(domain, package, name, archive.extractfile(member).read()), 1 + (domain == "python"))
        if "changelog" in name.lower():
            text = text[:MAX_HELD_CHARS]
        text = cut(text, MAX_TRAIN_CHARS)
        if acceptable(text):
            more = training_only or used[domain] >= cap
            used[domain] += len(text)
            documents.append(Document(domain, source_of(package, name), name, text, more))
    return package, documents, info


def cut(text: str, limit: int) -> str:
    """At most ``limit`` characters, ending with a line."""
    if len(text) <= limit:
        return text
    return text[: max(text.rfind("\n", 0, limit) + 1, limit // 2)]


# ----------------------------------------------------------------------------------------------- duplicates

WORD = re.compile(r"[a-z_]+|[^\sa-z_0-9]")
SHINGLE = 10
SAMPLE = 8  # one shingle in this many is kept
SHARED = 2  # kept shingles that a document may share with the held-out ones by chance


def shingles(text: str) -> tuple[int, set[int]]:
    """The number of the normalised text, and a sample of its hashed word shingles (digits and spacing ignored)."""
    words = WORD.findall(text.lower())
    ids = [hash_word(w) for w in words]
    mask = (1 << 61) - 1
    sample = set()
    power = pow(1_000_003, SHINGLE, mask)
    rolling = 0
    for index, value in enumerate(ids):
        rolling = (rolling * 1_000_003 + value) % mask
        if index >= SHINGLE:
            rolling = (rolling - ids[index - SHINGLE] * power) % mask
        if index >= SHINGLE - 1 and (rolling * 0x9E3779B97F4A7C15 >> 20) % SAMPLE == 0:
            sample.add(rolling)
    return digest(" ".join(words)), sample


_WORDS: dict[str, int] = {}


def hash_word(word: str) -> int:
    """A stable number of a word, remembered."""
    value = _WORDS.get(word)
    if value is None:
        value = _WORDS[word] = digest(word) >> 3
    return value


def _shingles_of(document: Document) -> tuple[int, set[int]]:
    return shingles(document.text)


# ----------------------------------------------------------------------------------------------- split


def may_hold(source: str) -> bool:
    """Whether documents of this source may be held out, hence committed."""
    package = source.split("/")[0]
    if package.startswith("librust-"):
        return package not in CRATES_NOT_HELD
    return bool(PERMISSIVE.get(package))


def licence_of(source: str, infos: dict[str, dict[str, str]]) -> str:
    """The licence of a source that may be held out: of a crate what its copyright file says, else as entered above."""
    package = source.split("/")[0]
    return infos[package]["main"] if package.startswith("librust-") else str(PERMISSIVE[package])


def may_commit(row: dict[str, object]) -> bool:
    """Whether a held-out document may be kept in the repository."""
    name = f"{row['source']} {row['path']}"
    return not any(re.match(pattern, name) for pattern in NOT_COMMITTED) and not OTHER_TERMS.search(str(row["text"]))


def split(
    documents: list[Document], infos: dict[str, dict[str, str]], seed: str, jobs: int
) -> tuple[list[Document], list[dict[str, object]]]:
    """Training documents, and held-out records with their overlap with the training text.

    Exact duplicates go first. The held-out documents are a random choice by name plus all of ``UNSEEN``. A training
    document that repeats at least 80 % of its shingles from earlier training documents is dropped. ``overlap`` of a
    held-out document is the share of its shingles that occur in the training text or in a held-out document before it.

    The documents that are only trained on (``more``) come last. None is taken that repeats more than ``SHARED`` of the kept
    shingles which the held-out documents had to themselves, so that more training text does not wear the held-out text
    down; what it still has in common with them counts in ``overlap``.
    """
    documents = sorted(documents, key=lambda d: (d.more, digest(seed, d.source, d.path)))
    with multiprocessing.Pool(jobs) as pool:
        prints = pool.map(_shingles_of, documents, chunksize=64)
    exact: set[int] = set()
    train: list[Document] = []
    held: list[tuple[Document, set[int], bool]] = []
    seen: set[int] = set()
    own: set[int] | None = None
    for document, (number, sample) in zip(documents, prints, strict=True):
        if number in exact or not sample:
            continue
        exact.add(number)
        if document.more:
            if own is None:
                own = set[int]().union(*(s for _, s, _ in held)) - seen
            alone = document.source not in UNSEEN and len(sample & own) <= SHARED
            if alone and len(sample & seen) < 0.8 * len(sample):
                train.append(document)
                seen |= sample
            continue
        unseen = document.source in UNSEEN
        held_out = may_hold(document.source) and unit(seed, "split", document.path) < HELD_SHARE[document.domain]
        if unseen or held_out:
            held.append((document, sample, unseen))
        elif len(sample & seen) < 0.8 * len(sample):
            train.append(document)
            seen |= sample
    records: list[dict[str, object]] = []
    earlier: set[int] = set()
    for document, sample, unseen in held:
        overlap = sum(1 for s in sample if s in seen or s in earlier) / len(sample)
        earlier |= sample
        records.append({
            "domain": document.domain, "source": document.source, "licence": licence_of(document.source, infos),
            "path": document.path, "split": "unseen-source" if unseen else "seen-source",
            "overlap": round(overlap, 3), "text": cut(document.text, MAX_HELD_CHARS),
        })  # fmt: skip
    return train, records


def write_jsonl(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def take(rows: Iterator[dict[str, object]], budget: int) -> list[dict[str, object]]:
    """Rows until their text fills the budget (in bytes)."""
    chosen, used = [], 0
    while used < budget:
        row = next(rows, None)
        if row is None:
            break
        chosen.append(row)
        used += len(str(row["text"]).encode())
    return chosen


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder for downloads and the training text")
    parser.add_argument("--out", type=Path, default=HERE / "text", help="folder of the jsonl files (default: text/)")
    parser.add_argument("--packages", type=Path, default=HERE / "text" / "packages.txt", help="list of package names")
    parser.add_argument("--suite", default="trixie", help="Debian suite (default: trixie)")
    parser.add_argument("--mirror", default="http://deb.debian.org/debian", help="Debian mirror")
    parser.add_argument("--seed", default="actsparse-1", help="changes the split")
    parser.add_argument("--strict", type=float, default=0.5, help="largest overlap of a committed document")
    parser.add_argument("--committed-bytes", type=int, default=330_000, help="bytes per domain in each jsonl file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    try:
        build(args)
    except (BuildError, OSError) as error:
        print(f"build_text.py: {error}", file=sys.stderr)
        return 2
    return 0


def build(args: argparse.Namespace) -> None:
    """Run all the steps."""
    lines = [line.strip() for line in args.packages.read_text().splitlines()]
    border = lines.index(TRAINING_ONLY) if TRAINING_ONLY in lines else len(lines)
    packages, training_only = ([n for n in part if n and n[0] != "#"] for part in (lines[:border], lines[border:]))
    if twice := [name for name, count in Counter(packages + training_only).items() if count > 1]:
        raise BuildError(f"{args.packages} names {twice[0]} twice")
    args.cache.mkdir(parents=True, exist_ok=True)
    fetch(packages + training_only, args.suite, args.mirror, args.cache.resolve())
    debs = []
    for name in packages + training_only:
        found = sorted((args.cache / "debs").glob(f"{name}_*.deb"))
        if not found:
            raise BuildError(f"no such package in {args.suite}: {name}")
        debs.append(str(found[-1]))
    jobs = list(zip(debs, [False] * len(packages) + [True] * len(training_only), strict=True))
    jobs.sort(key=lambda job: -os.path.getsize(job[0]))
    documents: list[Document] = []
    infos: dict[str, dict[str, str]] = {}
    used: dict[str, Counter[str]] = defaultdict(Counter)
    with multiprocessing.Pool(args.jobs) as pool:
        for package, found_documents, info in pool.imap_unordered(extract, jobs):
            infos[package] = info
            documents += found_documents
            for document in found_documents:
                used[package][document.domain] += len(document.text)
    print("extracted", Counter(d.domain for d in documents), flush=True)
    check_origin(infos)
    train, held = split(documents, infos, args.seed, args.jobs)
    for name, rows in (("training", [asdict(d) for d in train]), ("held-out", held)):
        size: Counter[str] = Counter()
        for row in rows:
            size[str(row["domain"])] += len(str(row["text"]))
        print(name, len(rows), "documents;", {k: f"{v / 1e6:.2f} MB" for k, v in size.items()}, flush=True)
    with lzma.open(args.cache / "train.jsonl.xz", "wt", preset=1, encoding="utf-8") as file:
        for document in train:
            row = {"domain": document.domain, "more": document.more, "text": document.text}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    write_jsonl(args.cache / "heldout.jsonl", held)

    evaluation, calibration, pool_rows = choose(held, args.strict, args.committed_bytes)
    public = ("domain", "split", "source", "licence", "path", "text")
    for name, rows in (("evaluation", evaluation), ("calibration", calibration)):
        rows.sort(key=lambda r: digest(args.seed, name, str(r["path"])))
        write_jsonl(args.out / f"{name}.jsonl", ({k: r[k] for k in public} for r in rows))
        print(name, Counter(str(r["domain"]) for r in rows), Counter(str(r["split"]) for r in rows))
    write_jsonl(args.cache / "taskpool.jsonl", pool_rows)
    print("task pool", Counter(str(r["domain"]) for r in pool_rows))
    write_sources(args, infos, used)


Rows = list[dict[str, object]]


def choose(held: Rows, strict: float, committed_bytes: int) -> tuple[Rows, Rows, Rows]:
    """The evaluation text, the calibration text and the task pool out of the held-out documents.

    They take documents that may be committed and repeat little of the training text. Documents of unseen sources go to
    the evaluation text and the task pool first.
    """
    evaluation, calibration, pool_rows = [], [], []
    for domain in DOMAINS:
        rows = [r for r in held if r["domain"] == domain and float(str(r["overlap"])) <= strict and may_commit(r)]
        new = iter([r for r in rows if r["split"] == "unseen-source"])
        old = iter([r for r in rows if r["split"] == "seen-source"])
        evaluation += take(new, committed_bytes // 2) + take(old, committed_bytes // 2)
        calibration += take(old, committed_bytes)
        pool_rows += [*new, *old]
    return evaluation, calibration, pool_rows


AUDIT = """\
How the licences were established: `apt-get` took every package from the signed index of `main` alone, and the script
checks that no package names another section and that each has a copyright file (of its own, or in the package of the
same source that its folder is a link to). The column `copyright file` has what that file says for `Files: *` where it
is machine-readable. *Read* stands for a file that is not, or that has no such entry: it was read or searched for
other terms by hand. For every package with text in `calibration.jsonl`, `evaluation.jsonl` or `tasks/` the licence in
the third column was compared with the copyright file, entries for single files were matched with the paths used, and
the original files (with the comments that the text no longer has) were searched for notices of other terms. Licences
of crates are taken from the copyright file. This is a check by package and by notice, not a legal opinion on each
document. Of packages that are training text only, the licence names in the last table are all that was looked at.

Of `freebsd-manpages` each page has its own notice: BSD with two or three clauses, six with the advertising clause too,
two with the similar terms of Whistle Communications; four have no notice and fall under the terms of the collection.
The change log of `libuv1-doc` says that the manual is under CC-BY-4.0 (copyright: the libuv project contributors,
https://docs.libuv.org); its copyright file says Expat.

Never committed, though held out:
"""


def write_sources(args: argparse.Namespace, infos: dict[str, dict[str, str]], used: dict[str, Counter[str]]) -> None:
    """``SOURCES.md``: what came from where under which licence."""
    texts = [args.out / "evaluation.jsonl", args.out / "calibration.jsonl"]
    count = [
        Counter(str(json.loads(line)["source"]).split("/")[0] for file in files for line in file.open(encoding="utf-8"))
        for files in (texts, [args.cache / "taskpool.jsonl"])
    ]
    lines = [
        "# Sources of the reference text", "",
        f"Written by `build_text.py`. All packages are from Debian {args.suite} (`main`, {args.mirror}), whose terms",
        "let everyone redistribute them; the full texts of the licences are in each package's",
        "`/usr/share/doc/PACKAGE/copyright`.", "",
        "## In `calibration.jsonl`, `evaluation.jsonl` and the tasks", "",
        "Permissively licensed packages only. The copyright stays with the authors of each package; every line of the",
        "files names its package (`source`), its licence and its path there. The last column counts the documents that",
        "`build_tasks.py` may choose from; it takes about 800 of them.", "", *AUDIT.rstrip("\n").split("\n"), "",
    ]  # fmt: skip
    barred = [*NOT_COMMITTED.items(), (OTHER_TERMS.pattern, "the text itself names other terms (a match in the text)")]
    lines += ["| package and path (regular expression) | why |", "|---|---|"]
    lines += ["| `" + pattern.replace("|", "\\|") + f"` | {reason} |" for pattern, reason in barred]
    lines += ["", "| package | version | licence of the text used | copyright file | texts | task pool |",
              "|---|---|---|---|---|---|"]  # fmt: skip
    for package in sorted(count[0] | count[1]):
        info = infos[package]
        says = info["main"].replace("|", "/") or "*read*"
        says += "" if info["copyright"] == package else f" ({info['copyright']})"
        lines.append(f"| {package} | {info['version']} | {licence_of(package, infos)} | {says} | {count[0][package]} "
                     f"| {count[1][package]} |")  # fmt: skip
    lines += ["", "## Training text (not in this repository)", "",
              "Characters taken before duplicates were removed; licences as the copyright files name them.", "",
              "| package | version | domains (kB) | licences named |", "|---|---|---|---|"]  # fmt: skip
    for package in sorted(used):
        sizes = ", ".join(f"{d} {n // 1000}" for d, n in sorted(used[package].items()))
        licences = infos[package]["licences"].replace("|", "/")
        lines.append(f"| {package} | {infos[package]['version']} | {sizes} | {licences[:160]} |")
    (args.out / "SOURCES.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
