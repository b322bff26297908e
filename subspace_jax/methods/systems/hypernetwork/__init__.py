"""Hypernetwork personalization: one network writes a diffusion model's LoRA from a reference image of a subject."""

from subspace_jax.core import register
from subspace_jax.methods.systems.hypernetwork._decoder import PooledDecoder as PooledDecoder
from subspace_jax.methods.systems.hypernetwork._decoder import WeightDecoder as WeightDecoder
from subspace_jax.methods.systems.hypernetwork._guidance import hybrid_guidance as hybrid_guidance
from subspace_jax.methods.systems.hypernetwork._guidance import hybrid_predictor as hybrid_predictor
from subspace_jax.methods.systems.hypernetwork._layout import Kernel as Kernel
from subspace_jax.methods.systems.hypernetwork._layout import Layout as Layout
from subspace_jax.methods.systems.hypernetwork._layout import flatten as flatten
from subspace_jax.methods.systems.hypernetwork._layout import layout_of as layout_of
from subspace_jax.methods.systems.hypernetwork._layout import unflatten as unflatten
from subspace_jax.methods.systems.hypernetwork._loss import denoising_loss as denoising_loss
from subspace_jax.methods.systems.hypernetwork._loss import output_penalty as output_penalty
from subspace_jax.methods.systems.hypernetwork._personalize import adapter_of as adapter_of
from subspace_jax.methods.systems.hypernetwork._personalize import personalized as personalized
from subspace_jax.methods.systems.hypernetwork._sampling import add_noise as add_noise
from subspace_jax.methods.systems.hypernetwork._sampling import cosine_schedule as cosine_schedule
from subspace_jax.methods.systems.hypernetwork._sampling import ddim as ddim
from subspace_jax.methods.systems.hypernetwork._training import TrainState as TrainState
from subspace_jax.methods.systems.hypernetwork._training import init_state as init_state
from subspace_jax.methods.systems.hypernetwork._training import train_step as train_step

__all__ = [
    "Kernel",
    "Layout",
    "PooledDecoder",
    "TrainState",
    "WeightDecoder",
    "adapter_of",
    "add_noise",
    "cosine_schedule",
    "ddim",
    "denoising_loss",
    "flatten",
    "hybrid_guidance",
    "hybrid_predictor",
    "init_state",
    "layout_of",
    "output_penalty",
    "personalized",
    "train_step",
    "unflatten",
]

register(
    __name__,
    title="Finetuning-Free Personalization of Text to Image Generation via Hypernetworks",
    authors="Shrestha, Sharma, Zhou, Kumar",
    year=2025,
    kinds=("system", "module"),
    use_for="An adapter for a new subject from one image, without training.",
    not_for="You can train on the subject itself: an adapter of its own needs no hypernetwork.",
    differs=(
        "The combination of guidances was not to be had; the simplest one is used. Stable Diffusion and CLIP were "
        "not run."
    ),
)
