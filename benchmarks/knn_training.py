"""Training with the sampled gradients of kNN attention and with exact ones: python benchmarks/knn_training.py

Regression on the outputs of another attention layer, by gradient descent: over V alone, which is convex, and over Q,
K and V, which is not. The reported loss is always the loss of exact attention with that step's weights.
Writes results/benchmarks/knn_training.csv and .json; --out changes the name.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch
from writing import out_of, write

from approxkmv.attention.searched.knn_gradients import knn_attention

SETTINGS = {"n": 256, "d": 16, "d_v": 4, "steps": 200, "rates": {"convex": 40.0, "non-convex": 8.0}, "every": 5}
GRADIENTS = {
    "exact": None,
    "head and tail, 16 samples": {"samples": 16, "head": "exact"},
    "Markov chain, 16 samples": {"samples": 16, "head": "sampled"},
    "Markov chain, 128 samples": {"samples": 128, "head": "sampled"},
}


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Exact attention, scale 1/sqrt(d)."""
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def layer(seed: int) -> list[torch.Tensor]:
    """Queries, keys and values of a layer with sharp and flat rows."""
    generator = torch.Generator().manual_seed(seed)
    n, d, d_v = SETTINGS["n"], SETTINGS["d"], SETTINGS["d_v"]
    return [1.5 * torch.randn(1, n, width, generator=generator) for width in (d, d, d_v)]


def train(attend: Callable[..., torch.Tensor], is_convex: bool, rate: float) -> list[float]:
    """Losses of exact attention before each step and at the end."""
    wanted = attention(*layer(1))
    given = [t.requires_grad_(not is_convex or place == 2) for place, t in enumerate(layer(0))]
    optimiser = torch.optim.SGD([t for t in given if t.requires_grad], lr=rate)
    losses = []
    for step in range(SETTINGS["steps"] + 1):
        with torch.no_grad():
            losses.append(float((attention(*given) - wanted).square().mean()))
        optimiser.zero_grad()
        (attend(*given, step) - wanted).square().mean().backward()
        optimiser.step()
    return losses


def main() -> None:
    """Train everything, print the final losses and write the curves."""
    out = out_of(__doc__, "knn_training")
    torch.set_num_threads(1)
    rows = []
    for problem, rate in SETTINGS["rates"].items():
        for name, given in GRADIENTS.items():
            seeds = [0] if given is None else [0, 1, 2]
            for seed in seeds:

                def attend(q, k, v, step, given=given, seed=seed):
                    if given is None:
                        return attention(q, k, v)
                    return knn_attention(q, k, v, seed=1000 * seed + step, **given)

                losses = train(attend, problem == "convex", rate)
                rows += [
                    {"problem": problem, "gradients": name, "seed": seed, "step": step, "loss": loss}
                    for step, loss in enumerate(losses)
                    if step % SETTINGS["every"] == 0
                ]
    table = pd.DataFrame(rows)
    write(out, table, SETTINGS | {"gradients": GRADIENTS})
    ends = table[table["step"].isin([0, SETTINGS["steps"]])]
    print(ends.groupby(["problem", "gradients", "step"], sort=False)["loss"].mean().to_string())


if __name__ == "__main__":
    main()
