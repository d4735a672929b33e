"""Fused versus naive, with a peer: time in GEMM units, peak memory and error against float64 (`klq bench`)."""
