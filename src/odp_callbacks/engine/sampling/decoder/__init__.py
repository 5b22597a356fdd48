"""One token for every slot with few operator calls, for models that are built like Llama.

A step of :mod:`~odp_callbacks.engine.sampling.continuous_batching` runs one token through the model for each slot. Its
time is that of the calls rather than that of the arithmetic: transformers and peft make about 100 a layer. Here a layer
takes about 25, whatever the number of slots and prefixes. A trial compares the logits with those of the model.
"""
