"""S4: a linear state space layer with an expensive setup and a cheap call.

Each of `H` features is a linear system of `N` states with step size `delta`,

    x'(t) = A x(t) + B u(t),    y(t) = Re(C x(t)),    A = diag(Lambda) - P P^*,

of which `T` samples are taken by the bilinear rule. *Setup* turns the parameters into
a convolution kernel `[H, T]` (`kernel`) or a recurrence (`discretise`); *call* applies
it to activations `[B, T, H]` (`convolve` or `step`). Both give the same outputs.

As in the paper, the learned readout is `C~ = C (I - Abar^T)`, which spares the kernel
all powers of `Abar`; it belongs to one length `T`, so both forms are told that length.

Reference: Gu, Goel, Re, "Efficiently Modeling Long Sequences with Structured State
Spaces", 2021, https://arxiv.org/abs/2111.00396.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# (key, shape, dtype) -> array, as in `jax.nn.initializers`.
Initializer = Callable[..., jax.Array]

MIN_STEP, MAX_STEP = 1e-3, 1e-1
MIN_DECAY = 1e-4


class Dplr(NamedTuple):
    """Continuous systems, diagonal plus low rank: `A = diag(Lambda) - P P^*`.

    `A + A^*` is negative definite while `Re(Lambda) < 0`, hence every system is stable.
    All are complex `[H, N]`, but for `step`.
    """

    eigenvalues: jax.Array  # Lambda
    p: jax.Array
    b: jax.Array
    c: jax.Array  # C~
    step: jax.Array  # delta, [H]


class Recurrence(NamedTuple):
    """Discrete systems: `x_t = Abar x_{t-1} + Bbar u_t`, `y_t = Re(Cbar x_t)`."""

    a: jax.Array  # complex [H, N, N]
    b: jax.Array  # complex [H, N]
    c: jax.Array  # complex [H, N]


def hippo(state_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HiPPO-LegS in the basis in which its normal part is diagonal.

    LegS is `A[n, k] = -sqrt((2n+1)(2k+1))` below, `-(n+1)` on and `0` above the
    diagonal, with `B[n] = sqrt(2n+1)`. With `P[n] = sqrt(n + 1/2)`, the matrix
    `A + P P^T` is `-I/2` plus a skew-symmetric one, so a unitary `V` diagonalises it.

    Returns:
      `Lambda`, `V^* P` and `V^* B`, each complex `[N]`.
    """
    n = np.arange(state_size)
    b, p = np.sqrt(2 * n + 1.0), np.sqrt(n + 0.5)
    a = -np.tril(np.outer(b, b), -1) - np.diag(n + 1.0)
    skew = a + np.outer(p, p) + np.eye(state_size) / 2
    frequencies, v = np.linalg.eigh(-1j * skew)
    return -0.5 + 1j * frequencies, v.conj().T @ p, v.conj().T @ b


def parameters(
    features: int, state_size: int
) -> dict[str, tuple[tuple[int, ...], Initializer]]:
    """The real parameters of `H` systems of `N` states: name -> (shape, initialiser).

    Complex values are stored as pairs of real and imaginary part, on the last axis.
    """
    eigenvalues, p, b = hippo(state_size)
    vector, pairs = (features, state_size), (features, state_size, 2)
    return {
        "lambda_real": (vector, _constant(eigenvalues.real)),
        "lambda_imag": (vector, _constant(eigenvalues.imag)),
        "p": (pairs, _constant(np.stack([p.real, p.imag], -1))),
        "b": (pairs, _constant(np.stack([b.real, b.imag], -1))),
        "c": (pairs, jax.nn.initializers.normal(math.sqrt(0.5))),
        "d": ((features,), jax.nn.initializers.ones),
        "log_step": ((features,), _log_uniform(MIN_STEP, MAX_STEP)),
    }


def dplr(params: Mapping[str, jax.Array]) -> Dplr:
    """Systems from the real parameters listed by `parameters`.

    The real part of `Lambda` is kept at or below `-MIN_DECAY`.
    """
    decay = jnp.minimum(params["lambda_real"], -MIN_DECAY)
    p, b, c = (
        jax.lax.complex(params[name][..., 0], params[name][..., 1])
        for name in ("p", "b", "c")
    )
    eigenvalues = jax.lax.complex(decay, params["lambda_imag"])
    return Dplr(eigenvalues, p, b, c, jnp.exp(params["log_step"]))


def kernel(system: Dplr, length: int) -> jax.Array:
    """The convolution kernel `K[t] = Re(Cbar Abar^t Bbar)`, real `[H, T]`.

    Its generating function, truncated to `T` terms, is at the `T`-th roots of unity

        K^(z) = C~ (I - Abar z)^{-1} Bbar
              = delta C~ (D(z) + s(z) P P^*)^{-1} B,
        s(z) = (1 + z) delta / 2,    D(z) = (1 - z) I - s(z) diag(Lambda).

    `D` is diagonal and, unlike the paper's `2 (1 - z) / (delta (1 + z)) - Lambda`,
    finite and invertible at `z = -1` also. The Woodbury identity leaves four Cauchy
    sums over the states; an inverse FFT gives the kernel.
    """
    _, p, b, c, _ = system
    s, denominator = _at_roots_of_unity(system, length)
    inverse = 1 / denominator
    pairs = jnp.stack([c * b, c * p, p.conj() * b, p.conj() * p])  # [4, H, N]
    cb, cp, pb, pp = jnp.einsum("vhn,hnt->vht", pairs, inverse, precision="highest")
    return _woodbury(system, s, cb, cp, pb, pp)


