"""An optimizer for matrices that is fast on CPUs without bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for the weight matrices of the layers.

    The look-up circuit forms several times sooner than with AdamW.  torch.optim.Muon computes in
    bfloat16, which ordinary CPUs emulate at a tenth of the speed; this one stays in float32 and
    handles all matrices of one shape at once.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @staticmethod
    def orthogonalise(x: Tensor) -> Tensor:
        """Newton-Schulz iteration with the usual quintic coefficients, on a stack of matrices."""
        wide = x.shape[-2] <= x.shape[-1]
        x = x if wide else x.mT
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x if wide else x.mT

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Update all parameters; a closure is not supported."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, same in by_shape.items():
                updates = []
                for parameter in same:
                    state = self.state[parameter]
                    buffer = state.setdefault("momentum", torch.zeros_like(parameter))
                    gradient = parameter.grad
                    if gradient is None:
                        raise ValueError("every matrix of the layers needs a gradient")
                    buffer.lerp_(gradient, 1 - group["momentum"])
                    updates.append(gradient.lerp(buffer, group["momentum"]))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(
                    same, self.orthogonalise(torch.stack(updates)), strict=True
                ):
                    parameter.sub_(update, alpha=scale)
