# SPDX-License-Identifier: Apache-2.0
"""The ``vsa`` command from outside the package ``vsa``, and whether that package is ours.

The distribution ``vsa`` on the package index (0.0.5 and before) is FastVideo's own VSA kernels.
Its files lie under the same import name, so that installing it after this project overwrites
``vsa/__init__.py``, and uninstalling it deletes that file. What tells so, and puts the file back,
cannot lie in ``vsa``.
"""

from __future__ import annotations

import base64
import hashlib
import platform
import sys
from importlib.metadata import Distribution, PackageNotFoundError, PackagePath, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

DISTRIBUTION = "video-sparse-attention"
FOREIGN = "vsa"
"""The distribution whose files have the same import name."""
MARK = "from vsa.installation import"
"""A line that only our own vsa/__init__.py has."""
KEPT = "vsa/_kept_init.txt"
"""A copy of our vsa/__init__.py in what was installed, which no other distribution has."""
MEND = "run: vsa mend (both distributions stay, and import vsa gives this project again)"
PUT_BACK = "run: vsa mend (it puts the file back, and import vsa gives this project again)"
REPAIR = (
    f"run: pip uninstall -y {FOREIGN} {DISTRIBUTION}, then install {DISTRIBUTION} again "
    "(pip install . in its folder)"
)


def digest_of_sources(folder: Path) -> str:
    """A number for what the compiled part is made from, by the contents of all files of csrc/."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".h", ".cpp", ".cu"):
            found.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def installed(name: str) -> Distribution | None:
    """What is installed under the name of a distribution."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def neighbour() -> str | None:
    """The other distribution in words, None where it is not installed."""
    foreign = installed(FOREIGN)
    if foreign is None:
        return None
    about = f" ({foreign.metadata['Summary']})" if "Summary" in foreign.metadata else ""
    return f"{FOREIGN} {foreign.version}{about}"


def overwritten() -> str | None:
    """Why ``import vsa`` does not give this project's own files, in one sentence; None if so."""
    spec = find_spec("vsa")
    theirs = neighbour()
    blame = f"the distribution {theirs}" if theirs else "another distribution"
    if spec is None or spec.origin is None:
        return (
            f"vsa/__init__.py of {DISTRIBUTION} is missing, as after pip uninstall {FOREIGN}, "
            f"which takes what both have written; {PUT_BACK if repair() == MEND else REPAIR}"
        )
    origin = Path(spec.origin)
    others = [path for path in _shared() if path != origin and origin.parent in path.parents]
    changed = [] if MARK in origin.read_text(errors="replace") else [origin]
    changed += others
    if not changed:
        return None
    if not others and theirs and installed(DISTRIBUTION) and _file("vsa/__init__.py") is None:
        return (  # an editable installation, whose files lie in a clone
            f"import vsa gives {origin} of {blame}, which Python finds before the editable "
            f"installation of {DISTRIBUTION}; run: pip uninstall -y {FOREIGN} (no file of this "
            "project goes with it, and import vsa gives this project again)"
        )
    how = REPAIR if others else repair()
    return (
        f"{', '.join(map(str, changed))} was overwritten by {blame}, whose import name is vsa as "
        f"that of {DISTRIBUTION} is; {how}"
    )


def mend() -> str | None:
    """Put our vsa/__init__.py back where the other distribution overwrote or removed it.

    Returns:
        What was done, in one sentence; None where there is no copy of it to put back.

    Raises:
        OSError: the folder cannot be written.
    """
    kept, target = _file(KEPT), _file("vsa/__init__.py")
    if kept is None or target is None or not _as_installed(kept):
        return None
    Path(str(target.locate())).write_bytes(Path(str(kept.locate())).read_bytes())
    theirs = neighbour()
    beside = f", with {theirs} beside it" if theirs else ""
    return f"{target.locate()} is that of {DISTRIBUTION} again{beside}"


def repair() -> str:
    """What to run where ``import vsa`` does not give our files: one command."""
    kept = _file(KEPT)
    return REPAIR if kept is None or not _as_installed(kept) else MEND


def _file(name: str) -> PackagePath | None:
    """A file of ours, as it was recorded when it was installed."""
    ours = installed(DISTRIBUTION)
    recorded = ours.files or () if ours else ()
    return next((path for path in recorded if str(path) == name), None)


def _shared() -> list[Path]:
    """Files that both distributions have written and that hold what the other one wrote."""
    ours, theirs = installed(DISTRIBUTION), installed(FOREIGN)
    if ours is None or theirs is None:
        return []
    names = {str(path) for path in theirs.files or ()}
    both = [path for path in ours.files or () if str(path) in names]
    return [Path(str(path.locate())) for path in both if not _as_installed(path)]


def _as_installed(path: PackagePath) -> bool:
    """Whether a file's contents are those that its distribution recorded."""
    file = Path(str(path.locate()))
    if path.hash is None:
        return True
    if not file.is_file():
        return False
    digest = hashlib.new(path.hash.mode, file.read_bytes()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == path.hash.value


def main() -> None:
    """Entry point of the ``vsa`` script and of ``python -m vsa``."""
    why = overwritten()
    if why is not None and sys.argv[1:] == ["mend"]:
        done = mend()
        why = overwritten()  # more than that file may have been overwritten
        if done is not None and why is None:
            print(f"vsa: {done}")
            return
    if why is None:
        from vsa.cli import main as command

        command()
        return
    refuse(why)


def refuse(why: str) -> NoReturn:
    """End the command with a sentence, ``vsa info`` with what can be told besides."""
    if sys.argv[1:2] == ["info"]:
        print(_facts(why))
    else:
        print(f"vsa: {why}", file=sys.stderr)
    sys.exit(1)


def is_command() -> bool:
    """Whether ``python -m vsa`` is what imports now; ``vsa`` comes before ``vsa.__main__`` then."""
    searching = sys.argv[:1] == ["-m"]  # what argv begins with until the module is found
    return searching and not {"vsa", "-mvsa"}.isdisjoint(sys.orig_argv)


def _facts(why: str) -> str:
    """What ``vsa info`` says where the package cannot be asked."""
    ours, torch = installed(DISTRIBUTION), installed("torch")
    rows = {
        DISTRIBUTION: f"{ours.version}, but not whole: {why}" if ours else f"not installed: {why}",
        "beside it": neighbour() or f"no distribution {FOREIGN} is installed now",
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "PyTorch": torch.version if torch else "not installed",
    }
    return "\n".join(f"{name:24s}{value}" for name, value in rows.items())
