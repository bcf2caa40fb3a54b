"""Twenty steps of SGD, Adam and AdamW with clipping against torch.optim and clip_grad_norm_."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_gpu.config import OptimizerConfig
from cllm_gpu.model.layers.layer import ParameterSpec
from cllm_gpu.model.parameters import Layout
from cllm_gpu.optim.optimizer import Optimizer

pytestmark = pytest.mark.witness

SPECS = [ParameterSpec("matrix", (7, 5)), ParameterSpec("table", (11, 3)), ParameterSpec("vector", (9,))]
STEPS = 20
CONFIGS = {
    "sgd": OptimizerConfig(name="sgd", momentum=0.0),
    "sgd-momentum-decay": OptimizerConfig(name="sgd", momentum=0.9, weight_decay=0.1),
    "adam": OptimizerConfig(name="adam"),
    "adam-decay": OptimizerConfig(name="adam", weight_decay=0.1, beta1=0.8, beta2=0.95, epsilon=1e-6),
    "adamw": OptimizerConfig(name="adamw", weight_decay=0.1),
    "adamw-no-clipping": OptimizerConfig(name="adamw", weight_decay=0.1, clip_norm=0.0),
}


def torch_optimizer(torch, config, parameters):
    """Decay on matrices only, as one parameter group."""
    groups = [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.rate, momentum=config.momentum)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    return kind(groups, lr=config.rate, betas=(config.beta1, config.beta2), eps=config.epsilon)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "bound"), [(np.float64, 1e-12), (np.float32, 1e-5)], ids=["float64", "float32"])
def test_twenty_steps(name, dtype, bound, backend, generator, torch, within):
    """The gradient of ½‖p − target‖² plus noise, its size from far above the clipping norm to below it.

    Twenty updates of relative rounding eps each; Adam's division amplifies it where a second moment is small.
    """
    config = CONFIGS[name]
    layout = Layout(SPECS, dtype)
    ours, gradients = (layout.views(backend.zeros(layout.size, dtype)) for _ in range(2))
    for view in ours.values():
        view[...] = generator.standard_normal(view.shape)
    theirs = {name: torch.tensor(np.array(view), requires_grad=True) for name, view in ours.items()}
    optimizer, witness = Optimizer(config, backend, layout), torch_optimizer(torch, config, theirs)
    for step in range(STEPS):
        rate = 0.05 / (step + 1)
        for name, view in ours.items():
            gradients[name][...] = (view + generator.standard_normal(view.shape)) * 2.0 ** (3 - step)
            theirs[name].grad = torch.tensor(np.array(gradients[name]))
        norm = optimizer.gradient_norm(gradients)
        report = optimizer.apply(ours, gradients, rate=rate, gradient_norm=norm)
        assert report.applied
        if config.clip_norm:
            total = torch.nn.utils.clip_grad_norm_(list(theirs.values()), config.clip_norm).item()
            within(f"norm at step {step}", abs(total - norm) / total, bound)
        for group in witness.param_groups:
            group["lr"] = rate
        witness.step()
    for name, view in ours.items():
        difference = np.linalg.norm(view - theirs[name].detach().numpy())
        within(name, float(difference / np.linalg.norm(view)), bound)


def test_the_moments_are_the_same(backend, generator, torch, within):
    config = CONFIGS["adamw"]
    layout = Layout(SPECS, np.float64)
    ours, gradients = (layout.views(backend.zeros(layout.size, np.float64)) for _ in range(2))
    theirs = {
        name: torch.zeros(spec.shape, dtype=torch.float64, requires_grad=True) for name, spec in layout.specs.items()
    }
    optimizer, witness = Optimizer(config, backend, layout), torch_optimizer(torch, config, theirs)
    for _ in range(3):
        for name, view in gradients.items():
            view[...] = generator.standard_normal(view.shape) / 100
            theirs[name].grad = torch.tensor(np.array(view))
        optimizer.apply(ours, gradients, rate=0.1, gradient_norm=optimizer.gradient_norm(gradients))
        witness.step()
    for moment, their_name in (("first_moment", "exp_avg"), ("second_moment", "exp_avg_sq")):
        for name, parameter in theirs.items():
            expected = witness.state[parameter][their_name].numpy()
            error = np.linalg.norm(optimizer.state[moment][name] - expected) / np.linalg.norm(expected)
            within(f"{moment} {name}", float(error), 1e-13)
