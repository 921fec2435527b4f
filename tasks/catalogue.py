"""What carries out the method that the settings name: its class, its feed, and SWITCH's gate."""

from typing import Any

from kernels import gate
from tasks.config import methods as config
from tasks.distillm import Distillm, Replay
from tasks.feed import Feed
from tasks.methods import Kd, Method, OnPolicy, Opd, Together
from tasks.minillm import Collection, Minillm
from tasks.plan import Plan


def gate_of(settings: config.Switch) -> gate.Gate:
    """The kernel's gate that the settings describe."""
    base, chosen = settings.jsd_log_base, settings.gate
    match chosen:
        case config.ExponentialDecay():
            return gate.ExponentialDecay(start=chosen.initial, rate=chosen.rate, floor=chosen.floor, log_base=base)
        case config.Linear():
            return gate.LinearDecay(length=settings.max_new_tokens, floor=chosen.floor, log_base=base)
        case config.ExponentialGrowth():
            return gate.ExponentialGrowth(rate=chosen.rate, floor=chosen.floor, log_base=base)
        case config.Constant():
            return gate.Constant(value=chosen.value, log_base=base)
        case config.MixIn():
            return gate.Coin(teacher_share=chosen.alpha)
        case config.RandomTeacher():
            return gate.Coin(teacher_share=chosen.probability)
        case config.Adaptive():
            return gate.Adaptive(factor=chosen.factor, window=chosen.window)


def method_of(settings: config.Method, teacher: Any, vocabulary: int) -> Method:
    """The method that the settings name; ``teacher`` is None for those that ask for no distributions."""
    match settings:
        case config.Sft() | config.Seqkd():
            return Method()
        case config.Kd():
            return Kd(settings, teacher, vocabulary)
        case config.Imitkd():
            return OnPolicy(settings, teacher, vocabulary, config.Divergence(name="forward_kl"))
        case config.Gkd():
            return OnPolicy(settings, teacher, vocabulary, settings.divergence)
        case config.Minillm():
            return Minillm(settings, teacher, vocabulary)
        case config.Distillm():
            return Distillm(settings, teacher, vocabulary)
        case config.Skd():
            divergence = config.Divergence(name="forward_kl")
            return Together(settings, teacher, vocabulary, divergence, gate.InTopK(k=settings.top_k))
        case config.Opd():
            return Opd(settings, teacher, vocabulary, config.Divergence(name="reverse_kl"))
        case config.Switch():
            return Together(settings, teacher, vocabulary, settings.divergence, gate_of(settings))


def feed_of(plan: Plan, method: Method) -> Feed:
    """The feed of the plan's method. ValueError where nothing is left to train on."""
    if isinstance(method, Minillm):
        return Collection(plan, method)
    if isinstance(method, Distillm):
        return Replay(plan, method)
    return Feed(plan, method)
