"""The class of a text model with its head: transformers' own, or its text model with a head put on.

Models that also see or hear are sometimes there only as a whole; their text model is a class of its own.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from moequant.forward.joined import cut, halves, is_joined


def causal_class(config: transformers.PreTrainedConfig) -> type[transformers.PreTrainedModel]:
    """The class that computes logits of a text config's model."""
    if _is_text(config):
        known: type[Any] = transformers.AutoModelForCausalLM._model_mapping[type(config)]
        return known
    text: Any = _text_class(type(config))
    return _headed(text)


def whole_class(config: transformers.PreTrainedConfig) -> Any:
    """The automatic class that loads a folder with that config: as text where it can, else whole."""
    if is_joined(config):
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM if _is_text(config) else transformers.AutoModelForImageTextToText


def logits(model: Any, ids: Tensor) -> Tensor:
    """Logits [rows, m, vocab] of the last m tokens of rows ids i64 [rows, n], all of them or a decoder's: of
    a model of `whole_class`, or of ours."""
    fed, first = {"input_ids": ids}, 0
    if is_joined(model.config):
        first = cut(ids.shape[1])
        if hasattr(model, "decoder"):  # transformers' own; ours has one list of layers
            source, target = halves(model.config, ids)
            fed, first = {"input_ids": source, "decoder_input_ids": target}, 0
    found: Tensor = model(**fed, use_cache=False).logits[:, first:]
    return found


def _text_class(config: type[transformers.PreTrainedConfig]) -> type[transformers.PreTrainedModel]:
    """The text model of a config's class; transformers lists not every one beside the whole models."""
    if config is transformers.SwitchTransformersConfig:
        from moequant.forward.switch import Joined  # see there

        return Joined
    if config in transformers.AutoModel._model_mapping:
        known: type[Any] = transformers.AutoModel._model_mapping[config]
        return known
    models = import_module(config.__module__.replace(".configuration_", ".modeling_"))
    classes: list[Any] = [each for each in vars(models).values() if isinstance(each, type)]
    base = transformers.PreTrainedModel
    found: type[Any] = next(
        each for each in classes if issubclass(each, base) and each.config_class is config
    )
    return found


def _is_text(config: transformers.PreTrainedConfig) -> bool:
    return type(config) in transformers.AutoModelForCausalLM._model_mapping


@cache
def _headed(text: type[transformers.PreTrainedModel]) -> type[transformers.PreTrainedModel]:
    """A class that puts a head on what a text model makes."""
    base: Any = next(cls for cls in text.__mro__[1:] if issubclass(cls, transformers.PreTrainedModel))

    class Headed(base):  # type: ignore[misc]
        """A text model and its head."""

        config_class = text.config_class

        def __init__(self, config: transformers.PreTrainedConfig) -> None:
            super().__init__(config)
            self.model = text(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def forward(self, input_ids: Tensor | None = None, **arguments: Any) -> CausalLMOutputWithPast:
            kept = slice(-arguments.pop("logits_to_keep", 0), None)  # of 0: everything
            made = self.model(input_ids=input_ids, **arguments)
            return CausalLMOutputWithPast(
                logits=self.lm_head(made.last_hidden_state[:, kept]), cache=getattr(made, "cache", None)
            )

    return Headed
