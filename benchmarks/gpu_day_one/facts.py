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


def copy_rate():
    """Bytes a second, read and written, of a copy of 4 GiB."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / seconds(lambda: target.copy_(source))


def product_rate(n=8192):
    """FLOP/s of an n^3 product of random bfloat16 matrices."""
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / seconds(lambda: torch.matmul(a, b, out=out), 30)


def main(path):
    """Measure, print, and write the file."""
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,memory.total"
    try:
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv"], capture_output=True, text=True
        ).stdout
    except OSError as error:
        said = str(error)
    print(said)
    device = torch.cuda.get_device_properties(0)
    copy, product = copy_rate(), product_rate()
    facts = {
        "device": device.name,
        "multiprocessors": device.multi_processor_count,
        "l2_bytes": device.L2_cache_size,
        "torch": torch.__version__,
        "nvidia_smi": said,
        "copy_bytes_per_second": copy,
        "bfloat16_flops": product,
    }
    with open(path, "w") as file:
        json.dump(facts, file, indent=1)
    print(f"copy {copy / 1e9:.0f} GB/s (read + written), bfloat16 8192^3 {product / 1e12:.0f} TFLOP/s")


if __name__ == "__main__":
    main(sys.argv[1])
