# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of loading a checkpoint: moeshard.from_pretrained against transformers' own, for the same bytes.

    python benchmarks/loading.py --experts 64 --layers 8 --json benchmarks/results/loading.json

Every measurement is made in processes of its own, in turns, with the file in the page cache (--cold: not in it; what
the disk's own host still has is out of reach). A case:

hf          cls.from_pretrained(path), which maps the file: nothing has been read yet when it returns
hf read     the same, then one byte of every page of every weight is looked at, so that the model is in memory
hf shard    moeshard.shard(cls.from_pretrained(path))
moeshard    moeshard.from_pretrained(cls, path)

"First" is the time from the start to the outputs of 8 x 128 tokens, when nothing is left to be put off. "System" is
what the kernel took of the loading, over all threads. The first touch of memory can cost a virtual machine twenty times
as much where its host has to find the memory: each process therefore touches as much as it may need, and gives it back,
right before it is timed (--untouched: it does not). Peak is VmHWM less what the process had before; its bound is 1.1
times the final size (this rank's packed columns and the other weights) plus one expert. After the times, the model's
first outputs are compared: all cases must agree.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

CASES = ("hf", "hf read", "hf shard", "moeshard")


def write_checkpoint(folder: Path, dtype: str, **sizes: int) -> int:
    """A Switch encoder with random weights, written without ever being in memory. Returns its bytes."""
    import torch
    from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel

    from moeshard.checkpoint import WEIGHTS, Writer

    config = SwitchTransformersConfig(**sizes)
    config.architectures, config.dtype = ["SwitchTransformersEncoderModel"], dtype
    with torch.device("meta"):
        state = SwitchTransformersEncoderModel(config).state_dict()
    state.pop("encoder.embed_tokens.weight", None)  # tied
    kind = getattr(torch, dtype)
    writer = Writer(folder, {name: (t.shape, kind) for name, t in state.items()}, {WEIGHTS: list(state)}, {})
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        writer.write(name, (torch.randn(tensor.shape, generator=generator) * 0.05).to(kind))
    config.save_pretrained(writer.staging)
    writer.commit()
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def page_cache(folder: Path, *, cold: bool) -> None:
    """Bring a checkpoint into the page cache, or put it out."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            if cold:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while opened.read(1 << 24):
                    pass


def status(field: str) -> int:
    """A field of this process's memory, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def use_memory(size: int) -> None:
    """Touch so many bytes of new memory and give them back, so that the host of a virtual machine has them ready."""
    if size:
        with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            memory.madvise(mmap.MADV_HUGEPAGE)
            for at in range(0, size, mmap.PAGESIZE):
                memory[at] = 1


def measure(case: str, folder: str, small: str, touched: int) -> dict[str, Any]:
    """Load once, on this rank; what it took."""
    import gc
    import warnings

    import torch
    from transformers import SwitchTransformersEncoderModel as Model
    from transformers.utils import logging

    import moeshard
    from moeshard.memory import return_freed_memory

    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    group = moeshard.init()

    def load(path: str) -> Any:
        if case == "moeshard":
            return moeshard.from_pretrained(Model, path, progress=False)
        model = Model.from_pretrained(path, dtype="auto")
        if case == "hf read":
            for parameter in model.parameters():
                parameter.detach().view(-1).view(torch.uint8)[::4096].sum()
        return moeshard.shard(model, progress=False) if case == "hf shard" else model

    load(small)  # imports and first calls
    gc.collect()
    return_freed_memory()
    use_memory(touched)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts afresh
    group.barrier()
    start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_stime
    model = load(folder)
    group.barrier()
    seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_stime - used
    peak, after = status("VmHWM") - before, status("VmRSS") - before
    tokens = torch.randint(2, model.config.vocab_size, (8, 128), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(input_ids=tokens)
    group.barrier()
    first = time.perf_counter() - start
    layers = [module for module in model.modules() if isinstance(module, moeshard.ShardedExperts)]
    others = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    with torch.inference_mode():
        outputs = model(input_ids=torch.arange(2, 18)[None]).last_hidden_state.float().sum(-1)[0, :4]
    config = model.config
    expert = 2 * config.d_model * config.d_ff * next(model.parameters()).dtype.itemsize
    return {
        "seconds": seconds,
        "system": used,
        "first": first,
        "peak": peak,
        "after": after,
        "final": others + sum(layer.packed.nbytes for layer in layers),
        "expert": expert,
        "outputs": outputs.tolist(),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    """Measure every case with every number of ranks."""
    import moeshard
    from moeshard.doctor import machine, versions

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4, help="half of them have experts")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="take the checkpoint out of the page cache before each run")
    parser.add_argument("--untouched", action="store_true", help="do not touch memory before each run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        large, small = Path(made) / "large", Path(made) / "small"
        sizes = {"num_layers": options.layers, "num_sparse_encoder_layers": options.layers // 2}
        size = write_checkpoint(large, options.dtype, num_experts=options.experts, d_ff=3072, **sizes)
        write_checkpoint(small, options.dtype, num_experts=2, d_ff=64, num_layers=2, num_sparse_encoder_layers=1)
        touched = 0 if options.untouched else size
        rows = []
        for count in options.ranks:
            found: dict[str, list[list[dict[str, Any]]]] = {case: [] for case in CASES}
            for repeat in range(options.repeats):
                for case in CASES if repeat % 2 == 0 else reversed(CASES):
                    page_cache(large, cold=options.cold)
                    with moeshard.launch(count, timeout=300) as ranks:
                        found[case].append(ranks.run(measure, case, str(large), str(small), touched))
            right = found["hf"][0][0]["outputs"]
            for case, runs in found.items():
                last = [rank for run in runs for rank in run]
                for rank in last:
                    error = max(abs(a - b) for a, b in zip(rank["outputs"], right, strict=True))
                    if error > 0.05 * max(map(abs, right)):
                        raise SystemExit(f"{case} on {count} ranks: outputs differ by {error}")
                rows.append(
                    {
                        "case": case,
                        "ranks": count,
                        "seconds": statistics.median(max(rank["seconds"] for rank in run) for run in runs),
                        "all_seconds": [round(max(rank["seconds"] for rank in run), 3) for run in runs],
                        "first": statistics.median(max(rank["first"] for rank in run) for run in runs),
                        "system": statistics.median(max(rank["system"] for rank in run) for run in runs),
                        "peak": max(rank["peak"] for rank in last),
                        "after": max(rank["after"] for rank in last),
                        "final": max(rank["final"] for rank in last),
                        "expert": last[0]["expert"],
                        "load": max(rank["load"] for rank in last),
                    }
                )
                print(line(rows[-1]), flush=True)
    if options.json is not None:
        facts = {
            "checkpoint_bytes": size,
            "experts": options.experts,
            "layers": options.layers,
            "dtype": options.dtype,
            "repeats": options.repeats,
            "cold": options.cold,
            "untouched": options.untouched,
            "machine": machine(),
            "versions": versions(),
            "rows": rows,
        }
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    bound = 1.1 * row["final"] + row["expert"]
    return (
        f"{row['case']:9} {row['ranks']} ranks  {row['seconds']:6.2f} s (system {row['system']:5.2f})  "
        f"first {row['first']:6.2f} s  peak {row['peak'] / 2**20:8.0f} MiB  "
        f"after {row['after'] / 2**20:8.0f} MiB  final size {row['final'] / 2**20:8.0f} MiB  "
        f"peak/bound {row['peak'] / bound:5.2f}  load {row['load']:4.1f}"
    )


if __name__ == "__main__":
    main()
