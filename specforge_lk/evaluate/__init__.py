"""What a draft is worth: τ and acceptance rates, on held-out responses and on benchmarks."""
