# SPDX-License-Identifier: Apache-2.0
"""The device, and its two ceilings: bytes a second of a large copy, bfloat16 products of torch's matmul.

python facts.py FACTS.json
"""

import json
import statistics
import subprocess
import sys

import torch


def seconds(run, repeats=10):
    """Median time of `run`, by CUDA events."""
    run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def main(path):
    """Measure, print, and write the file."""
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,memory.total"
    said = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv"], capture_output=True, text=True)
    print(said.stdout)
    device = torch.cuda.get_device_properties(0)
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() * 4 / seconds(lambda: target.copy_(source))
    del source, target
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    product = 2 * n**3 / seconds(lambda: torch.matmul(a, b, out=out), 30)
    facts = {
        "device": device.name,
        "multiprocessors": device.multi_processor_count,
        "l2_bytes": device.L2_cache_size,
        "torch": torch.__version__,
        "nvidia_smi": said.stdout,
        "copy_bytes_per_second": copy,
        "bfloat16_flops": product,
    }
    with open(path, "w") as file:
        json.dump(facts, file, indent=1)
    print(f"copy {copy / 1e9:.0f} GB/s (read + written), bfloat16 8192^3 {product / 1e12:.0f} TFLOP/s")


if __name__ == "__main__":
    main(sys.argv[1])
