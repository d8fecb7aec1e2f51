# SPDX-License-Identifier: Apache-2.0
"""Drives the nvcc-built extension with simdev tensors; numpy only, torch if it is there."""

import os
import sys

sys.path[:0] = [os.path.join(os.path.dirname(__file__), ".."), os.path.join(os.path.dirname(__file__), "bin")]
import numpy as np  # noqa: E402
import pyext  # noqa: E402
import simdev  # noqa: E402

n = 1000
rng = np.random.default_rng(0)
f = rng.standard_normal(n).astype(np.float32)
bits = (f.view(np.uint32) >> 16).astype(np.uint16)
x = simdev.Tensor((n,), "bfloat16").copy_(bits)
y0 = rng.standard_normal(n).astype(np.float32)
y = simdev.to_device(y0)
pyext.axpy(x, y, 2.5)
want = y0 + np.float32(2.5) * (bits.astype(np.uint32) << 16).view(np.float32)
assert np.allclose(y.numpy(), want, rtol=1e-6, atol=1e-6)
assert np.isnan(simdev.empty((4,), "float32").numpy()).all()  # poison
try:
    import torch

    t = torch.randn(n).bfloat16()
    z = simdev.to_device(torch.zeros(n))
    pyext.axpy(simdev.to_device(t), z, 1.0)
    assert torch.equal(z.torch(), t.float())
except ImportError:
    print("(no torch)")
try:  # too small: must be reported, now or at the sync
    pyext.axpy(x, simdev.empty((n - 500,), "float32"), 1.0)
    simdev.synchronize()
except RuntimeError as e:
    print("pyext ok; planted overrun reported:", e)
else:
    raise SystemExit("overrun not reported")