def kernel_term_by_term(system: Dplr, length: int) -> jax.Array:
    """`kernel` as most published code computes it: the same values, at more cost.

    Each of the four Cauchy sums divides for each of its terms, `[H, N, T]` of them,
    where `kernel` divides once for all four. See "The Annotated S4",
    https://srush.github.io/annotated-s4.
    """
    _, p, b, c, _ = system
    s, denominator = _at_roots_of_unity(system, length)

    def cauchy(weights: jax.Array) -> jax.Array:
        return jnp.sum(weights[:, :, None] / denominator, axis=1)

    cb, cp = cauchy(c * b), cauchy(c * p)
    pb, pp = cauchy(p.conj() * b), cauchy(p.conj() * p)
    return _woodbury(system, s, cb, cp, pb, pp)


def _at_roots_of_unity(system: Dplr, length: int) -> tuple[jax.Array, jax.Array]:
    """`s(z)` `[H, T]` and `D(z) - s(z) Lambda` `[H, N, T]`, as in `kernel`."""
    dtype = system.b.dtype
    z = np.exp(-2j * np.pi * np.arange(length) / length)
    step = system.step.astype(dtype)[:, None]
    s = step * jnp.asarray((1 + z) / 2, dtype)[None]
    one_minus_z = jnp.asarray(1 - z, dtype)[None, None]
    return s, one_minus_z - s[:, None] * system.eigenvalues[:, :, None]


def _woodbury(system: Dplr, s: jax.Array, *sums: jax.Array) -> jax.Array:
    cb, cp, pb, pp = sums
    step = system.step.astype(system.b.dtype)[:, None]
    return jnp.fft.ifft(step * (cb - s * cp * pb / (1 + s * pp))).real


KERNELS = {"convolution": kernel, "term by term": kernel_term_by_term}


def run(
    params: Mapping[str, jax.Array],
    u: jax.Array,
    mode: str = "convolution",
    state: jax.Array | None = None,
    *,
    length: int | None = None,
) -> Any:
    """One S4 layer, `[B, T, H] -> [B, T, H]`: `y = K * u + d u`.

    Args:
      params: As listed by `parameters`.
      u: Activations `[B, T, H]`; of one step of time `[B, H]`.
      mode: One of `KERNELS`; same parameters, same outputs.
      state: For one step, the state `[B, H, N]`; the next one is returned, too.
      length: For one step, that of `discretise`.
    """
    if state is None or length is None:
        y = convolve(u, KERNELS[mode](dplr(params), u.shape[1]))
        return y + params["d"][None, None] * u
    state, y = step(discretise(dplr(params), length), state, u)
    return y + params["d"][None] * u, state


def spectrum(kernel: jax.Array) -> jax.Array:
    """What `convolve` needs of a kernel `[H, T]`: its padded FFT `[H, T + 1]`."""
    return jnp.fft.rfft(kernel, n=2 * kernel.shape[-1])


def convolve_spectrum(u: jax.Array, spectrum: jax.Array) -> jax.Array:
    """`convolve` with a kernel of which the `spectrum` `[H, T + 1]` is known."""
    length = u.shape[1]
    # Padding to 2 T keeps the circular convolution of the FFT from wrapping around.
    u_spectrum = jnp.fft.rfft(u, n=2 * length, axis=1)
    y_spectrum = u_spectrum * jnp.swapaxes(spectrum, 0, 1)[None]
    return jnp.fft.irfft(y_spectrum, n=2 * length, axis=1)[:, :length]


def convolve(u: jax.Array, kernel: jax.Array) -> jax.Array:
    """Causal convolution `y[t] = sum_{s <= t} K[s] u[t - s]`, feature by feature.

    From activations `[B, T, H]` and a kernel `[H, T]` to `[B, T, H]`.
    """
    return convolve_spectrum(u, spectrum(kernel))


def discretise(system: Dplr, length: int) -> Recurrence:
    """The recurrence of which `kernel(system, length)` is the impulse response.

        Abar = (I - delta/2 A)^{-1} (I + delta/2 A),
        Bbar = (I - delta/2 A)^{-1} delta B,    Cbar = C~ (I - Abar^T)^{-1}.

    `length` is the `T` that the learned readout `C~` belongs to; the recurrence may be
    run for more or fewer steps.
    """
    eigenvalues, p, b, c, step = system
    identity = jnp.eye(b.shape[-1], dtype=b.dtype)[None]
    step = step.astype(b.dtype)[:, None, None]
    with jax.default_matmul_precision("highest"):
        a = identity * eigenvalues[:, None] - p[:, :, None] * p.conj()[:, None]
        right = jnp.concatenate([identity + step / 2 * a, step * b[:, :, None]], -1)
        solution = jnp.linalg.solve(identity - step / 2 * a, right)
        a_bar, b_bar = solution[:, :, :-1], solution[:, :, -1]
        readout = identity - jnp.linalg.matrix_power(a_bar, length)
        c_bar = jnp.linalg.solve(jnp.swapaxes(readout, 1, 2), c[:, :, None])[:, :, 0]
    return Recurrence(a_bar, b_bar, c_bar)


def step(
    system: Recurrence, state: jax.Array, u: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The next state `[B, H, N]` and outputs, from a state and `u` `[B, H]`."""
    driven = system.b[None] * u.astype(system.b.dtype)[:, :, None]
    moved = jnp.einsum("hmn,bhn->bhm", system.a, state, precision="highest")
    state = moved + driven
    y = jnp.einsum("hn,bhn->bh", system.c, state, precision="highest")
    return state, y.real


def _constant(value: np.ndarray) -> Initializer:
    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        del key
        return jnp.broadcast_to(jnp.asarray(value, dtype), shape)

    return init


def _log_uniform(low: float, high: float) -> Initializer:
    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, math.log(low), math.log(high))

    return init
