"""Tokens to model: packing, the plan, collation, packed attention, loss weights, the trainer, longer RoPE."""
