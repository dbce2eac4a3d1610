"""Run the demo, keep its numbers, and put them and a picture of its report into the README.

    python benchmarks/demo.py            # about five minutes; wants an otherwise idle machine
    python benchmarks/demo.py --render   # only write the README's block again from the kept numbers

The numbers go to ``benchmarks/results/demo.json`` with the machine, the versions and the load; the README's block
between its two markers is written from that file and from nothing else, and a test holds the two together. The picture
needs Chromium.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "demo.json"
PICTURE = ROOT / "docs" / "report.png"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def measure() -> None:
    """Run ``halfstep demo`` in a temporary folder and keep comparison, environment and picture."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "halfstep", "demo", "--json", "--output", "demo"]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode not in (0, 1):
            sys.exit(f"the demo failed with exit code {done.returncode}")
        runs = sorted(Path(folder, "demo").glob("*.jsonl"))
        headers = [json.loads(path.read_text().splitlines()[0]) for path in runs]
        result = {
            "command": "halfstep demo",
            "started": min(header["started"] for header in headers),
            "environment": headers[0]["environment"],
            "load_at_start_of_runs": [header["environment"]["load"] for header in headers],
            "comparison": json.loads(done.stdout),
        }
        RESULTS.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
        picture(Path(folder, "demo", "report.html"))


def picture(report: Path) -> None:
    """Photograph the top of the report."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("no Chromium here: the picture was not renewed")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,1380"]
    command = [browser, *flags, f"--screenshot={PICTURE}", report.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def block(result: dict[str, Any]) -> str:
    """The README's block: verdict, table, conditions, picture."""
    environment, comparison = result["environment"], result["comparison"]
    steps = max(p["speed"]["timed_steps"] for p in comparison["policies"] if p["speed"])
    lines = [
        f"`halfstep demo` on {environment['cpu_count']} cores of {environment['device']} "
        f"({environment['device_detail']}), PyTorch {environment['torch']}, {result['started'][:10]}, "
        f"{comparison['seeds']} seeds, {steps} timed steps per policy:",
        "",
        "| policy | ms per step (quartiles) | speed-up (95 %) | memory at the peak | loss difference (90 %) "
        "| same loss? |",
        "|---|---|---|---|---|---|",
        *map(_row, comparison["policies"]),
        "",
        *(f"> {paragraph}\n>" for paragraph in comparison["verdict"].split("\n") if paragraph.strip()),
        "",
        "![The report that the demo writes: verdict, table, loss curves, step times, memory](docs/report.png)",
    ]
    return "\n".join(lines).replace(">\n\n", "\n")


def _row(policy: dict[str, Any]) -> str:
    speed, quality = policy["speed"], policy["quality"][0]
    low, high = (f"{1000 * q:.0f}" for q in speed["quartiles_seconds"])
    ratio, difference = speed["speed_up"], quality["difference"]
    cells = [
        f"`{policy['policy']}`",
        f"{1000 * speed['median_seconds']:.0f} ({low}–{high})",
        f"**{ratio['estimate']:.2f}×** ({ratio['low']:.2f}–{ratio['high']:.2f})" if ratio else "baseline",
        f"{policy['peak_bytes'] / 2**20:.0f} MiB"
        + (f" ({100 * policy['memory_ratio']:.0f} %)" if ratio and policy["memory_ratio"] else ""),
        f"{difference['estimate']:+.4f} ({difference['low']:+.4f} to {difference['high']:+.4f})" if difference else "",
        quality["verdict"] or f"spread from seed to seed: {quality['seed_spread']:.3f}",
    ]
    return "| " + " | ".join(cells) + " |"


def render(readme: str, result: dict[str, Any]) -> str:
    """The README with its block written anew."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{block(result)}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--render", action="store_true", help="only write the README's block again")
    if not parser.parse_args().render:
        measure()
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text(), json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
