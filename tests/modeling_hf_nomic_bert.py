# SPDX-License-Identifier: Apache-2.0
"""An encoder with the module tree and parameter names of nomic-embed-text-v2-moe, whose code is only on the hub.

Named like that file, because moeshard finds its classes by file and class name. Attention is left out: it has no part
in the MoE layer.
"""

import torch
from torch import nn


class NomicRouter(nn.Module):
    def __init__(self, d_model, experts, top_k):
        super().__init__()
        self.layer = nn.Linear(d_model, experts, bias=False)
        self.top_k = top_k

    def forward(self, x):
        scores = self.layer(x.reshape(-1, x.shape[-1])).softmax(-1, dtype=torch.float32)
        best, index = scores.topk(self.top_k, dim=-1)
        return scores.to(x.dtype), best.to(x.dtype), index


class NomicExpertMLP(nn.Module):
    def __init__(self, d_model, d_ff, experts):
        super().__init__()
        self.moe_num_experts = experts
        self.w1 = nn.Parameter(torch.randn(experts * d_ff, d_model) * d_model**-0.5)
        self.w2 = nn.Parameter(torch.randn(experts * d_ff, d_model) * d_ff**-0.5)
        self.activation_fn = nn.GELU()


class NomicExperts(nn.Module):
    def __init__(self, d_model, d_ff, experts):
        super().__init__()
        self.mlp = NomicExpertMLP(d_model, d_ff, experts)
        self.bias = nn.Parameter(torch.randn(d_model))

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
    def __init__(self, d_model, d_ff, experts, top_k):
        super().__init__()
        self.router = NomicRouter(d_model, experts, top_k)
        self.experts = NomicExperts(d_model, d_ff, experts)

    def forward(self, x):
        return self.experts(x, *self.router(x))


class NomicBertBlock(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.mlp = NomicMoELayer(*sizes)
        self.norm2 = nn.LayerNorm(sizes[0])

    def forward(self, x):
        return self.norm2(x + self.mlp(x))


class NomicBertModel(nn.Module):
    def __init__(self, vocabulary, d_model, d_ff, experts, top_k, layers):
        super().__init__()
        self.embeddings = nn.Embedding(vocabulary, d_model)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(NomicBertBlock(d_model, d_ff, experts, top_k) for _ in range(layers))

    def forward(self, input_ids, attention_mask=None):
        x = self.embeddings(input_ids)
        for layer in self.encoder.layers:
            x = layer(x)
        return {"last_hidden_state": x}
