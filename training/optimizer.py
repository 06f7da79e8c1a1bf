"""Muon for the kernels inside the network, AdamW for its two ends, biases and gains."""

import torch
from diffusers import AutoencoderKLWan


class Optimizer:
    """Updates a VAE from its gradients. Gradients are kept and zeroed, never dropped: recorded graphs point at them."""

    def __init__(self, vae: AutoencoderKLWan, *, learning_rate: float, clip_norm: float) -> None:
        ends = ("conv_in", "conv_out", "quant_conv")
        self.parameters = list(vae.parameters())
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        kernels = [
            p for name, p in vae.named_parameters() if p.ndim >= 4 and p.shape[0] > 3 and not any(map(name.count, ends))
        ]
        # Muon takes matrices: these share the kernels' memory.
        self.pairs = [(p.detach().flatten(1), p) for p in kernels]
        chosen = {id(p) for p in kernels}
        others = [p for p in self.parameters if id(p) not in chosen]
        self.muon = torch.optim.Muon(
            [matrix for matrix, _ in self.pairs], lr=learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        )
        self.adam = torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
        self.clip_norm = clip_norm

    def step(self, learning_rate: float) -> None:
        """Update the parameters from their gradients, then zero the gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        for matrix, kernel in self.pairs:
            assert kernel.grad is not None
            matrix.grad = kernel.grad.flatten(1)
        for optimizer in (self.muon, self.adam):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
        torch._foreach_zero_([p.grad for p in self.parameters])

    def state_dict(self) -> dict[str, object]:
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, dict[str, object]]) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
