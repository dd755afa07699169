"""Which documents may be held out, hence committed, and under which licence."""

from __future__ import annotations

import re

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
