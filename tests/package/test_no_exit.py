# SPDX-License-Identifier: Apache-2.0
"""The build refuses a library that can end the process: findings/device_call_in_template.sh."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "third_party" / "no_exit.cmake"
TOOLS = {name: shutil.which(name) for name in ("cmake", "nm", "c++")}
pytestmark = pytest.mark.skipif(None in TOOLS.values(), reason="cmake, nm or c++ is missing")


@pytest.mark.parametrize(
    ("body", "refused"),
    [("::exit(1);", True), ('std::fputs("exit", stderr);', False), ("std::atexit(f);", False)],
)
def test_a_library_that_calls_exit_is_refused(tmp_path: Path, body: str, refused: bool) -> None:
    source, library = tmp_path / "f.cpp", tmp_path / "f.so"
    source.write_text(f'#include <cstdio>\n#include <cstdlib>\nextern "C" void f() {{ {body} }}\n')
    subprocess.run([TOOLS["c++"], "-shared", "-fPIC", source, "-o", library], check=True)
    command = [TOOLS["cmake"], f"-DNM={TOOLS['nm']}", f"-DLIBRARY={library}", "-P", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode != 0) == refused
    assert ("mark the function VSA_HD" in " ".join(done.stderr.split())) == refused
