"""Layers that are fast when they are differentiated twice, and `accelerate`, which swaps them into a model."""

from forde_fast.second_order.accelerate import Acceleration, accelerate, decelerate
from forde_fast.second_order.layers import norm_relu

__all__ = ["Acceleration", "accelerate", "decelerate", "norm_relu"]
