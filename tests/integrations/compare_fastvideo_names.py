# SPDX-License-Identifier: Apache-2.0
"""What FastVideo calls the parameters of diffusers' checkpoints: compare the facts with a wheel.

    pip download --no-deps fastvideo==0.2.1
    python tests/integrations/compare_fastvideo_names.py fastvideo-0.2.1-py3-none-any.whl

Outside of the suite, which has no network. With --write it writes the facts anew.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from pathlib import Path

FACTS = Path(__file__).parent / "fastvideo_names.json"
CONFIGS = {
    "Wan": ("fastvideo/configs/models/dits/wanvideo.py", "WanVideoArchConfig"),
    "MiniMax-H3": ("fastvideo/configs/models/dits/minimax_h3.py", "MiniMaxH3ArchConfig"),
}


def mapping(source: str, name: str) -> dict[str, str]:
    """The regular expressions of a configuration class, in their order."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and ast.unparse(field.target) == (
                    "param_names_mapping"
                ):
                    factory = field.value.keywords[0].value  # field(default_factory=lambda: {...})
                    return ast.literal_eval(factory.body)
    raise SystemExit(f"{name} has no param_names_mapping any more")


def renamed(name: str, rules: dict[str, str]) -> str:
    """A name by the first rule that matches."""
    numbered = name.replace(".N.", ".0.")
    for pattern, replacement in rules.items():
        if re.match(pattern, numbered):
            numbered = re.sub(pattern, replacement, numbered)
            break
    return numbered.replace("blocks.0.", "blocks.N.")


def main(wheel: str, write: bool) -> None:
    """Compare, or write."""
    known = json.loads(FACTS.read_text())
    found: dict[str, object] = {"fastvideo": Path(wheel).name.split("-")[1]}
    with zipfile.ZipFile(wheel) as opened:
        for title, (path, name) in CONFIGS.items():
            rules = mapping(opened.read(path).decode(), name)
            found[title] = {each: renamed(each, rules) for each in known[title]}
    if write:
        FACTS.write_text(json.dumps(found, indent=1) + "\n")
    for title in CONFIGS:
        for each, own in found[title].items():
            if known[title][each] != own:
                print(f"{title}: {each} is now {own}, but the facts say {known[title][each]}")
    print(f"compared with fastvideo {found['fastvideo']}")


if __name__ == "__main__":
    main(sys.argv[1], "--write" in sys.argv)
