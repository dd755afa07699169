"""``SOURCES.md``: what the reference text came from, under which licences."""

from __future__ import annotations

import argparse
import json
from collections import Counter

from .licences import NOT_COMMITTED, OTHER_TERMS, licence_of

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
