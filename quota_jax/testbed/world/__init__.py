"""The visual world: small occluded objects, clutter, spelled signs, questions that bind.

`layout` samples scenes, `renderer` draws them, `questions` asks about them and `conversation`
words training turns, all batched over numpy or jax.numpy. `vocabulary` holds the words and the
tokenizer, `scenes` plain metadata for evaluation. Held-out style: drawn only on request.
"""
