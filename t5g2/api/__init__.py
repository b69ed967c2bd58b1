"""The Python API: load a model from a folder of any kind, and use it.

model = t5g2.load("models/adapted")
logits_BTV = model.logits(decoder_tokens, encoder_tokens)
[text] = model.generate(["What is this?"], images=[["photo.jpg"]])
"""
