"""Fused versus naive, with peers: time in GEMM units, peak memory and error against float64 (`klq bench`)."""
