"""`python -m tests.oldest`: the oldest series that pyproject.toml allows, as a constraints file."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
groups = [project["dependencies"], *project["optional-dependencies"].values()]
for requirement in sorted({r for group in groups for r in group}):
    found = re.match(r"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)", requirement)
    if found:
        print(f"{found[1]}=={found[2]}.*")
