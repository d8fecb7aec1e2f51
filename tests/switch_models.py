# SPDX-License-Identifier: Apache-2.0
"""Switch models with seeded weights, text-like batches, and the comparison of two runs of a model."""

from dataclasses import dataclass, field

import torch
from transformers import (
    SwitchTransformersConfig,
    SwitchTransformersEncoderModel,
    SwitchTransformersForConditionalGeneration,
)
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

VOCABULARY = 97


def switch_model(kind="encoder", *, seed=0, hot_expert=None, **changes):
    """A model in eval mode, the same for equal arguments. ``hot_expert`` gets every token."""
    sizes = {
        "vocab_size": VOCABULARY,
        "d_model": 48,
        "d_kv": 12,
        "num_heads": 4,
        "d_ff": 37,
        "num_layers": 4,
        "num_sparse_encoder_layers": 2,
        "num_decoder_layers": 4,
        "num_sparse_decoder_layers": 2,
        "num_experts": 8,
        "router_bias": True,
        "decoder_start_token_id": 0,
    }
    config = SwitchTransformersConfig(**{**sizes, **changes})
    torch.manual_seed(seed)
    cls = {"encoder": SwitchTransformersEncoderModel, "seq2seq": SwitchTransformersForConditionalGeneration}[kind]
    model = cls(config).eval()
    for router in routers(model):
        torch.nn.init.zeros_(router.classifier.bias)
        if hot_expert is not None:
            router.classifier.bias.data[hot_expert] = 1e3
    return model


def routers(model):
    return [module for module in model.modules() if isinstance(module, SwitchTransformersTop1Router)]


def batch(size, length, *, seed=0, padded=True):
    """Token ids and a mask; with padding, sequences of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (size, length), generator=generator)
    lengths = torch.randint(1, length + 1, (size,), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).long() if padded else torch.ones_like(ids)
    return {"input_ids": ids * mask, "attention_mask": mask}


@dataclass
class Run:
    """One forward pass: outputs that must agree, and what each router decided."""

    outputs: list[torch.Tensor]
    chosen: list[torch.Tensor] = field(default_factory=list)  # per router [B, S]: expert, -1 = dropped
    margins: list[torch.Tensor] = field(default_factory=list)  # per router [B, S]: lead of the best logit


def run(model, inputs):
    """Call the model and record every router's decision."""
    record = Run([])

    def hook(module, args, output):
        mask, _, logits = output
        record.chosen.append(torch.where(mask.any(-1), mask.argmax(-1), -1))
        best = logits.float().topk(min(2, logits.shape[-1])).values
        record.margins.append(best[..., 0] - best[..., -1])

    handles = [router.register_forward_hook(hook) for router in routers(model)]
    with torch.no_grad():
        result = model(**inputs)
    for handle in handles:
        handle.remove()
    names = ("logits", "loss", "encoder_last_hidden_state", "last_hidden_state")
    record.outputs = [result[name] for name in names if result.get(name) is not None]
    return record


def compare(expected, found):
    """(largest relative difference, flips as (router, sequence, token, margin)); sequences with a flip are left out."""
    flips = [
        (router, sequence, token, float(expected.margins[router][sequence, token]))
        for router, (before, after) in enumerate(zip(expected.chosen, found.chosen, strict=True))
        for sequence, token in (before != after).nonzero().tolist()
    ]
    flipped = {sequence for _, sequence, _, _ in flips}
    worst = 0.0
    for before, after in zip(expected.outputs, found.outputs, strict=True):
        if before.ndim == 0 and flipped:
            continue
        if before.ndim:
            kept = [sequence for sequence in range(len(before)) if sequence not in flipped]
            before, after = before[kept], after[kept]
        if before.numel():
            worst = max(worst, float((before - after).abs().max() / before.abs().max()))
    return worst, flips
