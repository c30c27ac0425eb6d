"""Flax's GRU in Haiku."""

import haiku as hk
import jax
import jax.numpy as jnp


class GRU(hk.RNNCore):
    r"""The GRU of Flax and of most libraries, as a Haiku core.

    `hk.GRU` resets the hidden state before it is multiplied,
    `tanh(W_ia x + W_ha (r * h) + b)`, Flax's `GRUCell` after:

    ```
    r = sigmoid(W_ir x + b_ir + W_hr h)
    z = sigmoid(W_iz x + b_iz + W_hz h)
    n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
    h = (1 - z) * n + z * h
    ```

    No parameters make the two agree, so a Flax model with a GRU needs this one. Its
    parameters are `w_i` `[features, 3 D]`, `w_h` `[D, 3 D]`, `b_i` `[3 D]` and `b_h`
    `[D]`, with the gates in the order r, z, n.
    """

    def __init__(
        self,
        hidden_size: int,
        with_hidden_bias: bool = True,
        name: str | None = None,
    ):
        """Constructs the core.

        Args:
          hidden_size: `D`, the size of the hidden state.
          with_hidden_bias: Whether there is a `b_h`: yes in Linen, no in NNX.
          name: The module's name.
        """
        super().__init__(name=name)
        self.hidden_size = hidden_size
        self.with_hidden_bias = with_hidden_bias

    def __call__(
        self, inputs: jax.Array, state: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """One step.

        Args:
          inputs: `[B, features]`.
          state: `[B, D]`.

        Returns:
          The next state, twice: as output and as state.
        """
        size, dtype = self.hidden_size, inputs.dtype
        init = hk.initializers.VarianceScaling()
        w_i = hk.get_parameter("w_i", [inputs.shape[-1], 3 * size], dtype, init)
        w_h = hk.get_parameter("w_h", [size, 3 * size], dtype, init)
        b_i = hk.get_parameter("b_i", [3 * size], dtype, jnp.zeros)
        gates = inputs @ w_i
        gates = gates + jnp.broadcast_to(b_i, gates.shape)
        r_x, z_x, n_x = jnp.split(gates, 3, axis=-1)
        r, z, n = jnp.split(state @ w_h, 3, axis=-1)
        if self.with_hidden_bias:
            b_h = hk.get_parameter("b_h", [size], dtype, jnp.zeros)
            n = n + jnp.broadcast_to(b_h, n.shape)
        r = jax.nn.sigmoid(r_x + r)
        z = jax.nn.sigmoid(z_x + z)
        n = jnp.tanh(n_x + r * n)
        state = (1 - z) * n + z * state
        return state, state

    def initial_state(self, batch_size: int | None) -> jax.Array:
        """Zeros `[B, D]`, or `[D]` without a batch."""
        shape = (self.hidden_size,)
        return jnp.zeros(shape if batch_size is None else (batch_size, *shape))
