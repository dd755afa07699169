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
of their names. The same package versions give the same text. The steps are in ``recipe/corpus``.

Only documents of packages in ``PERMISSIVE`` (MIT, BSD, Apache-2.0, PSF, PostgreSQL and the like) are held out, so only
those reach the files kept in the repository. Every package must come from ``main`` and have a ``copyright`` file.
"""

from __future__ import annotations

import argparse
import json
import lzma
import multiprocessing
import os
import sys
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path

from recipe.corpus.documents import BuildError, Document, digest, write_jsonl
from recipe.corpus.packages import TRAINING_ONLY, check_origin, extract, fetch
from recipe.corpus.sources import write_sources
from recipe.corpus.split import choose, split

HERE = Path(__file__).resolve().parent


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


if __name__ == "__main__":
    sys.exit(main())
