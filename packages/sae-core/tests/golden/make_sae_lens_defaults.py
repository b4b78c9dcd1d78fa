"""Write `sae_lens_defaults.json`: the defaults of SAELens's inference configs, by version, read from unpacked wheels.

    pip download --no-deps sae-lens==6.12.0 && unzip sae_lens-6.12.0-*.whl -d sae_lens-6.12.0
    python make_sae_lens_defaults.py sae_lens-6.0.0 sae_lens-6.12.0 …

The sources are parsed, not imported, so that versions whose dependencies no longer exist can be read too.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any


def config_classes(folder: Path) -> dict[str, ast.ClassDef]:
    found: dict[str, ast.ClassDef] = {}
    for path in (folder / "sae_lens" / "saes").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                found[node.name] = node
    return found


def defaults(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            values |= defaults(classes[base.id], classes)
    for item in node.body:
        if (
            isinstance(item, ast.AnnAssign)
            and isinstance(item.target, ast.Name)
            and isinstance(item.value, ast.Constant)
        ):
            values[item.target.id] = item.value.value
    return values


def architecture(node: ast.ClassDef) -> str | None:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "architecture":
            found = re.search(r"return '([a-z_]+)'", ast.unparse(item))
            return found[1] if found else None
    return None


def main() -> None:
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for folder in map(Path, sys.argv[1:]):
        classes = config_classes(folder)
        version = folder.name.removeprefix("sae_lens-")
        table[version] = {
            name: {key: value for key, value in defaults(node, classes).items() if key not in ("dtype", "device")}
            for node in classes.values()
            if "Training" not in node.name and (name := architecture(node)) is not None
        }
    place = Path(__file__).with_name("sae_lens_defaults.json")
    place.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
