"""Models to Hugging Face's ``transformers`` and from there.

An export target (:mod:`.target`) is one class: an architecture of transformers that the model is
exactly (:mod:`.native`), or code that goes with the model (:mod:`.custom_target`). The same class
describes the way back (:mod:`.initial`). :mod:`.registry` has all of them.
"""
