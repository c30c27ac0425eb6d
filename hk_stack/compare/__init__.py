"""The same models in each framework: one copy, shared by parity tests and benchmark.

`s4` holds the mathematics without a framework, `in_haiku` and `in_linen` the models
made of it, and `plain` the hand-written twin without any framework. Flax is imported
by `in_linen` only.
"""
