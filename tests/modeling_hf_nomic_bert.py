# SPDX-License-Identifier: Apache-2.0
"""An encoder with the module tree and parameter names of nomic-embed-text-v2-moe, whose code is only on the hub.

Named like that file, because moeshard finds its classes by file and class name. Attention is left out: it has no part
in the MoE layer. Loaded as that code is: its ``from_pretrained`` is its own, it never calls ``post_init``, it computes
buffers that no checkpoint has, and its pooler is made only where it is asked for.
"""

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, PreTrainedModel


class NomicBertConfig(GPT2Config):
    model_type = "nomic_bert"

    def __init__(self, num_experts=8, moe_top_k=2, **settings):
        super().__init__(**settings)
        self.num_experts = num_experts
        self.moe_top_k = moe_top_k


class NomicRouter(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer = nn.Linear(config.n_embd, config.num_experts, bias=False)
        self.top_k = config.moe_top_k

    def forward(self, x):
        scores = self.layer(x.reshape(-1, x.shape[-1])).softmax(-1, dtype=torch.float32)
        best, index = scores.topk(self.top_k, dim=-1)
        return scores.to(x.dtype), best.to(x.dtype), index


class NomicExpertMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.moe_num_experts = config.num_experts
        self.w1 = nn.Parameter(torch.empty(config.num_experts * config.n_inner, config.n_embd))
        self.w2 = nn.Parameter(torch.empty(config.num_experts * config.n_inner, config.n_embd))
        nn.init.normal_(self.w1, std=config.n_embd**-0.5)
        nn.init.normal_(self.w2, std=config.n_inner**-0.5)
        self.activation_fn = nn.GELU()


class NomicExperts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mlp = NomicExpertMLP(config)
        self.bias = nn.Parameter(torch.empty(config.n_embd))
        nn.init.normal_(self.bias)

    def forward(self, x, weights, top_weights, top_experts):
        rows = x.reshape(-1, x.shape[-1])
        out = torch.zeros_like(rows)
        for expert, (w1, w2) in enumerate(
            zip(self.mlp.w1.chunk(self.mlp.moe_num_experts), self.mlp.w2.chunk(self.mlp.moe_num_experts), strict=True)
        ):
            token, choice = (top_experts == expert).nonzero(as_tuple=True)
            hidden = self.mlp.activation_fn(rows[token] @ w1.T) @ w2
            out.index_add_(0, token, hidden * top_weights[token, choice, None])
        return out.view(x.shape) + self.bias


class NomicMoELayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.router = NomicRouter(config)
        self.experts = NomicExperts(config)

    def forward(self, x):
        return self.experts(x, *self.router(x))


class NomicBertRotaryEmbedding(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        self.register_buffer("inv_freq", self._compute_inv_freq(), persistent=False)

    def _compute_inv_freq(self):
        return 1e4 ** -(torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim)

    def forward(self, x):
        # A model that was cast has a buffer of 16 bits, which is not used.
        frequencies = self.inv_freq if self.inv_freq.dtype == torch.float32 else self._compute_inv_freq()
        angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float32), frequencies)
        cos, sin = (table.repeat(1, 2).to(x.dtype) for table in (angles.cos(), angles.sin()))
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-right, left), dim=-1) * sin


class NomicBertPreTrainedModel(PreTrainedModel):
    config_class = NomicBertConfig
    base_model_prefix = "model"

    def __init__(self, config, *inputs, **options):
        super().__init__(config)

    @classmethod
    def from_pretrained(cls, model_name, config=None, *inputs, **options):
        config = cls.config_class.from_pretrained(model_name) if config is None else config
        model = cls(config, **({"add_pooling_layer": False} if cls is NomicBertModel else {}))
        if options.get("torch_dtype") is not None:
            model = model.to(options["torch_dtype"])
        model.load_state_dict(load_file(f"{model_name}/model.safetensors"), strict=False)
        return model


class NomicBertBlock(NomicBertPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.rotary_emb = NomicBertRotaryEmbedding(config.n_embd)
        self.mlp = NomicMoELayer(config)
        self.norm2 = nn.LayerNorm(config.n_embd)

    def forward(self, x):
        return self.norm2(x + self.mlp(self.rotary_emb(x)))


class NomicBertModel(NomicBertPreTrainedModel):
    def __init__(self, config, add_pooling_layer=True):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.n_embd)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(NomicBertBlock(config) for _ in range(config.n_layer))
        self.pooler = nn.Linear(config.n_embd, config.n_embd) if add_pooling_layer else None

    def forward(self, input_ids, attention_mask=None):
        x = self.embeddings(input_ids)
        for layer in self.encoder.layers:
            x = layer(x)
        pooled = None if self.pooler is None else self.pooler(x[:, 0]).tanh()
        return {"last_hidden_state": x, "pooler_output": pooled}
