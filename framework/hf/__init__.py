"""Models of transformers under a `Span`: split over ranks, streamed, packed, decoded from a carry.

    model = adapt(AutoModelForCausalLM.from_pretrained(directory))
    logits = model(tokens, span=span).logits        # of this rank's shard
    logits = model(tokens).logits                   # without a span: transformers alone, as before

In transformers, tokens are mixed by a few functions only: a causal convolution, the Mamba-2 scan, the delta rule and
an attention interface. `adapt` puts forms that take a span (`functions`) in their place, in the methods of this
instance (`rebind`). Weights, names and all that works on each token alone are theirs. What mixes tokens otherwise is
found by running the model once (`probe`) and refused.
"""

from .adapted import adapt, hidden_states, logits, random_settings, set_recompute

__all__ = ["adapt", "hidden_states", "logits", "random_settings", "set_recompute"]
