# SPDX-License-Identifier: Apache-2.0
"""Small seeded models of every family, and what each should compute."""

import functools
import shutil
from pathlib import Path

import modeling_hf_nomic_bert
import torch
import transformers
from huggingface_hub import save_torch_state_dict
from modeling_hf_nomic_bert import NomicBertConfig, NomicBertModel
from torch import nn

VOCABULARY = 97
NEW = int(transformers.__version__.split(".")[0]) >= 5


def _build(cls, config, seed=0):
    """In eval mode, with weights as large as a trained model's, so that routers decide and clamps are reached."""
    torch.manual_seed(seed)
    transformers.logging.set_verbosity_error()
    model = cls(config)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the default one wants sizes that are multiples of four
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower():
            deviation = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5
            nn.init.normal_(parameter, std=deviation * (2 if "gate_up" in name else 1))
    return model.eval()


def privacy_filter(**changes):
    sizes = {"hidden_size": 40, "intermediate_size": 37, "num_local_experts": 6, "num_experts_per_tok": 3}
    config = transformers.OpenAIPrivacyFilterConfig(
        **{**sizes, **changes}, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        vocab_size=VOCABULARY, sliding_window=8, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return _build(transformers.OpenAIPrivacyFilterModel, config)


def gpt_oss():
    config = transformers.GptOssConfig(
        hidden_size=40, intermediate_size=37, num_local_experts=5, num_experts_per_tok=2, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=VOCABULARY, sliding_window=8,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return _build(transformers.GptOssModel, config)


def mixtral():
    config = transformers.MixtralConfig(
        hidden_size=40, intermediate_size=37, num_local_experts=5, num_experts_per_tok=2, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCABULARY,
    )  # fmt: skip
    return _build(transformers.MixtralModel, config)


def qwen3_moe():
    config = transformers.Qwen3MoeConfig(
        hidden_size=40, moe_intermediate_size=19, intermediate_size=32, num_experts=8, num_experts_per_tok=3,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=VOCABULARY,
        norm_topk_prob=True, mlp_only_layers=[],
    )  # fmt: skip
    return _build(transformers.Qwen3MoeModel, config)


def nllb(**changes):
    settings = {"moe_eval_capacity_token_fraction": 1.0}
    config = transformers.NllbMoeConfig(
        **{**settings, **changes}, d_model=40, encoder_ffn_dim=37, decoder_ffn_dim=37, encoder_layers=2,
        decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_sparse_step=2,
        decoder_sparse_step=2, num_experts=5, vocab_size=VOCABULARY, max_position_embeddings=64, router_bias=True,
        attn_implementation="eager",
    )  # fmt: skip
    model = _build(transformers.NllbMoeModel, config)
    if NEW:
        for module in model.modules():
            if type(module).__name__ == "NllbMoeExperts":
                module.forward = functools.partial(_right_nllb_experts, module)
    return model


def _right_nllb_experts(experts, hidden, first_mask, gates):
    """What transformers 4.57 computes; 5.23 takes the mask for expert numbers."""
    out = torch.zeros_like(hidden)
    for number in range(experts.num_experts):
        (token,) = gates[:, number].nonzero(as_tuple=True)
        hidden_columns = experts[f"expert_{number}"](hidden[token]) * (1 - experts.moe_token_dropout)
        out.index_add_(0, token, (hidden_columns * gates[token, number, None]).to(out.dtype))
    return out


def nomic(**changes):
    torch.manual_seed(0)
    sizes = {"n_embd": 40, "n_inner": 37, "num_experts": 5, **changes}
    config = NomicBertConfig(
        **sizes, vocab_size=VOCABULARY, n_layer=2, n_head=4, moe_top_k=2, bos_token_id=0, eos_token_id=2
    )
    return NomicBertModel(config, add_pooling_layer=False).eval()


def save_nomic(model, folder, max_shard_size="50GB"):
    """A checkpoint as it lies on the hub: weights, configuration, and the code that they need."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(model.state_dict(), folder, max_shard_size=max_shard_size)
    code = "modeling_hf_nomic_bert"
    model.config.auto_map = {"AutoConfig": f"{code}.NomicBertConfig", "AutoModel": f"{code}.NomicBertModel"}
    model.config.architectures = ["NomicBertModel"]
    model.config.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    shutil.copy(modeling_hf_nomic_bert.__file__, folder)


FAMILIES = {"nllb": nllb, "nomic": nomic}
if NEW:
    FAMILIES |= {"privacy_filter": privacy_filter, "gpt_oss": gpt_oss, "mixtral": mixtral, "qwen3_moe": qwen3_moe}


def inputs(model, *, size=3, length=11, seed=0):
    """Token ids and a mask, sequences of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (size, length), generator=generator)
    mask = (torch.arange(length) < torch.randint(2, length + 1, (size,), generator=generator)[:, None]).long()
    given = {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}
    if isinstance(model, getattr(transformers, "NllbMoeModel", ())):
        given["decoder_input_ids"] = torch.randint(2, VOCABULARY, (size, 7), generator=generator)
    return given


def tokens(model, given):
    """The last hidden states of the tokens that are not padding, ``[N, D]`` float32."""
    with torch.no_grad():
        hidden = model(**given)["last_hidden_state"]
    real = given["attention_mask"].bool() if "decoder_input_ids" not in given else torch.ones(hidden.shape[:2]).bool()
    return hidden[real].float()
