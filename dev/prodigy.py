"""Prodigy (arXiv 2306.06101), for the lab: Adam that finds its own learning rate.

This is a module, not a program. An arm of dev/ladder_plan.toml puts it in the place of AdamW by an edit of the script.
"""
import torch


class Prodigy(torch.optim.Optimizer):
    """Adam whose rate d grows with the distance that the weights have moved; `lr` of a group is a factor on d.

    There is one d for all parameters. Weight decay is decoupled, as in AdamW.
    """

    @torch.no_grad()
    def step(self, beta1: float = 0.9, beta2: float = 0.99):
        params = [param for group in self.param_groups for param in group["params"]]
        weights = torch.cat([param.flatten() for param in params])
        grad = torch.cat([param.grad.flatten() for param in params])
        state, lr, beta3 = self.state["all"], self.param_groups[0]["lr"], beta2 ** 0.5
        if not state:
            state.update({name: torch.zeros_like(weights) for name in ("m", "v", "sum")}, start=weights,
                         moved=weights.new_tensor(0.0), d=weights.new_tensor(1e-6))
        d = state["d"]
        state["moved"].lerp_(lr * d ** 2 * torch.dot(grad, state["start"] - weights), 1 - beta3)
        state["sum"].lerp_(lr * d ** 2 * grad, 1 - beta3)
        state["m"].lerp_(d * grad, 1 - beta1)
        state["v"].lerp_((d * grad) ** 2, 1 - beta2)
        update = state["m"] / (state["v"].sqrt() + d * 1e-8)
        state["d"] = torch.maximum(d, state["moved"] / state["sum"].abs().sum().clamp(min=1e-30))
        for group in self.param_groups:
            torch._foreach_mul_(group["params"], 1 - lr * d * group["weight_decay"])
        for param, part in zip(params, update.split([param.numel() for param in params])):
            param -= lr * d * part.view_as(param)


def prodigy(groups: list[dict]) -> Prodigy:
    """The optimizer of these groups, whose own rates it ignores."""
    return Prodigy([group | {"lr": 1.0, "base_lr": 1.0} for group in groups], {"weight_decay": 0.0})


if __name__ == "__main__":
    print(__doc__.strip())
