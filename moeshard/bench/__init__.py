# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: moeshard and its rivals, side by side in one run."""
