"""Decoder: attention, gates, shared experts, KV cache, scheduler and sampler."""
