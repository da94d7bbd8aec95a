"""Speculative decoding with any draft: proposals, rejection sampling, acceptance bookkeeping."""
