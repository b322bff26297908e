"""Small PyTorch models under PEFT, and the trees of arrays that stand for the same functions here."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

INPUTS, OUTPUTS, RANK = 24, 16, 4


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)

    def forward(self, x):
        return self.layer(x)


class Convolution(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layer = torch.nn.Conv2d(5, 6, (3, 2), bias=False, **options)

    def forward(self, x):
        return self.layer(x)


class Embedding(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Embedding(30, 12)

    def forward(self, ids):
        return self.layer(ids)


def adapted(model, *, moved=True, **options):
    """Returns the model's layer under PEFT, with its factors moved from where they start."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, target_modules=["layer"], lora_dropout=0.0, **options)
    wrapped = peft.get_peft_model(model, config)
    if moved:
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return wrapped.base_model.model.layer


def array(tensor):
    return jnp.asarray(np.array(tensor.detach().numpy()))


def run(layer, x):
    """Output and the gradients of the layer's trainable parameters, for the loss sum(sin(y))."""
    y = layer(x)
    torch.sin(y).sum().backward()
    return y.detach().numpy(), {n: p.grad.numpy() for n, p in layer.named_parameters() if p.grad is not None}


def assert_close(found, expected):
    """Compares to 1e-5 of the largest entry."""
    expected = np.asarray(expected.detach() if hasattr(expected, "detach") else expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max()))
