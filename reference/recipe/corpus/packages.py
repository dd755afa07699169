"""Debian packages: fetching them, what their copyright files say, and the documents in them."""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

from .documents import MAX_HELD_CHARS, BuildError, Document, cut, digest
from .plaintext import acceptable, decode, tidy, to_text

# Characters kept of one document in training.
MAX_TRAIN_CHARS = 32_000
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
