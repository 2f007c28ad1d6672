"""Real text for the examples, read where they run: Python sources as bytes.

Training text is what is installed (site-packages). Held-out text is the standard library. A package file that repeats
even four consecutive lines of the standard library (backports, vendored copies) is left out of the training text.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import site
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SEPARATOR = b"\0"  # between files; no Python source contains it
PACKAGE_FOLDERS = frozenset({"site-packages", "dist-packages"})
NOT_LIBRARY_CODE = frozenset({"test", "tests", "idle_test", "__pycache__"})
COPIED_LINES = 4

# Every public single-file module that has at least 16,384 bytes in each CPython from 3.10 to 3.13, by name.
HELD_OUT_MODULES = tuple(
    """argparse ast base64 bdb calendar codecs compileall configparser contextlib dataclasses difflib dis doctest enum
    fractions ftplib functools gettext gzip heapq imaplib inspect ipaddress locale mailbox mimetypes modulefinder ntpath
    optparse os pdb pickle pickletools pkgutil platform plistlib pprint profile pstats pydoc random selectors shutil
    site smtplib socket socketserver ssl statistics subprocess tarfile tempfile textwrap threading tokenize trace
    traceback tracemalloc turtle typing uuid warnings wave weakref webbrowser zipimport""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class TrainingText:
    """`data` is uint8 [bytes]: the files, each followed by a separator, in the order of their SHA-256."""

    data: np.ndarray
    files: int
    copies_left_out: int
    package_bytes: dict[str, int]
    sha256: str


def standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib")).resolve()


def package_roots() -> list[Path]:
    """The site-packages and dist-packages folders this interpreter imports from, without the ones inside others."""
    candidates = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    candidates += site.getsitepackages() + [entry for entry in sys.path if Path(entry).name in PACKAGE_FOLDERS]
    folders = sorted({Path(path).resolve() for path in candidates if path and os.path.isdir(path)})
    return [folder for folder in folders if not any(other in folder.parents for other in folders)]


def _python_files(root: Path, skipped: frozenset[str]) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped]
        paths = (Path(folder, name) for name in names if name.endswith(".py"))
        yield from (path for path in paths if path.is_file())  # not a broken link


def _line_runs(source: bytes) -> set[int]:
    """A hash of every run of `COPIED_LINES` consecutive lines. Lines of at most three characters do not count."""
    lines = [line for line in map(bytes.strip, source.splitlines()) if len(line) > 3]
    return set(map(hash, zip(*(lines[start:] for start in range(COPIED_LINES)), strict=False)))


def _package_of(path: Path, roots: Sequence[Path]) -> str:
    root = next(root for root in roots if root in path.parents)
    return path.relative_to(root).parts[0].removesuffix(".py")


def training_text(limit_bytes: int) -> TrainingText:
    """The deduplicated Python sources of the installed packages, at most `limit_bytes` of them.

    The order, and with it what the limit keeps, depends on the contents alone, not on the file system.
    """
    library = standard_library()
    roots = package_roots()
    skipped = frozenset({"__pycache__"})
    paths = sorted(path for root in roots for path in _python_files(root, skipped))
    with ThreadPoolExecutor(16) as pool:
        library_files = _python_files(library, NOT_LIBRARY_CODE | PACKAGE_FOLDERS)
        library_runs = set().union(*map(_line_runs, pool.map(Path.read_bytes, library_files)))
        sources = {
            hashlib.sha256(source).digest(): (path, source)
            for path, source in zip(paths, pool.map(Path.read_bytes, paths), strict=True)
        }

    chosen: list[bytes] = []
    packages: Counter[str] = Counter()
    size = copies = 0
    for _, (path, source) in sorted(sources.items(), key=lambda item: item[0]):
        if not source or SEPARATOR in source:
            continue
        if size + len(source) + 1 > limit_bytes:
            break
        if not library_runs.isdisjoint(_line_runs(source)):
            copies += 1
            continue
        chosen.append(source)
        packages[_package_of(path, roots)] += len(source)
        size += len(source) + 1
    joined = b"".join(itertools.chain.from_iterable((source, SEPARATOR) for source in chosen))
    data = np.frombuffer(joined, dtype=np.uint8)
    return TrainingText(data, len(chosen), copies, dict(packages.most_common()), hashlib.sha256(joined).hexdigest())


def held_out_text(length: int, count: int | None = None) -> dict[str, bytes]:
    """The first `length` bytes of held-out standard library modules: `count` of them, evenly spaced by name.

    Raises ValueError when fewer than `count` modules are that long; None takes all that are.
    """
    paths = {name: standard_library() / f"{name}.py" for name in HELD_OUT_MODULES}
    long_enough = [name for name, path in paths.items() if path.is_file() and path.stat().st_size >= length]
    wanted = len(long_enough) if count is None else count
    if not 1 <= wanted <= len(long_enough):
        raise ValueError(
            f"the number of held-out modules must be between 1 and {len(long_enough)}, all that have {length} bytes in "
            f"this standard library; got {wanted}"
        )
    chosen = [long_enough[index * len(long_enough) // wanted] for index in range(wanted)]
    return {name: paths[name].read_bytes()[:length] for name in chosen}
