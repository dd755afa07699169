"""An environment at one end of the ranges that pyproject.toml declares, laid over the locked one in seconds.

    .venv/bin/python .ci/environment.py {oldest,newest} FOLDER

``oldest`` has the lower bound of every dependency, ``newest`` the newest release inside the range on this day. Only what
differs from the locked environment is installed into FOLDER; the rest, torch above all, it sees in the locked one, whose Python
runs this.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
# torch comes in builds of gigabytes, and one release of it is declared.
AS_LOCKED = "torch"


def main() -> None:
    """Make the folder anew and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("end", choices=["oldest", "newest"])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    declared = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    wanted = [requirement for requirement in declared if not requirement.startswith(AS_LOCKED)]
    shutil.rmtree(options.folder, ignore_errors=True)
    venv.create(options.folder, symlinks=True)
    python = options.folder / "bin" / "python"
    shared = Path(sysconfig.get_path("purelib"))
    own = options.folder / shared.relative_to(sys.prefix)
    # Added behind the folder's own packages, so these win; and read like a site folder, so editable installations work.
    (own / "locked.pth").write_text(f"import site; site.addsitedir({str(shared)!r})\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install"]
    newest = ["--upgrade", "--upgrade-strategy", "only-if-needed"]
    arguments = [lower_bound(each) for each in wanted] if options.end == "oldest" else [*newest, *wanted]
    # Not shown unless it fails: pip complains about tools of the locked environment that nothing here runs.
    done = subprocess.run([*pip, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout)
    installed = sorted(path.name.removesuffix(".dist-info") for path in own.glob("*.dist-info"))
    print(f"{options.end}: {' '.join(installed) or 'the same as locked'}")


def lower_bound(requirement: str) -> str:
    """``name==1.2`` of ``name>=1.2,<1.5``."""
    found = re.fullmatch(r"([\w-]+)>=([\w.]+)(?:,.*)?", requirement)
    if not found:
        raise SystemExit(f"{PYPROJECT.name}: {requirement!r} has no lower bound")
    return f"{found[1]}=={found[2]}"


if __name__ == "__main__":
    main()
