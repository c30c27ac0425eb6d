"""The same models in each framework: one copy, shared by parity tests and benchmark.

`s4` and `models` hold the mathematics without a framework, `in_haiku`, `in_linen`,
`in_nnx` and `in_equinox` the models made of it, `in_plain` the twin written by hand
without any framework. `python -m hk_stack.compare` measures them. Each framework is
imported by its own file only.
"""
