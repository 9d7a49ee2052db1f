"""Measure what our pages say of a CPU's speed: ``python tests/speed_report.py``.

It takes a quarter of an hour of an idle machine and writes docs/reports/DATE-cpu/speed.json;
`tests/test_speed_doc.py`, run as a script, then renews the pages. Every run times both of its
sides, and what the machine can do.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "v4_ascend"]
CONFIG = ROOT / "tests" / "data" / "121m.json"
AGAINST = "--against transformers"
BEHIND = "--chunk 2048 --prompt"
MODELS = {
    "tiny": "--preset tiny --format fp32",
    "121m": "--config {config} --format fp32",
    "121m-fp8-fp4": "--config {quantised} --format fp8",
    "wide-fp8-fp4": "--preset wide --format fp8",
}
RUNS = [
    ("tiny", f"prefill --prompt 512 {AGAINST}"),
    ("tiny", f"decode --prompt 512 {AGAINST}"),
    ("121m", f"prefill --prompt 2048 {AGAINST}"),
    ("121m", f"decode --prompt 2048 {AGAINST}"),
    ("121m", f"decode --prompt 512 --batch 8 {AGAINST}"),
    *(("121m", f"prefill {BEHIND} {n}") for n in (2048, 8192, 16384)),
    *(("121m", f"decode {BEHIND} {n}") for n in (2048, 16384)),
    ("121m-fp8-fp4", f"prefill {BEHIND} 2048"),
    ("121m-fp8-fp4", f"decode {BEHIND} 2048"),
    ("121m-fp8-fp4", "decode --prompt 512 --batch 8"),
    ("wide-fp8-fp4", f"prefill {BEHIND} 2048"),
    ("wide-fp8-fp4", f"decode {BEHIND} 2048"),
    ("wide-fp8-fp4", "decode --prompt 512 --batch 8"),
    ("tiny", "context --batch 1 --batch 8 --plot {plot}"),
]


def quantised(config):
    """The same network with FP8 and FP4 weights, whose rotated part is as wide as caches want."""
    tiny = json.loads((ROOT / "configs" / "models" / "tiny.json").read_text())
    more = {"quantization_config": tiny["quantization_config"], "expert_dtype": "fp4"}
    return config | more | {"qk_rope_head_dim": 64}


def machine():
    """What figures depend on."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    name = next(line for line in cpuinfo.splitlines() if line.startswith("model name"))
    return {
        "cpu": name.partition(":")[2].strip(),
        "cores": os.cpu_count(),
        "avx512": "avx512f" in cpuinfo,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }


def run(words, scratch):
    """Run one, threads spinning on both sides; return its answer."""
    command = [*COMMAND, "bench", *words.split(), "--json"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "OMP_"))}
    out = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=scratch,
        env=environment | {"OMP_WAIT_POLICY": "active"},
    ).stdout  # fmt: skip
    return json.loads(out.splitlines()[-1])["data"]


def main():
    """Measure all and write the report."""
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    folder = ROOT / "docs" / "reports" / f"{date}-cpu"
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        other = Path(scratch) / "quantised.json"
        other.write_text(json.dumps(quantised(json.loads(CONFIG.read_text()))))
        places = {"config": CONFIG, "quantised": other, "plot": ROOT / "docs" / "context.svg"}
        for model, options in MODELS.items():
            words = options.format(**places).split()
            out = Path(scratch) / model
            subprocess.run([*COMMAND, "init", *words, "--out", str(out)], check=True)
        for model, words in RUNS:
            data = run(f"{words.format(**places)} --checkpoint {scratch}/{model}", scratch)
            found.append({"model": model, "bench": words, "data": data})
            sys.stdout.write(f"{model}: bench {words}\n")
            sys.stdout.flush()
    report = {"date": date, "machine": machine(), "models": MODELS, "runs": found}
    (folder / "speed.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
