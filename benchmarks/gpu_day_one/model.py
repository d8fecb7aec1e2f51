# SPDX-License-Identifier: Apache-2.0
"""A whole model on one GPU: moeshard.shard against HuggingFace, what report and profile say, a layer as a CUDA graph.

python model.py [RESULTS.json]

The weights are random, those of every rank's seed: shapes are Switch base's (768 x 3072), four layers of 32 experts.
"""

import copy
import json
import statistics
import sys
import time

import torch
from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

import moeshard


def make_model():
    """An encoder in eval mode on the GPU, float32."""
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=1000, d_model=768, d_kv=64, num_heads=12, d_ff=3072, num_layers=8, num_sparse_encoder_layers=4,
        num_experts=32, expert_capacity=64,
    )  # fmt: skip
    return SwitchTransformersEncoderModel(config).eval().cuda()


def inputs(size, length):
    """Token ids, a third of them padding."""
    seed = torch.Generator("cuda").manual_seed(size)
    ids = torch.randint(2, 1000, (size, length), device="cuda", generator=seed)
    mask = (
        torch.arange(length, device="cuda") < length - length * torch.arange(size, device="cuda")[:, None] // (2 * size)
    ).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def outputs(model, batch):
    """The last hidden states, and what every router chose."""
    chosen = []
    hooks = [
        module.register_forward_hook(
            # transformers before 5.18 returns it second, and of tokens in one row
            lambda *call: chosen.append(
                next(each for each in call[2] if not each.is_floating_point()).reshape(batch["input_ids"].shape[0], -1)
            )
        )
        for module in model.modules()
        if isinstance(module, SwitchTransformersTop1Router)
    ]
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    for hook in hooks:
        hook.remove()
    return hidden, chosen


def difference(before, after):
    """Largest difference relative to the largest value, over sequences whose routing did not flip; how many did."""
    flipped = torch.zeros(before[0].shape[0], dtype=torch.bool, device="cuda")
    for one, other in zip(before[1], after[1], strict=True):
        flipped |= (one != other).any(1)
    kept = ~flipped
    worst = (before[0][kept] - after[0][kept]).abs().max() / before[0].abs().max()
    return float(worst), int(flipped.sum())


def milliseconds(model, batch, repeats=15):
    """Median of a forward pass, by the clock of the host after the device has finished."""
    times = []
    with torch.inference_mode():
        for _ in range(repeats):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            model(**batch)
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[3:])


def check_graph(layer):
    """A captured layer, replayed with new data, against a call: the same bits, and its slots are counted."""
    hidden = torch.randn(500, 768, device="cuda", dtype=torch.bfloat16)
    index = torch.randint(0, 8, (500, 2), device="cuda")
    weights = torch.rand(500, 2, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.inference_mode():
        layer(hidden, index, weights)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = layer(hidden, index, weights)
        layer.reset_counts()
        for seed in range(3):
            torch.manual_seed(seed)
            hidden.normal_()
            index.random_(0, 8)
            weights.uniform_()
            graph.replay()
            torch.cuda.synchronize()
            replayed = out.clone()
            called = layer(hidden, index, weights)
            if not torch.equal(replayed.view(torch.int16), called.view(torch.int16)):
                return "the replay has other bits"
    if layer.slots != 6 * 1000 or int(layer.counts.sum()) != 6 * 1000:
        return f"counted {layer.slots} slots, {int(layer.counts.sum())} with an expert, expected 6000"
    return ""


def main(path=None):
    """Run all, print, and return whether something is wrong."""
    torch.backends.cuda.matmul.allow_tf32 = False
    whole, result, wrong = make_model(), {"device": torch.cuda.get_device_name(0)}, []
    sharded = moeshard.shard(copy.deepcopy(whole), progress=False)
    batch = inputs(16, 120)
    exact = outputs(copy.deepcopy(whole).double(), batch)
    (theirs, flipped_theirs), (ours, flipped) = (difference(exact, outputs(model, batch)) for model in (whole, sharded))
    result["float32"] = {"error": ours, "huggingface_error": theirs, "sequences_with_flips": flipped}
    print(
        f"float32 against the model in float64: largest error {ours:.1e} of the largest value, "
        f"HuggingFace's own {theirs:.1e}; sequences of 16 with another choice: {flipped}, {flipped_theirs}"
    )
    if ours > 1.5 * theirs + 1e-6 or flipped > flipped_theirs + 1:
        wrong.append("float32 is further from float64 than HuggingFace is")
    back = moeshard.unshard(sharded)
    if any(
        not torch.equal(one, other)
        for one, other in zip(back.state_dict().values(), whole.state_dict().values(), strict=True)
    ):
        wrong.append("unshard gave other weights")
    whole, back = whole.bfloat16(), back.bfloat16()
    sharded = moeshard.shard(back, progress=False)
    for size in (2, 16, 128):
        batch = inputs(size, 120)
        times = [milliseconds(model, batch) for model in (whole, sharded)]
        result[f"bfloat16, {size} x 120 tokens"] = {"huggingface_ms": times[0], "moeshard_ms": times[1]}
        print(
            f"bfloat16, {size} x 120 tokens: HuggingFace {times[0]:.2f} ms, moeshard {times[1]:.2f} ms a forward pass"
        )
    print(moeshard.report(sharded))
    with moeshard.profile(sharded) as profile, torch.inference_mode():
        for _ in range(5):
            sharded(**batch)
    print(profile)
    result["profile"] = [
        {"layer": row.layer, "calls": row.calls, "ms": {step: 1e3 * s / row.calls for step, s in row.seconds.items()},
         "router_ms": 1e3 * row.router_seconds / row.calls, "of_roofline": row.of_roofline}
        for row in profile.rows
    ]  # fmt: skip
    layer = moeshard.ShardedExperts.from_weights(
        torch.randn(8, 3072, 768, device="cuda", dtype=torch.bfloat16) * 768**-0.5,
        torch.randn(8, 768, 3072, device="cuda", dtype=torch.bfloat16) * 3072**-0.5,
    )
    wrong += [text] if (text := check_graph(layer)) else []
    print(f"CUDA graph of a layer: {text or 'replays have the bits of calls, and are counted'}")
    print("; ".join(wrong) or "all ok")
    if path:
        with open(path, "w") as file:
            json.dump(result, file, indent=1)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
