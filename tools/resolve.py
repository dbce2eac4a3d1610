"""The pins: written for every Python and system at once, and tried as a stranger would have them.

    python tools/resolve.py                          can each of them install what constraints.txt says?
    python tools/resolve.py --write --torch 2.13.0   write constraints.txt anew, with the newest of everything else

uv resolves for interpreters and systems that are not here, from the metadata of the public registry: no local index, no
folder of wheels and no cap of this machine counts, for uv reads none of pip's settings. Nothing is installed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINS = ROOT / "constraints.txt"
HEADER = """\
# The versions that the tests and the continuous integration run with: pip install -c constraints.txt …
# Written by `make pins` for all Pythons and systems at once; torch is chosen in the Makefile, which leaves a torch that
# is there already as it is.
"""
SYSTEMS = {
    "Linux x86-64": "x86_64-unknown-linux-gnu",
    "Linux aarch64": "aarch64-unknown-linux-gnu",
    "macOS arm64": "aarch64-apple-darwin",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write constraints.txt anew")
    parser.add_argument("--torch", help="the version of torch to pin; needed with --write")
    options = parser.parse_args()
    if options.write:
        if not options.torch:
            parser.error("--write needs --torch VERSION")
        text = resolved("--universal", "--fork-strategy", "fewest", constraints=f"torch=={options.torch}\n")
        PINS.write_text(HEADER + text)
        print(f"{PINS.name}: {len(text.splitlines())} pins")
    failed = 0
    for python in pythons():
        for system, triple in SYSTEMS.items():
            try:
                found = resolved("--python-platform", triple, python=python).splitlines()
            except subprocess.CalledProcessError as error:
                failed += 1
                print(f"Python {python}, {system}: cannot be installed\n{error.stderr}", file=sys.stderr)
            else:
                print(f"Python {python}, {system}: {len(found)} packages")
    return 1 if failed else 0


def pythons() -> list[str]:
    """The versions that the project names."""
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    versions = (line.rpartition(" ")[2] for line in classifiers if line.startswith("Programming Language :: Python"))
    return [version for version in versions if "." in version]


def resolved(*options: str, python: str | None = None, constraints: str | None = None) -> str:
    """The packages of a full set-up, a line each.

    Raises:
        subprocess.CalledProcessError: there are none that go together; its stderr says why.
    """
    command = ["uv", "--no-config", "pip", "compile", "--quiet", "--extra", "dev", "--no-annotate", "--no-header"]
    command += ["--python-version", python or pythons()[0], "--only-binary", ":all:", *options]
    command += ["--constraint", "-" if constraints is not None else str(PINS), str(ROOT / "pyproject.toml")]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_"))}
    run = subprocess.run(
        [sys.executable, "-m", *command],
        input=constraints,
        env={**plain, "MACOSX_DEPLOYMENT_TARGET": "14.0"},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout


if __name__ == "__main__":
    sys.exit(main())
