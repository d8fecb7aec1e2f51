# SPDX-License-Identifier: Apache-2.0
"""What test_group runs under torchrun: one layer through each backend; rank 0 writes what it found."""

import json
import sys

import torch
from reference import experts_reference, layer_case, relative_error

import moeshard


def main(path):
    """Compare the exchanges that init finds, bit by bit."""
    found = {}
    case = layer_case(12, 16, 37, 5, 2)
    tensors = [torch.from_numpy(case[name]) for name in ("hidden", "index", "weights")]
    outputs = {}
    for backend in ("auto", "torch"):
        with moeshard.init(backend, timeout=30) as group:
            rows = slice(0, 9) if group.rank == 0 else slice(9, 12)
            layer = moeshard.ShardedExperts.from_weights(
                torch.from_numpy(case["w_in"]), torch.from_numpy(case["w_out"]), group=group
            )
            outputs[backend] = layer(*(tensor[rows] for tensor in tensors))
            expected = experts_reference(*tensors, case["w_in"], case["w_out"])[rows]
            found[backend] = [group.size, group.backend, relative_error(outputs[backend], expected)]
            rank = group.rank
    found["same bits"] = bool((outputs["auto"] == outputs["torch"]).all())
    with open(f"{path}.{rank}", "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1])
