"""The production GPFQ solver against the direct recursion, in one run.

    python benchmarks/gpfq.py [--neurons 256] [--inputs 2304] [--samples 4096]

All quantize the same layer (4 bits) from the same samples in float32. The direct recursion (arXiv:2201.11113) goes
through the weights of one neuron after the other and updates the error of its samples. The vectorized recursion does so
for all neurons at once, in place; it is fast while the errors of all neurons and samples fit the processor's cache. The
production solver sums Gram matrices and follows the path in them, so that it needs no memory for samples; its time
includes both. The best of seven times is shown, of the direct recursion the only one.
"""

import argparse
import time

import torch
from torch import Tensor, nn

from qbench.quant import alphabet as alphabets
from qbench.quant.gram import grams
from qbench.quant.path_following import follow_path

BITS, C = 4, 1.16


def layer_and_inputs(neurons: int, inputs: int, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (N, d), and inputs X and X~ (m, d): correlated, after a ReLU, X~ a little off."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(neurons, inputs, generator=generator) / inputs**0.5
    mixing = torch.randn(inputs // 4, inputs, generator=generator) / (inputs // 4) ** 0.5
    latent = torch.randn(samples, inputs // 4, generator=generator)
    x = torch.relu(latent @ mixing + 0.5 * torch.randn(samples, inputs, generator=generator))
    return weight, x, torch.relu(x + 0.05 * torch.randn(samples, inputs, generator=generator))


def direct(weight: Tensor, x: Tensor, xt: Tensor, step: Tensor) -> Tensor:
    """Quantized weights (N, d), one neuron after the other."""
    top = 2 ** (BITS - 1)
    columns, columns_t = x.T.contiguous(), xt.T.contiguous()
    quantized = torch.zeros_like(weight)
    for neuron, w in enumerate(weight):
        u = torch.zeros(len(x))
        for t in range(len(w)):
            v = u + w[t] * columns[t]
            norm = columns_t[t] @ columns_t[t]
            a = columns_t[t] @ v / norm if norm > 0 else norm
            q = torch.floor(a / step + 0.5).clamp(-top, top) * step
            u = v - q * columns_t[t]
            quantized[neuron, t] = q
    return quantized


def vectorized(weight: Tensor, x: Tensor, xt: Tensor, step: Tensor) -> Tensor:
    """The same for all neurons at once, in place."""
    top = 2 ** (BITS - 1)
    columns, columns_t = x.T.contiguous(), xt.T.contiguous()
    error = torch.zeros(len(weight), len(x))
    quantized = torch.zeros_like(weight)
    for t in range(weight.shape[1]):
        error.addr_(weight[:, t], columns[t])
        norm = columns_t[t] @ columns_t[t]
        value = error @ columns_t[t] / norm if norm > 0 else torch.zeros(len(weight))
        quantized[:, t] = torch.floor(value / step + 0.5).clamp(-top, top) * step
        error.addr_(quantized[:, t], columns_t[t], alpha=-1)
    return quantized


def production(weight: Tensor, x: Tensor, xt: Tensor, step: Tensor) -> Tensor:
    """Quantized weights by Gram matrices."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    sums = grams(layer, [xt], [x], for_errors=False)
    alphabet = alphabets.uniform(step, BITS)
    return alphabet.levels[follow_path(weight[None], sums.H.float(), sums.G.float(), alphabet).indices[0]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurons", type=int, default=256)
    parser.add_argument("--inputs", type=int, default=2304)
    parser.add_argument("--samples", type=int, default=4096)
    size = vars(parser.parse_args())
    weight, x, xt = layer_and_inputs(**size)
    step = C * alphabets.radius(weight) / 2 ** (BITS - 1)
    seconds, errors, quantized = {}, {}, {}
    for solver, repeats in ((production, 7), (vectorized, 7), (direct, 1)):
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            quantized[solver] = solver(weight, x, xt, step)
            times.append(time.perf_counter() - start)
        seconds[solver] = min(times)
        wanted = x.double() @ weight.double().T
        errors[solver] = float((wanted - xt.double() @ quantized[solver].double().T).norm() / wanted.norm())
        print(f"{solver.__name__:<11}{seconds[solver]:9.3f} s   relative error {errors[solver]:.6f}")
    same = (quantized[production] - quantized[direct]).abs() < step / 2
    print(f"production is {seconds[direct] / seconds[production]:.1f} times as fast as the direct recursion")
    print(f"{100 * same.double().mean():.2f} % of the weights are the same; the others follow rounding in float32")


if __name__ == "__main__":
    main()
